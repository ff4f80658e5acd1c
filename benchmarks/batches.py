"""What loading a step's data costs, and how long a training step waits for it.

    python -m benchmarks.batches

Blocks at random positions of a file of 2 GiB are read into the tensors of a step. Warm: the file is in
the page cache. Cold: before each step the kernel drops the file. Cold without read-ahead: without
`TokenFile.will_need`; the blocks that the system reads from the disk (`ru_inblock`) show that the reads were cold.
docs/performance.md explains why.

`--train` measures real runs of `python -m train` on that file: the time of a step, and its wait for data.
"""

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import patch

from benchmarks import training_runs
from benchmarks.arguments import make_parser
from benchmarks.rounds import spread, take_turns
from train.data.batches import TrainBatches
from train.data.token_file import TokenFile, open_tokens
from train.data.tokenizer import END_OF_TEXT
from train.utils.command import run_command
from train.utils.tables import markdown_table

SHAPES = ((128, 10), (1024, 4), (1024, 32), (1024, 512))  # tokens in a sequence, sequences in a step of one process
TRAINED = (("tiny", 128, 10), ("gpt2", 1024, 1))
FILE_TOKENS = 1 << 30


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(tokens: TokenFile, block_size: int, sequences: int, step: int) -> tuple[float, int]:
    """Milliseconds, and blocks read from the disk, of one step's batch, without the choice of its blocks."""
    batches = TrainBatches(tokens, block_size, sequences, seed=0)
    batches.block_indices(step)  # computes the permutation of the epoch, once
    blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    started = time.perf_counter()
    batches.micro_batch(step, 0, 0, 1, sequences)
    return 1e3 * (time.perf_counter() - started), resource.getrusage(resource.RUSAGE_SELF).ru_inblock - blocks


def row(path: Path, block_size: int, sequences: int, rounds: int) -> list[str]:
    def measured(steps: Iterator[int], warm: bool = False, read_ahead: bool = True) -> tuple[float, int]:
        step = next(steps)
        drop_from_page_cache(path)
        tokens = open_tokens(path, END_OF_TEXT + 1)
        if warm:
            load(tokens, block_size, sequences, step)
        with nullcontext() if read_ahead else patch.object(TokenFile, "will_need"):
            return load(tokens, block_size, sequences, step)

    sides = {
        "warm": partial(measured, count(), warm=True),
        "cold": partial(measured, count()),
        "plain": partial(measured, count(), read_ahead=False),
    }
    taken = take_turns(sides, rounds)
    warm, cold, plain = ([milliseconds for milliseconds, _ in own] for own in taken.values())
    rate = 1e3 * block_size * sequences / statistics.median(warm)
    blocks = statistics.median(number for _, number in taken["plain"])
    shape = [str(block_size), str(sequences)]
    return [*shape, spread(warm), f"{rate:,.0f}", spread(cold), f"{spread(plain)}, {blocks:.0f} blocks"]


def trained_row(path: Path, model: str, block_size: int, sequences: int, steps: int) -> list[str]:
    """Median step and median wait for data in a run of `python -m train` on the file, started cold."""
    drop_from_page_cache(path)
    flags = training_runs.training_flags(path, model, block_size, steps, "no")
    with tempfile.TemporaryDirectory() as folder:
        run = training_runs.train([*flags, f"--train_micro_batch_size_per_gpu={sequences}"], Path(folder))
    step, wait = (
        1e3 * statistics.median(record[key] for record in run.steps[1:])
        for key in ("step_time_seconds", "data_seconds")
    )
    shape = [model, str(block_size), str(sequences)]
    return [*shape, f"{step:,.0f}", f"{wait:.3f}", f"{run.summary['data_share']:.4%}"]


def main() -> None:
    parser = make_parser(__doc__, rounds=15)
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure (default: temporary folder)")
    parser.add_argument(
        "--train", type=int, default=0, metavar="STEPS", help="number of real training steps (default: none)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "train.bin")
        training_runs.write_tokens(path, FILE_TOKENS)
        header = ["block", "sequences", "warm, ms (range)", "tokens/s", "cold, ms (range)"]
        header.append("cold, without read-ahead, ms (range)")
        print(markdown_table(header, [row(path, *shape, args.rounds) for shape in SHAPES]), flush=True)
        if args.train:
            header = ["model", "block", "sequences", "step, ms", "wait for data, ms", "share of step time"]
            print(f"\n{markdown_table(header, [trained_row(path, *shape, args.train) for shape in TRAINED])}")


if __name__ == "__main__":
    run_command(main)
