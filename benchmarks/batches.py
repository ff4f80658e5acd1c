"""What it costs to load a step's data, and how much of that a training step waits for.

    python -m benchmarks.batches

Loading by itself: windows at random places of a memory-mapped file of 2 GiB are read into a step's tensors, warm (the
file is in the page cache, as it is from the second reading on when memory suffices) and cold (the kernel was told to
drop the file, and it is mapped anew, before each step), and cold once more without `TokenFile.will_need`, by which the
kernel learns of all windows before the first is read. Then each page that is missed brings what lies around it
(`read_ahead_kb` of the disk, 128 by default), most of which nobody has asked for; the major page faults of a step,
counted beside, show that the reads were cold. The file is large against that, so few windows are brought by others.

In training the same is done while the step before runs. `--train` measures real runs of `python -m train` on that
file: the time of a step and the part of it that the loop waited for data.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks import commands
from train.data.batches import TrainBatches
from train.data.token_file import END_OF_TEXT, TokenFile, open_tokens

SHAPES = ((128, 10), (1024, 4), (1024, 32), (1024, 512))  # tokens in a sequence, sequences in a step of one process
TRAINED = (("tiny", 128, 10), ("gpt2", 1024, 1))
FILE_TOKENS = 1 << 30
PIECE_TOKENS = 1 << 24


def write_file(path: Path, tokens: int) -> None:
    """Random ids, on the disk when this returns."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(tokens // PIECE_TOKENS):
            file.write(random.integers(0, END_OF_TEXT, PIECE_TOKENS, dtype=np.uint16).data)
        file.flush()
        os.fsync(file.fileno())
    account = {"dtype": "uint16", "tokens": tokens, "max_token_id": END_OF_TEXT, "sha256": None}
    path.with_suffix(".json").write_text(json.dumps(account))


def drop_from_memory(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(tokens: TokenFile, block_size: int, sequences: int, step: int) -> tuple[float, int]:
    """Seconds and major page faults of one step's batch; which windows they are is not counted."""
    batches = TrainBatches(tokens, block_size, sequences, seed=0)
    batches.window_indices(step)  # the permutation of an epoch is made once
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    began = time.perf_counter()
    batches.micro_batch(step, 0, 0, 1, sequences)
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults


def loads(path: Path, block_size: int, sequences: int, rounds: int) -> dict[str, list[tuple[float, int]]]:
    """Of each side, the loads of `rounds` steps; the sides alternate."""
    found: dict[str, list[tuple[float, int]]] = {"warm": [], "cold": [], "one by one": []}
    for step in range(rounds):
        for side, measured in found.items():
            drop_from_memory(path)
            tokens = open_tokens(path, END_OF_TEXT + 1)
            if side == "warm":
                load(tokens, block_size, sequences, step)
            with patch.object(TokenFile, "will_need") if side == "one by one" else nullcontext():
                measured.append(load(tokens, block_size, sequences, step))
            del tokens  # mapped pages stay in memory whatever the kernel is told
    return found


def cell(measured: list[tuple[float, int]]) -> str:
    times = [seconds * 1e3 for seconds, _ in measured]
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def trained(path: Path, model: str, block_size: int, sequences: int, steps: int) -> dict[str, float]:
    """Median step, median and share of its wait for data, of a run of `python -m train` on the file, begun cold."""
    drop_from_memory(path)
    with tempfile.TemporaryDirectory() as folder:
        flags = commands.flags(path, model, block_size, steps, "no")
        flags += [f"--train_micro_batch_size_per_gpu={sequences}", f"--checkpoint_path={folder}"]
        done = subprocess.run([sys.executable, "-m", "train", *flags], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        run = Path(folder, "baseline")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
        summary = json.loads((run / "metrics.json").read_text())
    waits, times = ([record[key] for record in records] for key in ("data_seconds", "step_time_seconds"))
    return {"step": statistics.median(times), "wait": statistics.median(waits), "share": summary["data_share"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured (default: the system's for scratch)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="real training steps (default: none)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "train.bin")
        write_file(path, FILE_TOKENS)
        print("| block | sequences | warm, ms (range) | tokens/s | cold, ms (range) | cold, one by one, ms (range) |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for block_size, sequences in SHAPES:
            found = loads(path, block_size, sequences, args.rounds)
            rate = block_size * sequences / statistics.median(seconds for seconds, _ in found["warm"])
            cells = [block_size, sequences, cell(found["warm"]), f"{rate:,.0f}", cell(found["cold"])]
            faults = statistics.median(count for _, count in found["one by one"])
            cells.append(f"{cell(found['one by one'])}, {faults:.0f} faults")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
        if args.train:
            print("\n| model | block | sequences | step, ms | waited for data, ms | share of the steps |")
            print("| --- | ---: | ---: | ---: | ---: | ---: |")
            for model, block_size, sequences in TRAINED:
                found_here = trained(path, model, block_size, sequences, args.train)
                step, wait = (found_here[key] * 1e3 for key in ("step", "wait"))
                print(
                    f"| {model} | {block_size} | {sequences} | {step:,.0f} | {wait:.3f} | {found_here['share']:.4%} |"
                )


if __name__ == "__main__":
    main()
