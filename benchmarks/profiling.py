"""What `--profile` costs in the steps that it does not record.

    python -m benchmarks.profiling --block 128 --batch 1

Real runs of `python -m train` of the same steps: without `--profile`, with a recorded step after the timed ones, and
with a recorded step before them. The sides alternate within each round, one process after the other, and the times are
read from metrics.jsonl. Processes differ from each other by more than what `--profile` adds to such a step, which is
one call of the profiler: that call is measured by itself as well.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks import training_runs
from benchmarks.arguments import make_parser
from benchmarks.rounds import machine, spread, take_turns
from train.utils.command import run_command
from train.utils.errors import UserError
from train.utils.tables import markdown_table

WARM_UP_STEPS = 4  # including the step that is recorded before the timed ones
LAST_STEPS = 3  # including the step that is recorded after them


def sides(steps: int) -> dict[str, list[str]]:
    """The flags that each side adds to a run of `steps` steps."""
    return {
        "without --profile": [],
        "before the recorded step": ["--profile", f"--profile_steps={steps - 1}:{steps}"],
        "after the recorded step": ["--profile", "--profile_steps=2:3"],
    }


def step_seconds(flags: list[str], steps: int, folder: Path) -> list[float]:
    """Of the timed steps of a run."""
    run = training_runs.train(flags, folder)
    timed = [record for record in run.steps if WARM_UP_STEPS < record["step"] <= steps - LAST_STEPS]
    assert not any(record.get("profiled") for record in timed)
    return [record["step_time_seconds"] for record in timed]


def call_microseconds(calls: int = 20_000) -> list[float]:
    """Of `torch.profiler.profile.step`, which ends every step of a run with `--profile`, while it records nothing."""
    taken = []
    waiting = schedule(wait=10 * calls, warmup=1, active=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=waiting) as recorder:
        for _ in range(10):
            started = time.perf_counter()
            for _ in range(calls // 10):
                recorder.step()
            taken.append(1e6 * (time.perf_counter() - started) / (calls // 10))
    return taken


def row(name: str, base: list[list[float]], own: list[list[float]]) -> list[str]:
    """A side's median step and its overhead over `base`: of the medians, round by round, and of the fastest steps."""
    medians, theirs = ([statistics.median(steps) for steps in runs] for runs in (own, base))
    overhead = [100 * (mine / other - 1) for mine, other in zip(medians, theirs, strict=True)]
    fastest = 100 * (min(map(min, own)) / min(map(min, base)) - 1)
    return [name, spread([1e3 * each for each in medians], 1), spread(overhead, 1), f"{fastest:.1f}"]


def main() -> None:
    args = make_parser(__doc__, size="tiny", block=128, batch=1, steps=60, rounds=3).parse_args()
    if args.steps <= WARM_UP_STEPS + LAST_STEPS:
        raise UserError(f"--steps {args.steps}: no step is timed; give more than {WARM_UP_STEPS + LAST_STEPS}")
    print(machine("cpu"))
    print(f"the call between recordings: {spread(call_microseconds(), 1)} microseconds", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_runs.write_tokens(folder / "train.bin", args.steps * args.batch * args.block + 1)
        flags = training_runs.training_flags(folder / "train.bin", args.size, args.block, args.steps, "no")
        flags.append(f"--train_micro_batch_size_per_gpu={args.batch}")
        runs = {
            side: partial(step_seconds, [*flags, *more], args.steps, folder)
            for side, more in sides(args.steps).items()
        }
        taken = take_turns(runs, args.rounds)
    base = next(iter(taken.values()))
    header = ["timed steps", "median step, ms (range)", "overhead, % (range)", "overhead of the fastest step, %"]
    print(markdown_table(header, [row(side, base, own) for side, own in taken.items()]))


if __name__ == "__main__":
    run_command(main)
