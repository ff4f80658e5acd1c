"""The parity certificate: every layout trains the same steps, held against stock GPT-2 in float64.

Each run is the real command in processes of its own (fp32, gloo, on the CPU); what is compared are the files that it
leaves. `train.parity.reference` is the right answer, `train.parity.differences` says what is compared and how.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tqdm import tqdm

from train.config import packaged as shipped
from train.metrics.hardware import hardware, versions
from train.parity.differences import TOLERANCES, Difference, differences, is_green
from train.parity.reference import CLIP, SEQUENCES, STEPS, Oracle, flags, train_oracle, write_problem
from train.utils.command import run_command
from train.utils.errors import UserError
from train.utils.files import write_json, write_text
from train.utils.json_files import json_safe
from train.utils.tables import markdown_table
from train.utils.third_party_warnings import silence_third_party_warnings

RUN_LIMIT = 900  # seconds until a run counts as hanging
STOP_LIMIT = 30  # seconds that a launcher has for stopping its processes
EXAMPLE = "python -m train.parity --out parity"


@dataclass(frozen=True)
class Layout:
    """A way to share a run among processes: how it is started, and into how many shares the data is divided."""

    name: str
    processes: int
    data_parallel: int
    accelerate: str | None = None  # the file that Accelerate launches with; None: torchrun, or nothing for one process
    deepspeed_config: str | None = None
    stages: int = 1

    @property
    def run_type(self) -> str:
        return "optimized" if self.deepspeed_config else "baseline"

    @property
    def words(self) -> list[str]:
        engine = ["--deepspeed_config", self.deepspeed_config] if self.deepspeed_config else []
        stages = ["--pipeline_stages", str(self.stages)] if self.stages > 1 else []
        return [*self._launcher, "-m", "train", "--run_type", self.run_type, *engine, *stages]

    @property
    def _launcher(self) -> list[str]:
        """With this interpreter, so that the package is found where this module was."""
        if self.processes == 1:
            return [sys.executable]
        if self.accelerate is None:
            launch = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend", "c10d"]
            return [*launch, "--rdzv_endpoint", "localhost:0", "--nproc_per_node", str(self.processes)]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        file = shipped.accelerate_file(self.accelerate)
        return [*launch, "--config_file", str(file), "--num_processes", str(self.processes)]


LAYOUTS = (
    Layout("single", 1, 1),
    Layout("ddp-x2", 2, 2),
    Layout("ddp-x4", 4, 4),
    Layout("zero1-x2", 2, 2, "deepspeed.yaml", "ds_configs/zero1.json"),
    Layout("zero2-x2", 2, 2, "deepspeed.yaml", "ds_configs/zero2.json"),
    Layout("zero3-x2", 2, 2, "deepspeed.yaml", "ds_configs/zero3.json"),
    Layout("fsdp2-x2", 2, 2, "fsdp2.yaml"),
    Layout("pp2", 2, 1, "deepspeed.yaml", "ds_configs/pipeline.json", 2),
    Layout("pp4", 4, 1, "deepspeed.yaml", "ds_configs/pipeline.json", 4),
    Layout("pp2-dp2", 4, 2, "deepspeed.yaml", "ds_configs/pipeline.json", 2),
)


@dataclass(frozen=True)
class Case:
    """One run of the matrix."""

    layout: Layout
    accumulation: int
    activation_checkpointing: bool
    clipping: bool

    @property
    def max_grad_norm(self) -> float:
        return CLIP if self.clipping else 0.0

    @property
    def label(self) -> str:
        checkpointing = " checkpointing" if self.activation_checkpointing else ""
        return f"{self.layout.name} accumulation {self.accumulation}{checkpointing}{' clipping' * self.clipping}"

    def words(self, problem: Path, out: Path) -> list[str]:
        """The command that trains this case on the files in `problem` and writes below `out`."""
        micro_batch = SEQUENCES // (self.accumulation * self.layout.data_parallel)
        return [
            *self.layout.words,
            *flags(problem, self.max_grad_norm),
            f"--train_micro_batch_size_per_gpu={micro_batch}",
            f"--gradient_accumulation_steps={self.accumulation}",
            *(["--activation_checkpointing=full"] if self.activation_checkpointing else []),
            f"--checkpoint_path={out}",
        ]


@dataclass(frozen=True)
class Row:
    """What came of a case: its differences from the oracle, or why there are none."""

    case: Case
    seconds: float
    found: dict[str, Difference] | None
    error: str | None = None

    @property
    def green(self) -> bool:
        return self.found is not None and is_green(self.found)

    @property
    def reason(self) -> str:
        """Why the row is red."""
        if self.found is None:
            return self.error or ""
        return "; ".join(
            f"{kind} {self.found[kind].value:.1e} (at most {tolerance:.0e}) at {self.found[kind].where}"
            for kind, tolerance in TOLERANCES.items()
            if not self.found[kind].value <= tolerance
        )


def certify(cases: Sequence[Case]) -> list[Row]:
    """Run every case and compare it; what a run wrote is deleted before the next one starts."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        problem = Path(folder) / "problem"
        write_problem(problem)
        oracles = {limit: train_oracle(problem, limit) for limit in {case.max_grad_norm for case in cases}}
        with tqdm(cases, desc="parity", unit="run", smoothing=0) as bar:
            for case in bar:
                bar.set_postfix_str(case.label)
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    rows.append(_row(case, problem, Path(out), oracles[case.max_grad_norm]))
                if not rows[-1].green:
                    bar.write(f"RED  {case.label}: {rows[-1].reason}")
    return rows


def _row(case: Case, problem: Path, out: Path, oracle: Oracle) -> Row:
    began = time.perf_counter()
    error = launch(case.words(problem, out), out / "log")
    seconds = time.perf_counter() - began
    if error is not None:
        return Row(case, seconds, None, error)
    try:
        return Row(case, seconds, differences(out / case.layout.run_type, oracle))
    except (OSError, SafetensorError, UserError, ValueError) as unreadable:
        return Row(case, seconds, None, f"its files cannot be compared: {unreadable}")


def launch(words: Sequence[str], log: Path) -> str | None:
    """Run a command on the CPU, its output in `log`; None when it succeeded, else its error in a line."""
    environment = {
        "OMP_NUM_THREADS": "1",  # several processes share few cores
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            words, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(RUN_LIMIT)
        except subprocess.TimeoutExpired:
            return f"it was not done after {RUN_LIMIT} seconds"
        finally:
            _stop(process)
    return None if code == 0 else f"exit code {code}: {error_line(log.read_text(errors='replace'))}"


def _stop(process: subprocess.Popen) -> None:
    """End a command that is still running: its launcher is asked first, for only it knows all its processes."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def error_line(output: str) -> str:
    """The last line that names an error (launchers say more after it), else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?([\w.]*(Error|Exception)|error)\b", line)]
    # What launchers raise is that a process of theirs has failed.
    named = [line for line in named if "ChildFailedError" not in line and "CalledProcessError" not in line] or named
    return (named or lines or ["it said nothing"])[-1]


def worst(rows: Sequence[Row], kind: str) -> float | None:
    """The largest difference of a kind; None when none of the rows has one."""
    return max((row.found[kind].value for row in rows if row.found is not None), default=None)


def table(rows: Sequence[Row]) -> str:
    """A line a layout, the worst of its runs in each column, and the tolerances on top."""
    lines = [["tolerance", "", *(f"{tolerance:.0e}" for tolerance in TOLERANCES.values()), ""]]
    for layout in dict.fromkeys(row.case.layout for row in rows):
        own = [row for row in rows if row.case.layout == layout]
        values = [worst(own, kind) for kind in TOLERANCES]
        red = sum(not row.green for row in own)
        cells = ["-" if value is None else f"{value:.1e}" for value in values]
        lines.append([layout.name, str(len(own)), *cells, f"{red} RED" if red else "green"])
    return markdown_table(["layout", "runs", *(kind.replace("_", " ") for kind in TOLERANCES), "verdict"], lines)


def verdict(rows: Sequence[Row]) -> str:
    red = sum(not row.green for row in rows)
    return f"{red} of {len(rows)} runs are RED" if red else f"All {len(rows)} runs are green"


def report(rows: Sequence[Row]) -> str:
    return "\n\n".join([
        "# Parity",
        f"**{verdict(rows)}**: {STEPS} steps of {SEQUENCES} sequences in fp32 over gloo, each run held against stock "
        "GPT-2 in float64. The largest relative difference in each layout's runs, over all steps and tensors:",
        table(rows),
        "Of the loss, the gradient's norm before clipping, each tensor's gradient after clipping, and each tensor's "
        "weights after each step. The biases of attention's keys, whose gradient is 0 but for rounding, are left out "
        "of gradient and weight; the column key bias is what the logits change by when they are put in.",
        *(f"- {row.case.label}: {row.reason}" for row in rows if not row.green),
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]) + "\n"  # fmt: skip


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "schema": 1,
        "green": all(row.green for row in rows),
        "tolerances": TOLERANCES,
        "rows": [
            {
                "layout": row.case.layout.name,
                "accumulation": row.case.accumulation,
                "activation_checkpointing": row.case.activation_checkpointing,
                "max_grad_norm": row.case.max_grad_norm,
                "green": row.green,
                "error": row.error,
                "seconds": row.seconds,
                "differences": {
                    kind: {"value": json_safe(difference.value), "where": difference.where}
                    for kind, difference in (row.found or {}).items()
                },
            }
            for row in rows
        ],
        "hardware": hardware(),
        "versions": versions(),
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [layout.name for layout in LAYOUTS]
    parser = argparse.ArgumentParser(
        prog="python -m train.parity",
        description=f"Train {STEPS} steps on every layout, with and without activation checkpointing and clipping, "
        "and compare each run with stock GPT-2 in float64. Exit code 1 when a run differs or fails.",
        epilog=f"example:\n  {EXAMPLE}\n\nOn two cores all of it takes half an hour.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layouts", nargs="+", choices=names, default=names, metavar="LAYOUT", help=f"some of {', '.join(names)}"
    )
    parser.add_argument(
        "--accumulation",
        nargs="+",
        type=int,
        choices=(1, 2, 4, 8),  # each divides the global batch on four processes
        default=[1, 2, 8],
        metavar="MICRO_BATCHES",
        help="micro-batches per step, some of 1, 2, 4, 8 (default: 1 2 8)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write parity.json and parity.md here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    layouts = [layout for layout in LAYOUTS if layout.name in arguments.layouts]
    if arguments.out is not None:  # now, not when all is done and cannot be written
        if arguments.out.exists() and not arguments.out.is_dir():
            raise UserError(f"--out {arguments.out} is a file: give a folder")
        arguments.out.mkdir(parents=True, exist_ok=True)
    silence_third_party_warnings()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the run and its folder would stay behind
    accumulations = sorted(set(arguments.accumulation))
    rows = certify([Case(*case) for case in product(layouts, accumulations, (False, True), (False, True))])
    if arguments.out is not None:
        write_json(arguments.out / "parity.json", as_json(rows))
        write_text(arguments.out / "parity.md", report(rows))
    print(f"{table(rows)}\n\n{verdict(rows)}")
    if not all(row.green for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
