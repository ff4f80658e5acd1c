"""Real runs of `python -m train` on random tokens, for the benchmarks that read what a run writes."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import processes
from train.checkpoints.run_folder import FinishedRun, read_run
from train.data.token_file import write_token_file
from train.data.tokenizer import END_OF_TEXT

CHUNK_TOKENS = 1 << 24
COMMAND = (sys.executable, "-m", "train")


def write_tokens(path: Path, count: int) -> None:
    """A token file of random ids, on the disk when this returns."""
    random = np.random.default_rng(0)
    sizes = (min(CHUNK_TOKENS, count - start) for start in range(0, count, CHUNK_TOKENS))
    ids = (random.integers(0, END_OF_TEXT, size, np.uint16) for size in sizes)
    write_token_file(path, ((chunk, 1) for chunk in ids), END_OF_TEXT + 1, {})


def training_flags(tokens: Path, model: str, block: int, steps: int, precision: str) -> list[str]:
    """Flags of a run of `steps` steps with the attention and the loss of an optimized run, and little else.

    `precision` is the value of `--mixed_precision`.
    """
    return [
        f"--model={model}",
        f"--block_size={block}",
        f"--max_steps={steps}",
        f"--mixed_precision={precision}",
        "--attn_implementation=auto",
        "--loss_chunk_size=512",
        f"--train_data_path={tokens}",
        f"--val_data_path={tokens}",
        "--eval_steps=1",
        "--max_new_tokens=0",
        "--report_to=none",
    ]


def train(
    flags: list[str], scratch: Path, command: Sequence[str] = COMMAND, run_type: str = "baseline"
) -> FinishedRun:
    """Run a training command; its folder below `scratch` is removed before this returns."""
    out = scratch / "run"
    out.mkdir()
    processes.measure([*command, *flags, f"--checkpoint_path={out}"], out)
    finished = read_run(out / run_type, run_type)
    shutil.rmtree(out)
    return finished
