"""The result of each run of the parity test, and its table, report and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from train.metrics.hardware import hardware, versions
from train.parity.cases import Case
from train.parity.differences import TOLERANCES, Difference
from train.parity.reference import SEQUENCES, STEPS
from train.utils.files import json_safe
from train.utils.tables import markdown_table


@dataclass(frozen=True)
class Result:
    """The differences of a case from the reference, or the error for which there are none."""

    case: Case
    seconds: float
    differences: dict[str, Difference] = field(default_factory=dict)
    error: str | None = None

    @property
    def reason(self) -> str:
        """Why the result is red; empty if it is green."""
        return self.error or "; ".join(
            f"{kind} {found.value:.1e} (at most {TOLERANCES[kind]:.0e}) at {found.where}"
            for kind, found in self.differences.items()
            if found.value > TOLERANCES[kind]
        )


def table(results: Sequence[Result]) -> str:
    """A line for each layout with the largest difference of its runs in each column, under the tolerances."""
    lines = [["tolerance", "", *(f"{tolerance:.0e}" for tolerance in TOLERANCES.values()), ""]]
    for layout in dict.fromkeys(result.case.layout_name for result in results):
        own = [result for result in results if result.case.layout_name == layout]
        compared = [result.differences for result in own if result.differences]
        cells = [f"{max(found[kind].value for found in compared):.1e}" if compared else "-" for kind in TOLERANCES]
        red = sum(bool(result.reason) for result in own)
        lines.append([layout, str(len(own)), *cells, f"{red} RED" if red else "green"])
    return markdown_table(["layout", "runs", *(kind.replace("_", " ") for kind in TOLERANCES), "verdict"], lines)


def verdict(results: Sequence[Result]) -> str:
    red = sum(bool(result.reason) for result in results)
    return f"{red} of {len(results)} runs are RED" if red else f"All {len(results)} runs are green"


def report(results: Sequence[Result]) -> str:
    """The content of parity.md."""
    return "\n\n".join([
        "# Parity",
        f"**{verdict(results)}**: {STEPS} steps of {SEQUENCES} sequences in fp32 over gloo, each run compared with "
        "stock GPT-2 in float64. The largest relative difference in each layout's runs, over all steps and tensors:",
        table(results),
        "Of the loss, the gradient's norm before clipping, each tensor's gradient after clipping, and each tensor's "
        "weights after each step. The biases of attention's keys, whose gradient is 0 but for rounding, are left out "
        "of gradient and weight; the column key bias is the change of the logits when they are put in.",
        *(f"- {result.case.label}: {result.reason}" for result in results if result.reason),
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]) + "\n"  # fmt: skip


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The content of parity.json."""
    rows = [
        {
            "layout": result.case.layout_name,
            "accumulation": result.case.accumulation,
            "activation_checkpointing": result.case.activation_checkpointing,
            "max_grad_norm": result.case.max_grad_norm,
            "green": not result.reason,
            "error": result.error,
            "seconds": result.seconds,
            "differences": {kind: asdict(found) for kind, found in result.differences.items()},
        }
        for result in results
    ]
    return json_safe({
        "schema": 1,
        "green": not any(result.reason for result in results),
        "tolerances": TOLERANCES,
        "rows": rows,
        "hardware": hardware(),
        "versions": versions(),
    })  # fmt: skip
