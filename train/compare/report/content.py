"""What a report says: `comparison.json`, and what the templates of the page and of the Markdown show of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from train.checkpoints.run_folder import FinishedRun
from train.compare.charts import Chart, clean, page_color
from train.compare.figures import (
    NOT_COMPARABLE,
    change,
    differing,
    figure_rows,
    intervals_note,
    is_good,
    shown,
    side_by_side,
    signed,
    written,
)
from train.compare.gate import Result
from train.compare.intervals import spreads
from train.compare.report.kernels import KernelsSection
from train.kernels.comparison import signed_milliseconds
from train.metrics.table import METRICS, Metric
from train.utils.tables import markdown_table
from train.utils.units import milliseconds, times, unit_of


@dataclass(frozen=True)
class Tile:
    question: str
    answer: str
    explanation: str
    good: bool | None


@dataclass(frozen=True)
class Report:
    """Finished runs, of which the first is the reference, with everything that was found out about them."""

    runs: Sequence[FinishedRun]
    differences: Sequence[Mapping[str, Any]]
    verdict: str
    warnings: Sequence[str]
    gate: Sequence[Result]
    charts: Sequence[Chart]
    kernels: KernelsSection | None
    memory_charts: Sequence[Chart]

    @property
    def labels(self) -> list[str]:
        return [run.label for run in self.runs]

    @property
    def critical(self) -> list[str]:
        return [line for line in self.warnings if line.startswith(NOT_COMPARABLE)]

    @property
    def note(self) -> str:
        return f"Changes are against {self.labels[0]}. {intervals_note(self.runs)}"

    def as_json(self) -> dict[str, Any]:
        """The content of `comparison.json`."""
        first, *others = self.runs
        return {
            "schema": 1,
            "verdict": self.verdict,
            "comparable": not self.critical,
            "differences": list(self.differences),
            "warnings": self.warnings,
            "first": first.label,
            "changes": {run.label: {metric.key: change(metric, first, run) for metric in METRICS} for run in others},
            "intervals": {run.label: {key: asdict(each) for key, each in spreads(run).items()} for run in self.runs},
            "gate": [result.as_json() for result in self.gate],
            "configuration_differences": {
                key: dict(zip(self.labels, values, strict=True))
                for key, values in differing(side_by_side(self.runs, "config")).items()
            },
            "runs": [{"label": run.label, "folder": str(run.folder), "summary": run.summary} for run in self.runs],
        }

    def figures_table(self) -> str:
        """The figures in Markdown."""
        header = [cell for label in self.labels for cell in (label, "change")]
        rows = []
        for row in figure_rows(self.runs):
            after = zip(row.cells[1:], row.changes, strict=True)
            rows.append([row.title, row.cells[0], *(cell for pair in after for cell in pair)])
        return markdown_table(["", header[0], *header[2:]], rows)

    def markdown(self) -> str:
        """The content of `report.md`."""

        def table(rows: Mapping[str, Sequence[Any]]) -> str:
            return markdown_table(["", *self.labels], [[key, *map(shown, values)] for key, values in rows.items()])

        return self._render("report.md.jinja", table=table, fence_of=fence_of, quoted=quoted)

    def html(self) -> str:
        """The page `report.html`, which carries the content of `comparison.json` for programs."""
        return self._render(
            "page.html.jinja",
            answers=[(run.label, tiles(self.runs[0], run, self.differences)) for run in self.runs[1:]],
            figure_rows=figure_rows(self.runs),
            shown=shown,
            page_color=page_color,
            milliseconds=milliseconds,
            signed_milliseconds=signed_milliseconds,
        )

    def _render(self, template: str, **context: Any) -> str:
        """A template of this folder; its values have no control characters, and are escaped in HTML."""
        from jinja2 import Environment, FileSystemLoader

        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
            finalize=lambda value: value if isinstance(value, Markup) else clean(value),
            trim_blocks=True,
            lstrip_blocks=True,
        )
        parts = {part: side_by_side(self.runs, part) for part in ("config", "model", "data", "hardware", "versions")}
        return environment.get_template(template).render(
            report=self, runs=self.runs, configuration=parts.pop("config"), parts=parts, differing=differing, **context
        )


def quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def fence_of(text: object) -> str:
    """A Markdown fence longer than any in the text, which a model may well have learned to generate."""
    fence = "```"
    while fence in f"{text}":
        fence += "`"
    return fence


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
