"""What differs between a checkpoint's run and the run that resumes it, and what each difference changes.

Both are given as facts by name: the resolved flags, "max_steps" as the number of all steps, "val_data" as what tells
the validation file from others, and `SETTING`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.optim.schedule import default_warmup_steps, learning_rate
from train.utils.tables import markdown_table

# Flags that decide the learning rate of each step; whether it differs is computed from them.
RATE = ("learning_rate", "lr_schedule", "max_steps", "warmup_steps", "min_learning_rate_ratio")
CURVE = ("weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "dropout")
GUARD = ("on_nonfinite", "on_spike")  # a run that the guard has stopped continues with another of them
VALIDATION = ("val_data", "eval_steps")  # what the validation losses are measured on
# Facts that are not flags, or whose flag may be "auto".
PACKAGES = ("torch", "transformers", "deepspeed", "gpt2flash")
SETTING = ("processes", "sharding", "stage_bounds", "attention", "precision", *PACKAGES)
# The masks of dropout belong to a micro-batch in a stage; how they are drawn, to the kernels.
MASKS = (
    "train_micro_batch_size_per_gpu",
    "stage_bounds",
    "attention",
    "mixed_precision",
    "precision",
    "torch_compile",
    *PACKAGES,
)
ROUNDING = (
    "pipeline_stages",
    "pipeline_schedule",
    "gradient_accumulation_steps",
    "loss_chunk_size",
    "activation_checkpointing",
    "activation_checkpointing_interval",
    "processes",
    "sharding",
)
SAMPLES = 1000  # of the steps to come, whose learning rates are compared: a schedule is smooth


@dataclass(frozen=True)
class Change:
    """A fact that differs."""

    name: str
    before: Any
    after: Any
    effect: str
    # Whether the losses, or the validations that the run chooses by, differ from those of the checkpoint's run.
    breaks_curve: bool = False


def changes(before: Mapping[str, Any], after: Mapping[str, Any], step: int) -> list[Change]:
    """What differs, resumed after `step` steps."""
    before, after = with_warmup(before), with_warmup(after)
    differing = [name for name in after if before[name] != after[name]]
    rates_differ = any(name in RATE for name in differing) and first_other_rate(before, after, step) is not None
    chooses = bool(after.get("keep_best") or after.get("early_stopping_patience"))
    validation = "the validations" + ", from which the run chooses its best checkpoint or its end" * chooses
    masks = "rounding, and dropout's masks" if after.get("dropout") else "rounding"
    effects = (
        (RATE, "the rates of later steps" if rates_differ else "no rate of a later step", rates_differ),
        (CURVE, "the updates", True),
        (GUARD, "the next such steps", False),
        (VALIDATION, validation, chooses),
        (MASKS, masks, False),
        (ROUNDING, "rounding", False),
    )
    return [
        Change(name, before[name], after[name], effect, breaks)
        for names, effect, breaks in effects
        for name in names
        if name in differing
    ]


def with_warmup(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a run with the number of warm-up steps that no flag has given."""
    given = facts["warmup_steps"]
    return {**facts, "warmup_steps": default_warmup_steps(facts["max_steps"]) if given is None else given}


def first_other_rate(
    before: Mapping[str, Any], after: Mapping[str, Any], step: int
) -> tuple[int, float, float] | None:
    """(step, its rate before, its rate now) of the first step to come whose learning rate differs; None if none does.

    Of a run that was finished, its last step counts: a longer run would have had another rate there if it decays.
    """
    start, end = min(step, before["max_steps"] - 1), max(before["max_steps"], after["max_steps"])
    for each in range(start, end, max(1, (end - start) // SAMPLES)):
        was, now = rate(before, each), rate(after, each)
        if was != now:
            return each + 1, was, now
    return None


def rate(facts: Mapping[str, Any], step: int) -> float:
    return learning_rate(
        step,
        peak=facts["learning_rate"],
        total_steps=facts["max_steps"],
        warmup_steps=facts["warmup_steps"],
        min_ratio=facts["min_learning_rate_ratio"],
        schedule=facts["lr_schedule"],
    )


def table(found: Sequence[Change], before: str = "checkpoint", after: str = "this run") -> str:
    rows = [[each.name, str(each.before), str(each.after), each.effect] for each in found]
    return markdown_table(["differs", before, after, "which changes"], rows)


def refusal(found: Sequence[Change], before: Mapping[str, Any], after: Mapping[str, Any], step: int) -> str | None:
    """Why a run with these changes is not resumed, and the two remedies; None if its losses stay the same."""
    breaking = [each for each in found if each.breaks_curve]
    if not breaking:
        return None
    why = ""
    if any(each.name in RATE for each in breaking):
        other = first_other_rate(with_warmup(before), with_warmup(after), step)
        assert other is not None
        why = f"The learning rate of step {other[0]:,} would be {other[2]:.4g} and not {other[1]:.4g}. "
    if any(each.name == "max_steps" for each in breaking):
        why += "Warm-up and decay depend on the number of all steps. "
    old = f"give {' '.join(_as_before(each, before) for each in breaking)} as before, or "
    if step >= before["max_steps"]:  # with as many steps as before there is none left
        old = ""
    what = "the losses would differ from those of the original run"
    if all(each.name in VALIDATION for each in breaking):
        what = "the validations could not be compared with those of the original run"
    return f"with these flags {what}:\n{table(breaking)}\n{why}Remedy: {old}--allow_changes to resume anyway"


def _as_before(change: Change, before: Mapping[str, Any]) -> str:
    if change.name == "val_data":
        return f"--val_data_path {before['val_data_path']} with its content"
    return f"no --{change.name}" if change.before is None else f"--{change.name} {change.before}"
