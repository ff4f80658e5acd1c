"""The part of `report.html` that says what takes the memory, of runs with a `profile/memory.json` (`--profile`)."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from train.checkpoints.run_folder import FinishedRun
from train.compare.report.parts import card, legend, swatches, text
from train.compare.report.svg import HEIGHT, LEFT, PLOT_HEIGHT, PLOT_WIDTH, TOP, group_chart, nothing, picture, ticks
from train.metrics.memory_profile import CATEGORIES, MemoryProfile, Point
from train.metrics.units import in_unit, short_count, unit_of

LETTER = 8.5  # of a phase's name, as wide as on a phone


def memory_part(runs: Sequence[FinishedRun], memories: Sequence[MemoryProfile | None]) -> str:
    """The section of the report, from each run's `memory_profile.read_memory`; empty where none has one."""
    found = [
        (index, run.label, memory) for index, (run, memory) in enumerate(zip(runs, memories, strict=True)) if memory
    ]
    if not found:
        return ""
    largest = max(memory.peak_bytes for *_, memory in found)
    cards = [peak_card(found, largest), *(step_card(label, memory, largest) for _, label, memory in found)]
    return f'<h2>Memory</h2><div class="charts">{"".join(cards)}</div>'


def peak_card(found: Sequence[tuple[int, str, MemoryProfile]], largest: float) -> str:
    groups = []
    for name in CATEGORIES:
        values = [getattr(memory.at_peak, name) for *_, memory in found]
        groups.append((name, " · ".join(in_unit("bytes", value, largest) for value in values), values))
    peaks = ", ".join(f"{label} {in_unit('bytes', memory.peak_bytes, largest)}" for _, label, memory in found)
    labels = [(index, label) for index, label, _ in found]
    drawing = group_chart([index for index, _ in labels], groups)
    return card("What takes the memory", f"tensors at the peak of a profiled step: {peaks}", drawing, legend(labels))


def step_card(label: str, memory: MemoryProfile, largest: float) -> str:
    """What a step holds from its beginning to its end, in the colours of its categories; all runs have one scale."""
    title = f"Memory over a step: {label}"
    key = swatches([(f"run{colour}", name) for colour, name in enumerate(CATEGORIES)])
    note = f"{unit_of('bytes', largest)[1]} of tensors, by what they are for"
    return card(title, note, step_chart(title, memory.over_step, largest), key)


def step_chart(name: str, points: Sequence[Point], largest: float) -> str:
    """Categories on one another over the points of a step, whose phases stand below."""
    if not points or largest <= 0:
        return nothing(name)
    divisor = unit_of("bytes", largest)[0]
    edges = LEFT + np.arange(len(points) + 1) / len(points) * PLOT_WIDTH
    bottom = TOP + PLOT_HEIGHT
    parts = []
    for value in ticks(0, largest / divisor):
        y = bottom - value * divisor / largest * PLOT_HEIGHT
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{LEFT + PLOT_WIDTH}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{short_count(value)}</text>')
    held = np.array([[getattr(point, category) for category in CATEGORIES] for point in points]).cumsum(axis=1)
    heights = bottom - held / largest * PLOT_HEIGHT
    below = np.full(len(points), float(bottom))
    for colour, category in enumerate(CATEGORIES):
        most = max(getattr(point, category) for point in points)
        area = stairs(edges, heights[:, colour]) + stairs(edges[::-1], below[::-1]).replace("M", "L", 1) + "Z"
        said = f"{category}: {in_unit('bytes', most, largest)} at most"
        parts.append(f'<path class="bar run{colour}" d="{area}"><title>{text(said)}</title></path>')
        below = heights[:, colour]
    first = 0
    for phase, own in groupby(point.phase for point in points):
        last = first + len(list(own))
        left, right = edges[first], edges[last]
        parts.append(f'<path class="axis" d="M{left:.1f} {bottom}V{bottom + 6}M{left:.1f} {bottom}H{right:.1f}"/>')
        if right - left >= LETTER * len(phase):
            place = f'x="{(left + right) / 2:.1f}" y="{bottom + 17}" text-anchor="middle"'
            parts.append(f"<text {place}>{text(phase)}</text>")
        first = last
    return picture(name, HEIGHT - 20, parts)


def stairs(edges: np.ndarray, heights: np.ndarray) -> str:
    """A path that goes along at each height from one edge to the next."""
    steps = (f"V{height:.1f}H{right:.1f}" for height, right in zip(heights, edges[1:], strict=True))
    return f"M{edges[0]:.1f} {heights[0]:.1f}{''.join(steps)}"
