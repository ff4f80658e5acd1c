"""Tokens a second of `python -m train` with 1, 2 and 4 processes: DDP and DeepSpeed's ZeRO-1, 2 and 3.

    python -m benchmarks.scaling --size tiny --block 128 --batch 8

Every layout takes the same steps of `--batch` sequences with the same settings, as the real command under its real
launcher; what is read are the metrics.jsonl that it leaves. The layouts alternate within each round, and have to have
the same losses. On a CPU the processes share the cores that one process has alone (`--threads` in all, at least one
each), so an efficiency of 1 says that sharding costs nothing; on GPUs each process adds one, and the efficiency is the
share kept of so many times the speed. AdamW is fused in the optimized runs, ZeRO's, and not in the baseline's, DDP's.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import commands, processes
from benchmarks.rounds import machine, spread
from train.checkpoints.loading import SIZES
from train.utils.command import run_command
from train.utils.devices import device_type
from train.utils.errors import UserError
from train.utils.tables import markdown_table

ROOT = Path(__file__).parent.parent
KINDS = ("ddp", "zero1", "zero2", "zero3")
WARM_UP_STEPS = 2
LOSS_TOLERANCE = {"no": 1e-4, "bf16": 1e-2}  # relative, after some optimizer steps


@dataclass(frozen=True)
class Layout:
    kind: str
    processes: int

    @property
    def run_type(self) -> str:
        return "baseline" if self.kind == "ddp" else "optimized"

    @property
    def name(self) -> str:
        return f"{'plain' if self.kind == 'ddp' and self.processes == 1 else self.kind} x {self.processes}"

    def words(self) -> list[str]:
        """How it is started."""
        python = [sys.executable, "-m"]
        if self.kind == "ddp":
            torchrun = [*python, "torch.distributed.run", "--nproc_per_node", str(self.processes), "--rdzv_backend",
                        "c10d", "--rdzv_endpoint", "localhost:0", "-m"]  # fmt: skip
            return [*(python if self.processes == 1 else torchrun), "train", "--run_type=baseline"]
        launch = [*python, "accelerate.commands.launch", "--config_file", f"{ROOT}/accelerate_configs/deepspeed.yaml",
                  "--num_processes", str(self.processes), "--main_process_port", "0"]  # fmt: skip
        config = f"--deepspeed_config={ROOT}/ds_configs/{self.kind}.json"
        return [*launch, "-m", "train", "--run_type=optimized", config]


@dataclass(frozen=True)
class Finished:
    """One run: seconds of its steps after the first, its losses, and bytes of the process with the most."""

    times: list[float]
    losses: list[float]
    memory: int


def train(layout: Layout, flags: list[str], batch: int, threads: int, folder: Path) -> Finished:
    """One run of `python -m train` in `folder`, which is empty again when this returns."""
    out = folder / "run"
    out.mkdir()
    each = max(1, threads // layout.processes)
    processes.measure(
        ["env", f"OMP_NUM_THREADS={each}", *layout.words(), *flags, f"--checkpoint_path={out}",
         f"--train_micro_batch_size_per_gpu={batch // layout.processes}"],
        out,
    )  # fmt: skip
    records = [json.loads(line) for line in (out / layout.run_type / "metrics.jsonl").read_text().splitlines()]
    memory = json.loads((out / layout.run_type / "metrics.json").read_text())["peak_memory_bytes"]
    shutil.rmtree(out)
    times = [record["step_time_seconds"] for record in records[WARM_UP_STEPS:]]
    return Finished(times, [record["loss"] for record in records], memory)


def check_same(found: dict[Layout, list[Finished]], tolerance: float) -> None:
    """End with a message unless all runs have the first one's losses."""
    expected = next(iter(found.values()))[0].losses
    for layout, runs in found.items():
        for run in runs:
            if not np.allclose(run.losses, expected, rtol=tolerance, atol=0):
                raise SystemExit(
                    f"{layout.name} does not train as the first layout does: {run.losses}, not {expected}"
                )


def row(layout: Layout, runs: list[Finished], base: list[Finished], tokens: int, devices: int) -> list[str]:
    """Each round's rate by its median step; the efficiency is taken round by round."""
    rates, bases = ([tokens / statistics.median(run.times) for run in side] for side in (runs, base))
    efficiency = [own / (devices * theirs) for own, theirs in zip(rates, bases, strict=True)]
    memory = statistics.median(run.memory for run in runs)
    return [layout.name, spread(rates, 0), spread(efficiency), f"{memory / 2**30:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="gpt2")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step, of all processes together")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--dtype", choices=["no", "bf16"], default="no", help="mixed precision")
    parser.add_argument("--steps", type=int, default=8, help=f"of a run; the first {WARM_UP_STEPS} are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all processes together")
    args = parser.parse_args()
    for number in args.processes:
        if number < 1 or args.batch % number:
            raise UserError(f"--batch {args.batch}: cannot be shared by {number} processes; give a multiple of them")
    if args.steps <= WARM_UP_STEPS:
        raise UserError(f"--steps {args.steps}: the first {WARM_UP_STEPS} are not counted; give more")
    layouts = [Layout("ddp", 1)]
    layouts += [Layout(kind, number) for number in args.processes for kind in args.kinds]
    layouts = list(dict.fromkeys(layouts))

    found: dict[Layout, list[Finished]] = {layout: [] for layout in layouts}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands.write_tokens(folder / "train.bin", args.steps * args.batch * args.block + 1)
        flags = commands.flags(folder / "train.bin", args.size, args.block, args.steps, args.dtype)
        for number in range(args.rounds):
            for layout in layouts:
                found[layout].append(train(layout, flags, args.batch, args.threads, folder))
                rate = args.batch * args.block / statistics.median(found[layout][-1].times)
                print(f"round {number + 1}, {layout.name}: {rate:,.0f} tokens/s", file=sys.stderr)
            check_same(found, LOSS_TOLERANCE[args.dtype])
    print(
        f"{args.size}, steps of {args.batch} x {args.block} tokens, mixed precision {args.dtype}; "
        f"{machine(device_type())}\n"
    )
    tokens, base = args.batch * args.block, found[layouts[0]]
    rows = [
        row(layout, runs, base, tokens, 1 if device_type() == "cpu" else layout.processes)
        for layout, runs in found.items()
    ]
    print(markdown_table(["layout", "tokens/s", "efficiency", "memory of a process (GiB)"], rows))


if __name__ == "__main__":
    run_command(main)
