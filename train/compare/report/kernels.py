"""The section of the report on where the time of a step goes, of runs that were profiled (train.kernels)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from train.checkpoints.run_folder import FinishedRun
from train.compare.charts import HEIGHT, INK, Chart, ChartRow, Keys, canvas, color_of, nothing, row_figure
from train.compare.figures import UNKNOWN
from train.compare.report.pipeline import pipeline_chart
from train.kernels.comparison import OPERATOR, SCOPE, changes, signed_milliseconds, speedup_sentence
from train.kernels.summary import Change, RunSummary
from train.metrics.units import milliseconds

SHOWN_ROWS = 12


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, the exact number, and its class in the style sheet."""

    text: str
    exact: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    header: list[Cell]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class KernelsSection:
    sentence: str
    note: str
    charts: list[Chart]
    title: str
    scopes: Table
    operators: Table


def kernels_section(runs: Sequence[FinishedRun], kernels: Sequence[RunSummary | None]) -> KernelsSection | None:
    """The section, from each run's `kernels.comparison.read_profile`; None where no run was profiled."""
    numbered = [
        (index, replace(found, label=run.label))
        for index, (run, found) in enumerate(zip(runs, kernels, strict=True))
        if found
    ]
    if not numbered:
        return None
    profiled = [found for _, found in numbered]
    steps = ", ".join(f"{run.label} {milliseconds(run.step_seconds)} ms" for run in profiled)
    note = f"Means of the profiled steps, the profiler's own overhead included: {steps}. "
    missing = [run.label for run, found in zip(runs, kernels, strict=True) if not found]
    note += f"Not profiled: {', '.join(missing)}." if missing else ""
    charts = [categories_chart(numbered), roofline_chart(numbered)]
    charts += [pipeline_chart(run.label, run.pipeline) for run in profiled if run.pipeline]
    title = "What made the difference, in ms a step" if len(profiled) > 1 else "What takes longest, in ms a step"
    return KernelsSection(
        speedup_sentence(profiled), note, charts, title, scopes_table(profiled), operators_table(profiled)
    )


def legend(kernels: Sequence[tuple[int, RunSummary]]) -> Keys:
    return [(index, run.label) for index, run in kernels]


def categories_chart(kernels: Sequence[tuple[int, RunSummary]]) -> Chart:
    """A row for each kind of work, of runs with their numbers."""
    rows = []
    found = changes([run for _, run in kernels], "category")
    for change in sorted(found, key=lambda change: -max(each or 0.0 for each in change.seconds)):
        values = [seconds or 0.0 for seconds in change.seconds]
        bars = [(index, value) for (index, _), value in zip(kernels, values, strict=True)]
        rows.append(ChartRow(change.category, " · ".join(map(milliseconds, values)) + " ms", bars))
    note = "by kind of work, lower is better"
    return Chart("Where a step's time goes", note, row_figure(rows) if rows else nothing(), legend(kernels), "bar")


def roofline_chart(kernels: Sequence[tuple[int, RunSummary]]) -> Chart:
    """FLOP/s over FLOPs per byte, both in decades, under the peak FLOP/s and bytes/s of the device."""
    peaks = [(run.facts.peak_flops, run.facts.peak_bytes_per_second) for _, run in kernels]
    peak = next(((flops, moved) for flops, moved in peaks if flops and moved), None)
    note = "operators by FLOPs per byte moved; larger: more of a step's time"
    note += "; the line: the device's peak" if peak else "; the device's peak is not known"
    points = [
        (index, max(0.0, row.seconds / run.step_seconds), row) for index, run in kernels for row in run.roofline_points
    ]
    if not points:
        return Chart("Roofline", note, nothing(), legend(kernels))
    left, right = decades([row.intensity or 0.0 for *_, row in points])
    bottom, top = decades([row.flops_per_second or 0.0 for *_, row in points] + ([peak[0]] if peak else []))
    figure, axes = canvas(HEIGHT, x_title="FLOPs per byte, against GFLOP/s")
    axes.set(xscale="log", yscale="log", xlim=(10.0**left, 10.0**right), ylim=(10.0**bottom, 10.0**top))
    axes.set_xticks([10.0**power for power in range(left, right + 1)])
    axes.set_yticks([10.0**power for power in range(bottom, top + 1)])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e9:g}")
    if peak:
        ridge = peak[0] / peak[1]
        axes.plot([10.0**left, ridge, 10.0**right], [peak[1] * 10.0**left, *[peak[0]] * 2], color=INK, linewidth=1.5)
    tooltips: dict[str, str] = {}
    for index, share, row in sorted(points, key=lambda point: -point[1]):
        gid = f"operator-{len(tooltips)}"
        rate = (row.flops_per_second or 0.0) / 1e9
        tooltips[gid] = f"{row.work_in_module}: {rate:,.1f} GFLOP/s, {share:.1%} of a step"
        axes.plot(row.intensity or 0.0, row.flops_per_second or 0.0, "o", color=color_of(index), alpha=0.55, gid=gid,
                  markersize=6 + 40 * math.sqrt(share), markeredgewidth=0, clip_on=False)  # fmt: skip
    return Chart("Roofline", note, figure, legend(kernels), tooltips=tooltips)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around some positive numbers, at least one apart."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def scopes_table(kernels: Sequence[RunSummary]) -> Table:
    """The runs aligned by module, phase and category, which are the same whichever kernels do the work."""
    header = [Cell("work"), Cell(kernels[0].label)]
    for run in kernels[1:]:
        header += [Cell(run.label), Cell("saved"), Cell("share of gain")]
    header += [Cell("launches"), Cell("most of it in", kind="wide")]
    rows = []
    for change in changes(kernels, *SCOPE)[:SHOWN_ROWS]:
        shares = [Cell(UNKNOWN if share is None else f"{share:.1%}") for share in change.share_of_gain]
        largest = dict.fromkeys(names[0] if names else "nothing" for names in change.largest)
        row = [Cell(change.scope), *time_cells(change, shares)]
        row += [Cell(" → ".join(f"{count:,.0f}" for count in change.launches)), Cell(" → ".join(largest), kind="wide")]
        rows.append(row)
    return Table(header, rows)


def operators_table(kernels: Sequence[RunSummary]) -> Table:
    """The same by operator and kernel."""
    header = [Cell("operator"), Cell(kernels[0].label)]
    header += [cell for run in kernels[1:] for cell in (Cell(run.label), Cell("saved"))]
    found = changes(kernels, *OPERATOR)[:SHOWN_ROWS]
    return Table(header, [[Cell(change.work_in_module), *time_cells(change)] for change in found])


def time_cells(change: Change, *more: Sequence[Cell]) -> list[Cell]:
    """The first run's time, and for each other run its time, what it saves, and a cell of each of `more`."""
    times = [Cell(UNKNOWN if seconds is None else milliseconds(seconds), seconds) for seconds in change.seconds]
    saved = [
        Cell(signed_milliseconds(seconds), seconds, "good" if seconds > 0 else "bad" if seconds < 0 else "")
        for seconds in change.saved_seconds
    ]
    return times[:1] + [cell for cells in zip(times[1:], saved, *more, strict=True) for cell in cells]
