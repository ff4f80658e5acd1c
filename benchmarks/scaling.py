"""Tokens per second of `python -m train` with 1, 2 and 4 processes: DDP and DeepSpeed's ZeRO-1, 2 and 3.

    python -m benchmarks.scaling --size tiny --block 128 --batch 8

Every layout takes the same steps of `--batch` sequences, over all processes, with the same settings; the times are
read from metrics.jsonl. The layouts alternate within each round, and must have equal losses. On a CPU, the processes
share `--threads` (at least one each), so an efficiency of 1 means that sharding costs nothing. On GPUs, the efficiency
is the speed divided by the number of GPUs. AdamW is fused in the optimized runs (ZeRO), and not in the baseline's
(DDP).
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import training_runs
from benchmarks.arguments import make_parser
from benchmarks.rounds import machine, spread
from train.checkpoints.run_folder import FinishedRun
from train.plan.shapes import Layout
from train.utils.command import run_command
from train.utils.devices import device_type
from train.utils.errors import UserError
from train.utils.tables import markdown_table

KINDS = ("ddp", "zero1", "zero2", "zero3")
WARM_UP_STEPS = 2
LOSS_TOLERANCE = {"no": 1e-4, "bf16": 1e-2}  # relative, after some optimizer steps


def layout_of(kind: str, processes: int, batch: int) -> Layout:
    """The layout of a kind for steps of `batch` sequences; DDP with one process is a run without a launcher."""
    settings: dict[str, Any] = {"world_size": processes, "micro_batch": batch // processes}
    if kind == "ddp":
        return Layout("ddp" if processes > 1 else "single", **settings)
    return Layout("zero", zero_stage=int(kind.removeprefix("zero")), **settings)


def name_of(layout: Layout) -> str:
    kind = {"single": "plain", "zero": f"zero{layout.zero_stage}"}.get(layout.kind, layout.kind)
    return f"{kind} x {layout.world_size}"


def train(layout: Layout, flags: list[str], threads: int, folder: Path) -> FinishedRun:
    command = ["env", f"OMP_NUM_THREADS={max(1, threads // layout.world_size)}", *layout.command]
    return training_runs.train(flags, folder, command, layout.run_type)


def median_step(run: FinishedRun) -> float:
    return statistics.median(record["step_time_seconds"] for record in run.steps[WARM_UP_STEPS:])


def losses(run: FinishedRun) -> list[float]:
    return [record["loss"] for record in run.steps]


def check_same(found: dict[Layout, list[FinishedRun]], tolerance: float) -> None:
    """Exit with a message unless all runs have the losses of the first one."""
    expected = losses(next(iter(found.values()))[0])
    for layout, runs in found.items():
        for run in runs:
            if not np.allclose(losses(run), expected, rtol=tolerance, atol=0):
                raise SystemExit(f"{name_of(layout)} does not train as the first does: {losses(run)}, not {expected}")


def row(layout: Layout, runs: list[FinishedRun], base: list[FinishedRun], tokens: int, devices: int) -> list[str]:
    """Each round's rate by its median step; the efficiency is taken round by round."""
    rates, bases = ([tokens / median_step(run) for run in side] for side in (runs, base))
    efficiency = [own / (devices * theirs) for own, theirs in zip(rates, bases, strict=True)]
    memory = statistics.median(run.summary["peak_memory_bytes"] for run in runs)
    return [name_of(layout), spread(rates, 0), spread(efficiency), f"{memory / 2**30:.2f}"]


def main() -> None:
    parser = make_parser(__doc__, size="gpt2", block=256, batch=4, processes=[1, 2, 4], steps=8, rounds=3,
                         threads=torch.get_num_threads())  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtype", choices=["no", "bf16"], default="no", help="mixed precision")
    args = parser.parse_args()
    for number in args.processes:
        if args.batch % number:
            raise UserError(f"--batch {args.batch}: not divisible by {number} processes; give a multiple of them")
    if args.steps <= WARM_UP_STEPS:
        raise UserError(f"--steps {args.steps}: the first {WARM_UP_STEPS} are not counted; give more")
    chosen = [("ddp", 1), *((kind, number) for number in args.processes for kind in args.kinds)]
    found: dict[Layout, list[FinishedRun]] = {layout_of(kind, number, args.batch): [] for kind, number in chosen}
    tokens = args.batch * args.block
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training_runs.write_tokens(folder / "train.bin", args.steps * tokens + 1)
        flags = training_runs.training_flags(folder / "train.bin", args.size, args.block, args.steps, args.dtype)
        for number in range(args.rounds):
            for layout, runs in found.items():
                runs.append(train(layout, flags, args.threads, folder))
                rate = f"{tokens / median_step(runs[-1]):,.0f} tokens/s"
                print(f"round {number + 1}, {name_of(layout)}: {rate}", file=sys.stderr)
            check_same(found, LOSS_TOLERANCE[args.dtype])
    device = device_type()
    print(
        f"{args.size}, steps of {args.batch} x {args.block} tokens, mixed precision {args.dtype}; {machine(device)}\n"
    )
    base = next(iter(found.values()))
    rows = [
        row(layout, runs, base, tokens, 1 if device == "cpu" else layout.world_size) for layout, runs in found.items()
    ]
    print(markdown_table(["layout", "tokens/s", "efficiency", "memory per process (GiB)"], rows))


if __name__ == "__main__":
    run_command(main)
