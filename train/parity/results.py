"""The result of each run of the parity test, and its table, report and JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.metrics.hardware import hardware, versions
from train.parity.differences import TOLERANCES, Difference, is_green
from train.parity.layouts import Case
from train.parity.reference import SEQUENCES, STEPS
from train.utils.files import json_safe
from train.utils.tables import markdown_table


@dataclass(frozen=True)
class Result:
    """The differences of a case from the reference, or the reason why there are none."""

    case: Case
    seconds: float
    found: dict[str, Difference] | None
    error: str | None = None

    @property
    def green(self) -> bool:
        return self.found is not None and is_green(self.found)

    @property
    def reason(self) -> str:
        """Why the result is red."""
        if self.found is None:
            return self.error or ""
        return "; ".join(
            f"{kind} {self.found[kind].value:.1e} (at most {tolerance:.0e}) at {self.found[kind].where}"
            for kind, tolerance in TOLERANCES.items()
            if not self.found[kind].value <= tolerance
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "layout": self.case.layout_name,
            "accumulation": self.case.accumulation,
            "activation_checkpointing": self.case.activation_checkpointing,
            "max_grad_norm": self.case.max_grad_norm,
            "green": self.green,
            "error": self.error,
            "seconds": self.seconds,
            "differences": json_safe({kind: asdict(difference) for kind, difference in (self.found or {}).items()}),
        }


def table(results: Sequence[Result]) -> str:
    """A line for each layout with the largest difference of its runs in each column, under the tolerances."""
    lines = [["tolerance", "", *(f"{tolerance:.0e}" for tolerance in TOLERANCES.values()), ""]]
    for layout in dict.fromkeys(result.case.layout_name for result in results):
        own = [result for result in results if result.case.layout_name == layout]
        compared = [result.found for result in own if result.found is not None]
        values = [max((found[kind].value for found in compared), default=None) for kind in TOLERANCES]
        red = sum(not result.green for result in own)
        cells = ["-" if value is None else f"{value:.1e}" for value in values]
        lines.append([layout, str(len(own)), *cells, f"{red} RED" if red else "green"])
    return markdown_table(["layout", "runs", *(kind.replace("_", " ") for kind in TOLERANCES), "verdict"], lines)


def verdict(results: Sequence[Result]) -> str:
    red = sum(not result.green for result in results)
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
        *(f"- {result.case.label}: {result.reason}" for result in results if not result.green),
        ", ".join(f"{name} {version}" for name, version in versions().items()),
    ]) + "\n"  # fmt: skip


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    """The content of parity.json."""
    return {
        "schema": 1,
        "green": all(result.green for result in results),
        "tolerances": TOLERANCES,
        "rows": [result.as_json() for result in results],
        "hardware": hardware(),
        "versions": versions(),
    }
