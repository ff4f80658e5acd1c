"""The section of the report on where the time of a step goes, of runs that were profiled (train.kernels)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from train.checkpoints.run_folder import FinishedRun
from train.compare.charts import HEIGHT, INK, Chart, ChartRow, Keys, canvas, color_of, nothing, row_figure
from train.compare.report.pipeline import pipeline_chart
from train.kernels.comparison import OPERATOR, SCOPE, changes, speedup_sentence
from train.kernels.summary import Change, RunSummary
from train.utils.units import milliseconds

SHOWN_ROWS = 12


@dataclass(frozen=True)
class KernelsSection:
    labels: list[str]
    sentence: str
    note: str
    charts: list[Chart]
    title: str
    scopes: list[Change]
    """By module, phase and category, which are the same whichever kernels do the work."""
    operators: list[Change]


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
    title = "What made the difference, in ms per step" if len(profiled) > 1 else "What takes longest, in ms per step"
    return KernelsSection(
        labels=[run.label for run in profiled],
        sentence=speedup_sentence(profiled),
        note=note,
        charts=charts,
        title=title,
        scopes=changes(profiled, *SCOPE)[:SHOWN_ROWS],
        operators=changes(profiled, *OPERATOR)[:SHOWN_ROWS],
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
