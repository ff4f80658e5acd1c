"""The layouts and settings that the parity test trains with, as commands of this trainer."""

from dataclasses import dataclass, replace
from pathlib import Path

from train.parity.reference import CLIP, SEQUENCES, flags
from train.plan.shapes import Layout

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
