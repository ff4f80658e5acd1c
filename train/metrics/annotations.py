"""The names in a profile's trace: what `train.run.profiling` and the engines write and `train.kernels` reads.

A phase is a plain word; a part of the model is "kind: module", for example "attention: transformer.h.3.attn"; what a
process of a pipeline does for one of its stages is in "stage: 1".
"""

from typing import Literal, get_args

from torch.profiler import record_function

Phase = Literal["data", "forward", "backward", "optimizer", "communication", "checkpoint", "validation"]
PHASES: tuple[str, ...] = get_args(Phase)
KINDS = ("attention", "mlp", "loss", "module")
LOSS = "loss: loss"


def region(phase: Phase) -> record_function:
    """A context, or a decorator, that a trace shows under the name of a phase."""
    return record_function(phase)


def stage_region(stage: int) -> str:
    """The region of what a process of a pipeline does for one of its stages."""
    return f"stage: {stage}"


def stage_of(region_name: str) -> int | None:
    """The stage in a region's name; None where the name is not one of `stage_region`'s."""
    kind, _, number = region_name.partition(": ")
    return int(number) if kind == "stage" and number.isdecimal() else None


def module_region(name: str) -> str:
    """The region of a module, given its full name in the model."""
    kind = {"attn": "attention", "mlp": "mlp"}.get(name.rpartition(".")[2], "module")
    return f"{kind}: {name}"


def module_of(region_name: str) -> str | None:
    """The module in a region's name; None where the name is not one of `module_region`'s (or `LOSS`)."""
    kind, separator, name = region_name.partition(": ")
    return name if separator and kind in KINDS else None
