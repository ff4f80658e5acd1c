"""What `--profile` costs in steps that it does not record.

    python -m benchmarks.profiling --block 128 --batch 1

Real runs of `python -m train` that take the same steps: without `--profile`, with steps to record after those that are
timed, and with steps recorded before them. The sides alternate within each round, one process after the other, and
what is read are the metrics.jsonl that they leave. Processes differ among themselves by more than `--profile` adds to
such a step, which is one call: that is measured by itself as well.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks import commands, processes
from benchmarks.rounds import machine, spread
from train.checkpoints.loading import SIZES
from train.utils.command import run_command
from train.utils.errors import UserError
from train.utils.tables import markdown_table

WARM_UP_STEPS = 4  # among them the one that is recorded before
LAST_STEPS = 3  # among them the one that is recorded after


def sides(steps: int) -> dict[str, list[str]]:
    """The flags that each side adds to a run of `steps` steps."""
    return {
        "without --profile": [],
        "before the recorded step": ["--profile", f"--profile_steps={steps - 1}:{steps}"],
        "after the recorded step": ["--profile", "--profile_steps=2:3"],
    }


def step_seconds(flags: list[str], steps: int, folder: Path) -> list[float]:
    """Of the timed steps of a run."""
    words = [sys.executable, "-m", "train", *flags, f"--checkpoint_path={folder}/run", "--overwrite"]
    process = processes.start(words, folder)
    process.wait()
    processes.check(process, words, folder)
    lines = (folder / "run" / "baseline" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    timed = [record for record in records if WARM_UP_STEPS < record["step"] <= steps - LAST_STEPS]
    assert not any(record.get("profiled") for record in timed)
    return [record["step_time_seconds"] for record in timed]


def call_microseconds(calls: int = 20_000) -> list[float]:
    """Of `torch.profiler.profile.step`, which ends every step of a run with `--profile`, where it records nothing."""
    taken = []
    waiting = schedule(wait=10 * calls, warmup=1, active=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=waiting) as recorder:
        for _ in range(10):
            began = time.perf_counter()
            for _ in range(calls // 10):
                recorder.step()
            taken.append(1e6 * (time.perf_counter() - began) / (calls // 10))
    return taken


def row(name: str, base: list[list[float]], own: list[list[float]]) -> list[str]:
    """A side's median step, and what it takes more than `base`: medians round by round, and the least of all steps."""
    medians, theirs = ([statistics.median(steps) for steps in runs] for runs in (own, base))
    more = [100 * (mine / other - 1) for mine, other in zip(medians, theirs, strict=True)]
    least = 100 * (min(map(min, own)) / min(map(min, base)) - 1)
    return [name, spread([1e3 * each for each in medians], 1), spread(more, 1), f"{least:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.steps <= WARM_UP_STEPS + LAST_STEPS:
        raise UserError(f"--steps {args.steps}: none is timed; take more than {WARM_UP_STEPS + LAST_STEPS}")
    print(machine("cpu"))
    print(f"the call between recordings: {spread(call_microseconds(), 1)} microseconds", flush=True)
    taken: dict[str, list[list[float]]] = {name: [] for name in sides(args.steps)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands.write_tokens(folder / "train.bin", args.steps * args.batch * args.block + 1)
        flags = commands.flags(folder / "train.bin", args.size, args.block, args.steps, "no")
        flags.append(f"--train_micro_batch_size_per_gpu={args.batch}")
        for _ in range(args.rounds):
            for side, more in sides(args.steps).items():
                taken[side].append(step_seconds([*flags, *more], args.steps, folder))
    base = next(iter(taken.values()))
    header = ["timed steps", "median step, ms (range)", "more than without, % (range)", "of the least step, %"]
    print(markdown_table(header, [row(side, base, own) for side, own in taken.items()]))


if __name__ == "__main__":
    run_command(main)
