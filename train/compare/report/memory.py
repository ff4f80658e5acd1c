"""The charts of what takes the memory, of runs with a `profile/memory.json` (`--profile`)."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from train.checkpoints.run_folder import FinishedRun
from train.compare.charts import AXIS, HEIGHT, WIDTH, Chart, ChartRow, canvas, color_of, nothing, row_figure, write
from train.metrics.memory_profile import CATEGORIES, MemoryProfile, Point
from train.utils.units import in_unit, short_count, unit_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOTTOM = 22
LETTER = 8.5  # units of a letter of a phase's name, as wide as on a phone


def memory_charts(runs: Sequence[FinishedRun], memories: Sequence[MemoryProfile | None]) -> list[Chart]:
    """Categories at the peak of all profiled runs, and over a step of each; none where none was profiled."""
    found = [(index, run.label, each) for index, (run, each) in enumerate(zip(runs, memories, strict=True)) if each]
    if not found:
        return []
    largest = max(memory.peak_bytes for *_, memory in found)
    rows = []
    for name in CATEGORIES:
        values = [getattr(memory.at_peak, name) for *_, memory in found]
        figure = " · ".join(in_unit("bytes", value, largest) for value in values)
        rows.append(ChartRow(name, figure, [(index, value) for (index, *_), value in zip(found, values, strict=True)]))
    peaks = ", ".join(f"{label} {in_unit('bytes', memory.peak_bytes, largest)}" for _, label, memory in found)
    note = f"tensors at the peak of a profiled step: {peaks}"
    keys = [(index, label) for index, label, _ in found]
    at_peak = Chart("What takes the memory", note, row_figure(rows), keys, "bar")
    return [at_peak, *(step_chart(label, memory.over_step, largest) for _, label, memory in found)]


def step_chart(label: str, points: Sequence[Point], largest: float) -> Chart:
    """The bytes that a step holds from its beginning to its end, stacked by category; all runs have one scale."""
    divisor, unit, _ = unit_of("bytes", largest)
    note = f"{unit} of tensors, by what they are for"
    tooltips = {
        f"area-{name}": f"{name}: {in_unit('bytes', max(getattr(point, name) for point in points), largest)} at most"
        for name in CATEGORIES
        if points
    }
    figure = stacked_areas(points, largest, divisor) if points and largest > 0 else nothing()
    return Chart(f"Memory over a step: {label}", note, figure, list(enumerate(CATEGORIES)), "bar", tooltips)


def stacked_areas(points: Sequence[Point], largest: float, divisor: float) -> "Figure":
    figure, axes = canvas(HEIGHT - 20, bottom=BOTTOM)
    axes.set(xlim=(0, len(points)), ylim=(0, largest / divisor))
    axes.yaxis.set_major_formatter(short_count)
    edges = np.arange(len(points) + 1)
    tops = np.array([[getattr(point, name) for name in CATEGORIES] for point in points]).cumsum(axis=1) / divisor
    below = np.zeros(len(points))
    for color, name in enumerate(CATEGORIES):
        axes.stairs(tops[:, color], edges, baseline=below, fill=True, color=color_of(color), gid=f"area-{name}",
                    linewidth=0)  # fmt: skip
        below = tops[:, color]
    starts, units_per_point = [0], axes.get_position().width * WIDTH / len(points)
    for phase, own in groupby(point.phase for point in points):
        count = len(list(own))
        if count * units_per_point >= LETTER * len(phase):
            write(axes, starts[-1] + count / 2, -17 / (HEIGHT - 52), phase, ha="center",
                  transform=axes.get_xaxis_transform())  # fmt: skip
        starts.append(starts[-1] + count)
    axes.set_xticks(starts, [""] * len(starts))
    axes.tick_params(axis="x", length=6, color=AXIS)
    axes.grid(visible=False, axis="x")
    return figure
