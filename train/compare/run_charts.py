"""The charts of finished runs: loss, throughput and the metrics that have a bar chart."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.checkpoints.run_folder import FinishedRun
from train.compare.charts import HEIGHT, Chart, ChartRow, canvas, color_of, nothing, row_figure, stroke
from train.compare.figures import change
from train.compare.intervals import spreads
from train.metrics.table import METRICS, Metric
from train.utils.units import in_unit, memory_kind_title, short_count, times, unit_of

Curve = np.ndarray[Any, np.dtype[np.float64]]

MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


# Series


def series(run: FinishedRun, key: str) -> Curve:
    """One value a step; null (a loss that was not a number) as NaN, which leaves a gap in a curve."""
    return np.array([record.get(key) for record in run.steps], dtype=np.float64)


def smoothing_steps(steps: int) -> int:
    """Steps in the trailing mean: a fiftieth of the run, so that the smoothing looks alike at every length."""
    return max(1, min(200, steps // 50))


def trailing_mean(values: Curve, steps: int) -> Curve:
    """Mean of each value and those before it, `steps` at most; NaN is left out, and the mean of NaN alone is NaN.

    Trailing, not centred: a curve must not know its future.
    """
    known = np.isfinite(values)
    numbers = np.where(known, values, 0.0)
    sums, counts = (np.convolve(each, np.ones(steps))[: len(values)] for each in (numbers, known))
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def limits(values: Sequence[float]) -> tuple[float, float] | None:
    """Lowest and highest finite value with a margin of 5 %; None if there is none to show."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


# The charts


def draw(runs: Sequence[FinishedRun]) -> list[Chart]:
    """Every chart of the runs' curves and figures."""
    elapsed = [np.cumsum(series(run, "step_time_seconds")) for run in runs]
    longest = max((float(np.nanmax(each)) for each in elapsed if np.isfinite(each).any()), default=0.0)
    divisor, unit, _ = unit_of("seconds", longest)
    over_time = loss_chart(runs, "Training loss over time", [x / divisor for x in elapsed], f"training time ({unit})")
    return [
        training_loss_chart(runs),
        over_time,
        validation_chart(runs),
        throughput_chart(runs),
        *intervals_charts(runs),
        *(metric_chart(runs, metric) for metric in METRICS if metric.chart),
    ]


def legend(runs: Sequence[FinishedRun]) -> list[tuple[int | str, str]]:
    return [(index, run.label) for index, run in enumerate(runs)]


def training_loss_chart(runs: Sequence[FinishedRun]) -> Chart:
    tokens = [series(run, "tokens") for run in runs]
    return loss_chart(runs, "Training loss over tokens", tokens, "training tokens", "training_loss")


def loss_chart(
    runs: Sequence[FinishedRun], title: str, across: Sequence[Curve], x_title: str, name: str = ""
) -> Chart:
    losses = [series(run, "loss") for run in runs]
    note = "cross-entropy, nats per token"
    if counts := [f"{steps}" for each in losses if (steps := smoothing_steps(len(each))) > 1]:
        note += f"; strong: mean of {'/'.join(dict.fromkeys(counts))} steps"
    # The fall from ln(vocabulary) in the first steps would flatten everything after it: it leaves the picture.
    span = limits([loss for each in losses for loss in each[len(each) // 20 :]])
    highest = max((float(each[0]) for each in losses if len(each) and math.isfinite(each[0])), default=-math.inf)
    if span and highest > span[1]:
        note += f"; starts at {highest:.1f}, above the axis"
    return curves_chart(runs, title, note, list(zip(across, losses, strict=True)), x_title, span, name)


def validation_chart(runs: Sequence[FinishedRun]) -> Chart:
    points = [(series(run, "tokens"), series(run, "val_loss")) for run in runs]
    points = [(tokens[np.isfinite(losses)], losses[np.isfinite(losses)]) for tokens, losses in points]
    span = limits([loss for _, losses in points for loss in losses])
    note = "cross-entropy, nats per token"
    return curves_chart(runs, "Validation loss", note, points, "training tokens", span, "validation_loss", marks=True)


def throughput_chart(runs: Sequence[FinishedRun]) -> Chart:
    rates = [series(run, "tokens_per_second") for run in runs]
    known = [each[np.isfinite(each)] for each in rates]
    highest = max((float(np.percentile(each, 99)) for each in known if len(each)), default=0.0)
    curves = [(series(run, "step"), each) for run, each in zip(runs, rates, strict=True)]
    span = (0.0, 1.15 * highest) if highest else None
    note = "tokens per second, higher is better"
    return curves_chart(runs, "Throughput", note, curves, "optimizer step", span, "throughput")


def curves_chart(
    runs: Sequence[FinishedRun],
    title: str,
    note: str,
    curves: Sequence[tuple[Curve, Curve]],
    x_title: str,
    span: tuple[float, float] | None,
    name: str = "",
    marks: bool = False,
) -> Chart:
    """A curve for each run over a common axis from 0: raw values faint, their trailing mean strong.

    `span` None: there is nothing to show. `marks`: the points are few, each has a marker and is not smoothed.
    """
    if span is None or not any(np.isfinite(x).any() for x, _ in curves):
        return Chart(title, note, nothing(), legend(runs), name=name)
    figure, axes = canvas(HEIGHT, x_title=x_title)
    axes.xaxis.set_major_formatter(short_count)
    axes.yaxis.set_major_formatter(short_count)
    tooltips = {}
    for index, (x, y) in enumerate(curves):
        steps = 1 if marks else smoothing_steps(len(y))
        if steps > 1:
            axes.plot(x, y, color=color_of(index), linewidth=1, alpha=0.3, zorder=1.5)
            y = trailing_mean(y, steps)
        axes.plot(x, y, **stroke(index))
        there = np.isfinite(x) & np.isfinite(y)
        if marks or there.sum() == 1:  # a single point draws no line
            for place, point in enumerate(zip(x[there], y[there], strict=True)):
                tooltips[f"point-{index}-{place}"] = f"{point[1]:.6g}"
                axes.plot(*point, MARKERS[index % len(MARKERS)], color=color_of(index), markersize=7,
                          markeredgewidth=0, gid=f"point-{index}-{place}", clip_on=False)  # fmt: skip
    axes.set_ylim(*span)
    axes.set_xlim(0, max(float(np.nanmax(x)) for x, _ in curves if np.isfinite(x).any()) or 1.0)
    return Chart(title, note, figure, legend(runs), tooltips=tooltips, name=name)


def intervals_charts(runs: Sequence[FinishedRun]) -> list[Chart]:
    """The spread of throughput over intervals; none if every run is too short."""
    rows = []
    for index, run in enumerate(runs):
        if spread := spreads(run).get("tokens_per_second"):
            figure = f"{spread.median:,.0f} ({spread.low:,.0f} … {spread.high:,.0f}) tokens/s"
            rows.append(ChartRow(run.label, figure, [(index, value) for value in spread.values], dots=True))
    note = "a dot for each interval of steps, a stroke at their median"
    return [Chart("Throughput over intervals", note, row_figure(rows), ())] if rows else []


def metric_chart(runs: Sequence[FinishedRun], metric: Metric) -> Chart:
    """A bar for each run, with its change against the first."""
    values = [run.get(metric.key) for run in runs]
    largest = max((value for value in values if value is not None), default=0)
    rows = []
    for index, (run, value) in enumerate(zip(runs, values, strict=True)):
        figure = "not measured" if value is None else in_unit(metric.kind, value, largest)
        changed = change(metric, runs[0], run) if index else None
        figure += f" ({times(changed['ratio'])})" if changed else ""
        rows.append(ChartRow(run.label, figure, () if value is None else ((index, float(value)),)))
    note = {1: "higher is better", -1: "lower is better", 0: ""}[metric.better]
    if metric.same == "peak_memory_kind":
        kinds = dict.fromkeys(run.get(metric.same) for run in runs)
        note = f"{', '.join(map(memory_kind_title, kinds))}, {note}"
    return Chart(metric.title, note, row_figure(rows), (), name=metric.chart)
