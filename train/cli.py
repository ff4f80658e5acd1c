"""The console command `gpt2flash`: every command of this package under one name, imported when it is called."""

import importlib
import sys
from collections.abc import Callable

from train.utils.command import run_command
from train.utils.errors import UserError, did_you_mean

# Name, the module with its `main` (`python -m` runs the same), and what it does.
TOOLS = {
    "preprocess": ("train.preprocess_data.__main__", "tokenize text into token files, train.bin and val.bin"),
    "train": ("train.__main__", "train GPT-2 on token files, plain or through DeepSpeed"),
    "generate": ("train.generate.__main__", "generate text with a trained model"),
    "compare": ("train.compare.__main__", "compare finished runs: a report, a gate"),
    "kernels": ("train.kernels.__main__", "show where the time of profiled steps goes"),
    "checkpoints": ("train.checkpoints.__main__", "check that the checkpoints of a run are intact"),
    "replay": ("train.replay.__main__", "compute a step again and find where a value is not finite"),
    "plan": ("train.plan.__main__", "find the fastest layout that fits, before a run"),
    "export": ("train.export.__main__", "write a checkpoint for other tools"),
    "hub": ("train.hub.__main__", "upload a finished run to the Hugging Face Hub"),
    "parity": ("train.parity.__main__", "check that every layout computes the same"),
    "config": ("train.config.packaged", "print where a shipped configuration is"),
}
HELP = f"""\
usage: gpt2flash TOOL [ARGUMENTS ...]

{"".join(f"  {tool:<13}{what}{chr(10)}" for tool, (_, what) in TOOLS.items())}
gpt2flash TOOL --help has the arguments of each. A launcher starts the training of several processes:

  accelerate launch --config_file "$(gpt2flash config deepspeed)" --num_processes 2 -m train \\
      --run_type optimized --deepspeed_config zero2.json ...
"""


def choose(tool: str) -> Callable[[], None]:
    """The `main` of a tool, which reads `sys.argv`.

    Raises:
        UserError: for a name that no tool has.
    """
    if tool not in TOOLS:
        nearest = did_you_mean(tool, TOOLS)
        raise UserError(f"gpt2flash {tool}: there is no such tool; {nearest}choose from {', '.join(TOOLS)}")
    return importlib.import_module(TOOLS[tool][0]).main


def run() -> None:
    if len(sys.argv) == 1:
        raise UserError(f"gpt2flash: name a tool, one of {', '.join(TOOLS)}; gpt2flash --help says what they do")
    if sys.argv[1] in ("-h", "--help"):
        print(HELP, end="")
        return
    choose(sys.argv.pop(1))()


def main() -> None:
    run_command(run)


if __name__ == "__main__":
    main()
