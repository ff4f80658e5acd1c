"""Start-up time: importing the model package, compared with torch and stock GPT-2, and the first training step.

    python -m benchmarks.startup

The first step is that of `python -m train --torch_compile`, from the launch of the command until its line is in
metrics.jsonl: with an empty cache of compiled kernels, then with the cache that this run has filled.
"""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks import processes, training_runs
from benchmarks.arguments import make_parser
from benchmarks.rounds import alternate, machine, spread
from train.utils.command import run_command

IMPORTS = {
    "torch": "import torch",
    "stock GPT-2": "from transformers import GPT2LMHeadModel",
    "ours, without DeepSpeed": "import modeling_gpt2flash, sys; sys.exit('deepspeed' in sys.modules)",
}


def execute(statement: str) -> None:
    """Execute a statement in a new Python process."""
    subprocess.run([sys.executable, "-c", statement], check=True)


def first_step_seconds(flags: list[str], folder: Path) -> float:
    """Seconds from the launch of `python -m train` until its first step is logged; the run ends before the return."""
    log = folder / "run" / "baseline" / "metrics.jsonl"
    log.unlink(missing_ok=True)
    started = time.perf_counter()
    process = processes.start(
        [*training_runs.COMMAND, *flags, f"--checkpoint_path={folder}/run", "--overwrite"], folder
    )
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    process.wait()
    processes.check(process, folder)
    return seconds


def main() -> None:
    args = make_parser(__doc__, size="gpt2", block=256, batch=1, rounds=5).parse_args()
    print(machine("cpu"))
    sides = {name: partial(execute, statement) for name, statement in IMPORTS.items()}
    alternate(sides, rounds=1)  # fills the page cache
    for name, taken in alternate(sides, args.rounds).items():
        print(f"import, {name}: {spread([each.wall for each in taken])} s", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_runs.write_tokens(folder / "train.bin", 2 * args.batch * args.block + 1)
        flags = training_runs.training_flags(folder / "train.bin", args.size, args.block, 2, "auto")
        flags += ["--torch_compile", f"--train_micro_batch_size_per_gpu={args.batch}"]
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        for cache in ("empty", "warm"):
            print(f"first step, cache {cache}: {first_step_seconds(flags, folder):.1f} s", flush=True)


if __name__ == "__main__":
    run_command(main)
