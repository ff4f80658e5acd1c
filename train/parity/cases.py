"""The runs of the parity test: layouts and settings as commands of this trainer, each in processes of its own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from train.parity.reference import CLIP, SEQUENCES, flags
from train.plan.shapes import Layout
from train.utils import devices

RUN_LIMIT = 900  # seconds after which a run counts as hanging
STOP_LIMIT = 30  # seconds that a launcher has to stop its processes
LAYOUTS = {
    "single": Layout("single", 1),
    "ddp-x2": Layout("ddp", 2),
    "ddp-x4": Layout("ddp", 4),
    "zero1-x2": Layout("zero", 2, zero_stage=1),
    "zero2-x2": Layout("zero", 2, zero_stage=2),
    "zero3-x2": Layout("zero", 2, zero_stage=3),
    "fsdp2-x2": Layout("fsdp2", 2),
    "pp2": Layout("zero", 2, zero_stage=1, stages=2),
    "pp4": Layout("zero", 4, zero_stage=1, stages=4),
    "pp2-dp2": Layout("zero", 4, zero_stage=1, stages=2),
}


@dataclass(frozen=True)
class Case:
    """One run of the parity test."""

    layout_name: str  # of `LAYOUTS`
    accumulation: int
    activation_checkpointing: bool
    clipping: bool

    @property
    def layout(self) -> Layout:
        layout = LAYOUTS[self.layout_name]
        return replace(
            layout,
            micro_batch=SEQUENCES // (self.accumulation * layout.data_parallel),
            accumulation=self.accumulation,
            activation_checkpointing="full" if self.activation_checkpointing else "none",
        )

    @property
    def max_grad_norm(self) -> float:
        return CLIP if self.clipping else 0.0

    @property
    def label(self) -> str:
        checkpointing = " checkpointing" if self.activation_checkpointing else ""
        return f"{self.layout_name} accumulation {self.accumulation}{checkpointing}{' clipping' * self.clipping}"

    def argv(self, problem: Path, out: Path) -> list[str]:
        """The command that trains this case on the files in `problem` and writes to `out`."""
        return [*self.layout.command, *flags(problem, self.max_grad_norm), f"--checkpoint_path={out}"]


def launch(argv: Sequence[str], log: Path) -> str | None:
    """Run a command on the CPU with its output in `log`; None if it succeeded, else its error in a line."""
    environment = {
        "OMP_NUM_THREADS": "1",  # several processes share few cores
        **os.environ,
        **devices.HIDE_ACCELERATORS,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            argv, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(RUN_LIMIT)
        except subprocess.TimeoutExpired:
            return f"it was not done after {RUN_LIMIT} seconds"
        finally:
            _stop(process)
    return None if code == 0 else f"exit code {code}: {error_line(log.read_text(errors='replace'))}"


def _stop(process: subprocess.Popen) -> None:
    """Terminate the launcher, which knows all its processes, and kill its process group if it does not exit."""
    process.terminate()
    try:
        process.wait(STOP_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def error_line(output: str) -> str:
    """The last line that names an error (launchers print more after it), else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\[rank\d+\]: ?)?([\w.]*(Error|Exception)|error)\b", line)]
    # The launchers' own errors only say that a process of theirs has failed.
    named = [line for line in named if "ChildFailedError" not in line and "CalledProcessError" not in line] or named
    return (named or lines or ["it printed nothing"])[-1]
