"""What a report says, whatever its format: the page, the Markdown and `comparison.json` are made from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from train.checkpoints.run_folder import FinishedRun
from train.compare.charts import Chart, clean
from train.compare.figures import (
    NOT_COMPARABLE,
    changes,
    configurations,
    figure_rows,
    flatten,
    intervals_note,
    shown,
    side_by_side,
    verdict,
    warnings,
)
from train.compare.gate import Result
from train.compare.intervals import spreads
from train.compare.report.kernels import KernelsSection
from train.utils.tables import markdown_table

PARTS = (("Model", "model"), ("Data", "data"), ("Hardware", "hardware"), ("Versions", "versions"))


@dataclass(frozen=True)
class Report:
    """Finished runs, of which the first is the reference, with everything that was found out about them."""

    runs: Sequence[FinishedRun]
    differences: Sequence[Mapping[str, Any]]
    gate: Sequence[Result]
    charts: Sequence[Chart]
    kernels: KernelsSection | None
    memory_charts: Sequence[Chart]

    @property
    def labels(self) -> list[str]:
        return [run.label for run in self.runs]

    @property
    def title(self) -> str:
        return "Comparison: " + " and ".join(self.labels)

    @property
    def verdict(self) -> str:
        return verdict(self.runs, self.differences)

    @property
    def warnings(self) -> list[str]:
        return warnings(self.runs, self.differences)

    @property
    def critical(self) -> list[str]:
        return [line for line in self.warnings if line.startswith(NOT_COMPARABLE)]

    @property
    def other_warnings(self) -> list[str]:
        return [line for line in self.warnings if not line.startswith(NOT_COMPARABLE)]

    @property
    def note(self) -> str:
        return f"Changes are against {self.labels[0]}. {intervals_note(self.runs)}"

    def as_json(self) -> dict[str, Any]:
        """The content of `comparison.json`."""
        return {
            "schema": 1,
            "verdict": self.verdict,
            "comparable": not self.critical,
            "differences": list(self.differences),
            "warnings": self.warnings,
            "first": self.labels[0],
            "changes": changes(self.runs),
            "intervals": {
                run.label: {key: spread.as_json() for key, spread in spreads(run).items()} for run in self.runs
            },
            "gate": [result.as_json() for result in self.gate],
            "configuration_differences": {
                key: dict(zip(self.labels, values, strict=True)) for key, values in configurations(self.runs).items()
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
        samples = [run.get("sample") or {} for run in self.runs]
        settings = {"config": self._settings_table(configurations(self.runs))}
        for _, key in PARTS:
            settings[key] = self._settings_table(side_by_side([flatten(run.summary[key]) for run in self.runs]))
        return render(
            "report.md.jinja",
            report=self,
            figures=self.figures_table(),
            settings=settings,
            parts=PARTS,
            prompts=[json.dumps(sample.get("prompt"), ensure_ascii=False) for sample in samples],
            fences=[_fence(f"{sample.get('text')}") for sample in samples],
        )

    def _settings_table(self, settings: Mapping[str, Sequence[Any]]) -> str:
        rows = [[key, *map(shown, values)] for key, values in settings.items()]
        return markdown_table(["", *self.labels], rows) if rows else ""


def _fence(text: str) -> str:
    """A Markdown fence longer than any in the text, which a model may well have learned to generate."""
    fence = "```"
    while fence in text:
        fence += "`"
    return fence


def render(template: str, **context: Any) -> str:
    """A template of this folder; its values have no control characters, and are escaped in HTML."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        finalize=lambda value: value if isinstance(value, Markup) else clean(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)
