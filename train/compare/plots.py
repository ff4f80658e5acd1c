"""The five pictures of a comparison, as PNG bytes."""

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from train.checkpoints.run_folder import FinishedRun as Run
from train.metrics.units import short_count, times, unit_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = np.ndarray[Any, np.dtype[np.float64]]

# Okabe and Ito's palette: told apart with every common form of colour blindness, and by lightness in grey print.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
DASHES = ["-", "--", "-.", ":"]  # runs that agree lie on each other: the lower one shows through the gaps


def draw(runs: Sequence[Run]) -> dict[str, bytes]:
    """File name → PNG."""
    return {
        "throughput.png": picture(runs, draw_throughput),
        "training_loss.png": picture(runs, draw_training_loss),
        "validation_loss.png": picture(runs, draw_validation_loss),
        "time_per_epoch.png": picture(runs, draw_time_per_epoch, bars=True),
        "peak_memory.png": picture(runs, draw_peak_memory, bars=True),
    }


def picture(runs: Sequence[Run], drawing: Callable[["Axes", Sequence[Run]], None], bars: bool = False) -> bytes:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display, Agg for PNG

    figure = Figure(figsize=(8, 1.5 + 0.55 * len(runs) if bars else 4.5), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    drawing(axes, runs)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if bars else "both", alpha=0.25)
    axes.set_axisbelow(True)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


# Series


def series(run: Run, key: str) -> Curve:
    """One value a step; null (a loss that was not a number) as NaN, which leaves a gap in a curve."""
    values = [record.get(key) for record in run.steps]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def smoothing_window(steps: int) -> int:
    """Steps in the trailing mean: a fiftieth of the run, so that the smoothing looks alike at every length."""
    return max(1, min(200, steps // 50))


def trailing_mean(values: Curve, window: int) -> Curve:
    """Mean of each value and those before it, `window` at most; NaN counts for nothing, a window of NaN is NaN.

    Trailing, not centred: a curve must not know its future.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    number = counts[ends] - counts[starts]
    return np.where(number > 0, (sums[ends] - sums[starts]) / np.maximum(number, 1), math.nan)


def limits(values: Sequence[float]) -> tuple[float, float] | None:
    """Lowest and highest finite value with a margin of 5 %; None if there is none to show."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


# Curves


def draw_throughput(axes: "Axes", runs: Sequence[Run]) -> None:
    highest = 0.0
    for index, run in enumerate(runs):
        steps, values = series(run, "step"), series(run, "tokens_per_second")
        mean = run.get("tokens_per_second")
        label = plain(run.label) + ("" if mean is None else f" ({mean:,.0f} overall)")
        raw_and_smooth(axes, steps, values, smoothing_window(len(values)), index, label)
        finite = values[np.isfinite(values)]
        highest = max(highest, float(np.percentile(finite, 99)) if len(finite) else 0.0)
    axes.set_ylim(0, 1.15 * highest or 1.0)
    finish(axes, "Training throughput", "optimizer step", "tokens per second", highest > 0)
    axes.yaxis.set_major_formatter(short_count)
    axes.xaxis.set_major_formatter(short_count)


def draw_training_loss(axes: "Axes", runs: Sequence[Run]) -> None:
    shown: list[float] = []
    highest = -math.inf
    windows = []
    for index, run in enumerate(runs):
        values = series(run, "loss")
        windows.append(smoothing_window(len(values)))
        raw_and_smooth(axes, series(run, "tokens"), values, windows[-1], index, plain(run.label))
        # The fall from ln(vocabulary) in the first steps would flatten everything after it: let it leave the picture.
        shown += list(values[len(values) // 20 :])
        highest = max([highest, *values[np.isfinite(values)]])
    span = limits(shown)
    title = "Training loss"
    if max(windows) > 1:
        counts = "/".join(str(window) for window in dict.fromkeys(windows))
        title += f" (faint: each step, strong: mean of the last {counts} steps)"
    if span is not None:
        axes.set_ylim(*span)
        if highest > span[1]:
            axes.annotate(
                f"starts at {highest:.1f}, above the axis",
                (0.25, 0.97),
                xycoords="axes fraction",
                va="top",
                fontsize=8,
                color="0.35",
            )
    finish(axes, title, "training tokens", "cross-entropy (nats per token)", span is not None)
    axes.xaxis.set_major_formatter(short_count)


def draw_validation_loss(axes: "Axes", runs: Sequence[Run]) -> None:
    drawn: list[float] = []
    for index, run in enumerate(runs):
        tokens, values = series(run, "tokens"), series(run, "val_loss")
        there = np.isfinite(values)
        label = plain(run.label) + ("" if there.any() else " (no validation)")
        axes.plot(tokens[there], values[there], marker=MARKERS[index % 7], markersize=5, label=label, **stroke(index))
        drawn += list(values[there])
    span = limits(drawn)
    if span is not None:
        axes.set_ylim(*span)
    finish(axes, "Validation loss", "training tokens", "cross-entropy (nats per token)", span is not None)
    axes.xaxis.set_major_formatter(short_count)


def raw_and_smooth(
    axes: "Axes",
    x: Curve,
    values: Curve,
    window: int,
    index: int,
    label: str,
) -> None:
    smooth = trailing_mean(values, window)
    if window > 1:
        axes.plot(x, values, linewidth=0.7, alpha=0.3, color=COLOURS[index % 7])
    marker = MARKERS[index % 7] if len(values) < 2 else ""  # a single point draws no line
    axes.plot(x, smooth, label=label, marker=marker, **stroke(index))


# Bars


def draw_time_per_epoch(axes: "Axes", runs: Sequence[Run]) -> None:
    draw_bars(axes, runs, "time_per_epoch_seconds", "seconds", "Time per epoch (less is better)", "time for one epoch")


def draw_peak_memory(axes: "Axes", runs: Sequence[Run]) -> None:
    names = {"rss": "resident memory of a process", "cuda_allocated": "GPU memory in tensors"}
    kinds = dict.fromkeys(run.get("peak_memory_kind") for run in runs)
    what = ", ".join(names.get(kind, kind) for kind in kinds)
    draw_bars(axes, runs, "peak_memory_bytes", "bytes", "Peak memory (less is better)", what, same=len(kinds) == 1)


def draw_bars(
    axes: "Axes", runs: Sequence[Run], key: str, kind: str, title: str, quantity: str, same: bool = True
) -> None:
    values = [run.get(key) for run in runs]
    largest = max([value for value in values if value is not None], default=0.0)
    divisor, unit, decimals = unit_of(kind, largest)
    for index, value in enumerate(values):
        axes.barh(index, (value or 0) / divisor, height=0.62, color=COLOURS[index % 7])
        text = "not measured" if value is None else f"{value / divisor:,.{decimals}f} {unit}"
        if index > 0 and same and value is not None and values[0]:
            text += f" ({times(value / values[0])})"
        axes.annotate(text, ((value or 0) / divisor, index), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(runs)), [plain(run.label) for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * largest / divisor or 1.0)  # room for the numbers
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(f"{quantity} ({unit})")


# Lettering


def finish(axes: "Axes", title: str, x: str, y: str, anything: bool) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False)
    if not anything:
        axes.annotate("nothing was measured", (0.5, 0.5), xycoords="axes fraction", ha="center")


def stroke(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % 7], "linestyle": DASHES[index % 4], "linewidth": 1.8}


def plain(label: str) -> str:
    """A label as it stands: no formula between dollar signs, and no leading underscore, which legends leave out."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")
