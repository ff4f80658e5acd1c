"""How long until something happens: the import of the model package, beside those of torch and of stock GPT-2, and the
first training step after launch.

    python -m benchmarks.startup

The first step is that of `python -m train --torch_compile`, from the launch of the command until its line is in
metrics.jsonl: with an empty cache of compiled kernels, and with what the run before left in it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks import commands, processes
from benchmarks.rounds import alternate, machine, spread
from train.checkpoints.loading import SIZES
from train.utils.command import run_command

IMPORTS = {
    "torch": "import torch",
    "stock GPT-2": "from transformers import GPT2LMHeadModel",
    "ours, without DeepSpeed": "import modeling_gpt2flash, sys; sys.exit('deepspeed' in sys.modules)",
}


def start(statement: str) -> None:
    """A whole Python that executes a statement."""
    subprocess.run([sys.executable, "-c", statement], check=True)


def first_step_seconds(flags: list[str], folder: Path) -> float:
    """From the launch of `python -m train` until its first step is written down; the run ends before this returns."""
    words = [sys.executable, "-m", "train", *flags, f"--checkpoint_path={folder}/run", "--overwrite"]
    log = folder / "run" / "baseline" / "metrics.jsonl"
    log.unlink(missing_ok=True)
    began = time.perf_counter()
    process = processes.start(words, folder)
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.wait()
    processes.check(process, words, folder)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="gpt2")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of the import")
    args = parser.parse_args()
    print(machine("cpu"))
    sides = {name: partial(start, statement) for name, statement in IMPORTS.items()}
    alternate(sides, rounds=1)  # from the disk
    for name, taken in alternate(sides, args.rounds).items():
        print(f"import, {name}: {spread([each.wall for each in taken])} s", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands.write_tokens(folder / "train.bin", 2 * args.batch * args.block + 1)
        flags = commands.flags(folder / "train.bin", args.size, args.block, 2, "auto")
        flags += ["--torch_compile", f"--train_micro_batch_size_per_gpu={args.batch}"]
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        for cache in ("empty", "warm"):
            print(f"first step, cache {cache}: {first_step_seconds(flags, folder):.1f} s", flush=True)


if __name__ == "__main__":
    run_command(main)
