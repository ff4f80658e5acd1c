"""Conditions that a run has to meet against the first, for continuous integration: "tokens_per_second>=1.2x"."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.checkpoints.run_folder import FinishedRun
from train.compare.figures import shown
from train.metrics.table import METRICS, Metric
from train.utils.errors import UserError

EXAMPLE = "tokens_per_second>=1.2x,val_loss<=+0.02,peak_memory<=0.8x"
NAMES = {metric.chart: metric for metric in METRICS if metric.chart}
NAMES |= {metric.key: metric for metric in METRICS if metric.kind != "text"}

NUMBER = r"\d+\.?\d*(?:[eE][+-]?\d+)?"
BOUND = rf"(?P<ratio>{NUMBER})x|(?P<difference>[+-]{NUMBER})|(?P<value>{NUMBER})"
CONDITION = re.compile(rf"(?P<metric>[a-z][\w.]*)\s*(?P<side>>=|<=)\s*(?:{BOUND})")


@dataclass(frozen=True)
class Condition:
    """One condition, parsed from its text.

    kind "ratio" (1.2x): that many times the first run's figure. "difference" (+0.02): the first run's figure and that
    much. "value" (4.5): the figure itself, in the unit of `metrics.json`.
    """

    text: str
    metric: Metric
    side: str
    kind: str
    bound: float


@dataclass(frozen=True)
class Result:
    """A condition checked for a run: what was found, in the condition's own terms; None for the reason `why`."""

    condition: Condition
    label: str
    found: float | None
    why: str

    @property
    def met(self) -> bool:
        if self.found is None:
            return False
        bound = self.condition.bound
        return self.found >= bound if self.condition.side == ">=" else self.found <= bound

    @property
    def sentence(self) -> str:
        form = {"ratio": "{:.6g}x", "difference": "{:+.6g}", "value": "{:.6g}"}[self.condition.kind]
        found = self.why if self.found is None else form.format(self.found + 0.0)
        return f"gate {'met' if self.met else 'MISSED'}: {self.condition.text}: {self.label} {found}"

    def as_json(self) -> dict[str, Any]:
        return {"condition": self.condition.text, "run": self.label, "found": self.found, "met": self.met}


def parse_gate(text: str) -> list[Condition]:
    """The conditions of `--gate`, in their order; a `UserError` names the first that is not one."""
    conditions = []
    for part in text.split(","):
        found = CONDITION.fullmatch(part.strip())
        if found is None:
            raise UserError(
                f'--gate: "{part.strip()}" is not a condition: write METRIC>=BOUND or METRIC<=BOUND, where BOUND is '
                f'1.2x (times the first run), +0.02 (more than the first run) or 4.5 (a value), as in "{EXAMPLE}"'
            )
        if found["metric"] not in NAMES:
            raise UserError(
                f"--gate: {found['metric']} is not a metric that can have a bound; there are {', '.join(NAMES)}"
            )
        kind = next(kind for kind in ("ratio", "difference", "value") if found[kind])
        bound = float(found[kind])
        if not math.isfinite(bound):
            raise UserError(f'--gate: "{part.strip()}": the bound is beyond what a number can hold')
        conditions.append(Condition(part.strip(), NAMES[found["metric"]], found["side"], kind, bound))
    return conditions


def check(
    conditions: Sequence[Condition], runs: Sequence[FinishedRun], differences: Sequence[Mapping[str, Any]]
) -> list[Result]:
    """Every condition against every run but the first. What is unknown or cannot be compared is missed, not met."""
    other_validation = {"val_data", "val_tokens"} & {difference["key"] for difference in differences}
    return [result(condition, runs[0], run, bool(other_validation)) for run in runs[1:] for condition in conditions]


def result(condition: Condition, first: FinishedRun, run: FinishedRun, other_validation: bool) -> Result:
    key, same = condition.metric.key, condition.metric.same
    before, after = first.get(key), run.get(key)
    if after is None:
        return Result(condition, run.label, None, f"has no {key}")
    if condition.kind == "value":
        return Result(condition, run.label, after, "")
    if before is None or (before == 0 and condition.kind == "ratio"):
        return Result(condition, run.label, None, f"cannot be compared: {first.label}'s {key} is {shown(before)}")
    if same == "val_data" and other_validation:
        return Result(condition, run.label, None, "cannot be compared: the validation data differ")
    if same and first.get(same) != run.get(same):
        why = f"cannot be compared: {same} is {first.get(same)} and {run.get(same)}"
        return Result(condition, run.label, None, why)
    return Result(condition, run.label, after / before if condition.kind == "ratio" else after - before, "")
