"""The annotations of a profile's trace, written by `train.run.profiling` and the engines and read by `train.kernels`.

A phase is a plain word; a module of the model is "kind: name", for example "attention: transformer.h.3.attn"; what a
process of a pipeline does for one of its stages is inside "stage: 1".
"""

from typing import Literal, get_args

from torch.profiler import record_function

Phase = Literal["data", "forward", "backward", "optimizer", "communication", "checkpoint", "validation"]
PHASES: tuple[str, ...] = get_args(Phase)
KINDS = ("attention", "mlp", "loss", "module")
LOSS = "loss: loss"


def annotate(phase: Phase) -> record_function:
    """Return a context manager, or decorator, that names a phase of the step in a trace."""
    return record_function(phase)


def stage_annotation(stage: int) -> str:
    """Return the annotation around what a process does for one of its pipeline stages."""
    return f"stage: {stage}"


def stage_of(annotation: str) -> int | None:
    """Return the stage that an annotation names, or None for any other annotation."""
    kind, _, number = annotation.partition(": ")
    return int(number) if kind == "stage" and number.isdecimal() else None


def module_annotation(name: str) -> str:
    """Return the annotation of a module, given its full name in the model."""
    kind = {"attn": "attention", "mlp": "mlp"}.get(name.rpartition(".")[2], "module")
    return f"{kind}: {name}"


def module_of(annotation: str) -> str | None:
    """Return the module (or the "loss" of `LOSS`) that an annotation names, or None for any other annotation."""
    kind, separator, name = annotation.partition(": ")
    return name if separator and kind in KINDS else None
