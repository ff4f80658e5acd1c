"""The page `report.html`: its template `page.html.jinja` says what it looks like, and this module what is in it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from train.checkpoints.run_folder import FinishedRun
from train.compare.figures import change, figure_rows, flatten, is_good, shown, side_by_side, signed, written
from train.compare.report.content import PARTS, Report, render
from train.metrics.table import METRICS, Metric
from train.metrics.units import times, unit_of

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
ALWAYS_OPEN = ("hardware", "versions")


@dataclass(frozen=True)
class Tile:
    question: str
    answer: str
    explanation: str
    good: bool | None


@dataclass(frozen=True)
class Settings:
    """A mapping of every run side by side. What differs is visible, all of it one click away.

    A part where nothing differs is closed, unless it is `open`.
    """

    heading: str
    entries: str
    rows: list[tuple[str, list[str], bool]]
    """Key, a value for each run, and whether these differ."""
    open: bool = False

    @property
    def differing(self) -> bool:
        return any(differs for *_, differs in self.rows)


def page(report: Report) -> str:
    """The complete document. It carries the content of `comparison.json` for programs."""
    runs = report.runs
    return render(
        "page.html.jinja",
        policy=Markup(POLICY),
        report=report,
        runs=runs,
        answers=[(run.label, tiles(runs[0], run, report.differences)) for run in runs[1:]],
        figure_rows=figure_rows(runs),
        configuration=settings(runs, "Configuration", "config", "settings"),
        parts=[settings(runs, heading, key, "entries") for heading, key in PARTS],
        # The only text of the page that a browser does not parse as markup; "<" could end it.
        island=json.dumps(report.as_json(), ensure_ascii=False).replace("<", "\\u003c"),
    )


def tiles(first: FinishedRun, run: FinishedRun, differences: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """How much faster, in how much less memory, how good, and whether it is the same work."""
    differing = {entry["key"]: entry["values"] for entry in differences if entry["kind"] == "comparability"}
    answers = [tile(metric, first, run, metric.same not in differing) for metric in METRICS if metric.tile]
    other = [key for key, values in differing.items() if values[first.label] != values[run.label]]
    same = "same shape, data, seed and steps" if not other else "other " + ", ".join(other)
    return [*answers, Tile("Same model and work?", "No" if other else "Yes", same, False if other else None)]


def tile(metric: Metric, first: FinishedRun, run: FinishedRun, comparable: bool) -> Tile:
    """A metric as a ratio to the first run's, or as the difference, which is neither good nor bad by itself."""
    values = [first.get(metric.key), run.get(metric.key)]
    _, cells = written(metric, values)
    unit = unit_of(metric.kind, max((value for value in values if value is not None), default=0))[1]
    explanation = f"{cells[1]} against {cells[0]} {unit or 'nats per token'}"
    if metric.ratio:
        changed = change(metric, first, run)
        answer = times(changed["ratio"]) if changed else shown(None)
        return Tile(metric.tile, answer, explanation, is_good(metric, changed))
    known = None not in values and comparable
    return Tile(metric.tile, signed(values[1] - values[0]) if known else shown(None), explanation, None)


def settings(runs: Sequence[FinishedRun], heading: str, key: str, entries: str) -> Settings:
    table = side_by_side([flatten(run.summary[key]) for run in runs])
    rows = [
        (name, [shown(value) for value in values], any(value != values[0] for value in values))
        for name, values in table.items()
    ]
    return Settings(heading, entries, rows, key in ALWAYS_OPEN)
