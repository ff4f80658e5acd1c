"""Charts of a page as inline SVG. Shapes carry classes only: the page's style sheet colours them, light or dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from train.compare.plots import Curve, limits
from train.compare.report.parts import text
from train.metrics.units import short_count

# In units of the picture; the page scales it to the width that there is.
WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 42
PLOT_WIDTH, PLOT_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
ROW_HEIGHT = 18
MOST_POINTS = 600  # of a curve: more than there are pixels


@dataclass(frozen=True)
class Line:
    """A curve of the run number `index`; `raw` is drawn faintly behind it, `marks` puts a dot on every point."""

    index: int
    x: Curve
    y: Curve
    raw: Curve | None = None
    marks: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the run number `index`: its values, its name, and the figure written at its end."""

    index: int
    values: tuple[float, ...]
    label: str
    figure: str


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between two bounds, `most` of them or fewer."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [number * step for number in range(first, last + 1)]
    raise AssertionError((low, high, most))


def thinned(x: Curve, y: Curve) -> tuple[Curve, Curve]:
    """At most `MOST_POINTS` of a curve's points: the lowest and the highest of each stretch, so that peaks stay."""
    if len(y) <= MOST_POINTS:
        return x, y
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(y)), MOST_POINTS // 2):
        known = stretch[np.isfinite(y[stretch])]
        # A stretch without a number keeps one point, which breaks the line.
        kept += (
            sorted({int(known[np.argmin(y[known])]), int(known[np.argmax(y[known])])}) if len(known) else [stretch[0]]
        )
    return x[kept], y[kept]


def path(x: Curve, y: Curve) -> str:
    """The path through points in the picture's units; a point that is no number ends a stretch."""
    parts, pen = [], "M"
    for left, top in zip(x, y, strict=True):
        if math.isfinite(left) and math.isfinite(top):
            parts.append(f"{pen}{left:.1f} {top:.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def line_chart(name: str, lines: Sequence[Line], x_title: str, y_span: tuple[float, float] | None) -> str:
    """Curves over a common axis that begins at 0; `y_span` None says that there is nothing to show."""
    furthest = limits([value for line in lines for value in line.x])
    if y_span is None or furthest is None:
        return nothing(name)
    right = max(float(np.nanmax(line.x)) for line in lines if np.isfinite(line.x).any()) or 1.0
    low, high = y_span

    def across(x: Curve) -> Curve:
        return x / right * PLOT_WIDTH

    def down(y: Curve) -> Curve:
        return (high - y) / (high - low) * PLOT_HEIGHT

    parts = [axes(right, low, high, x_title)]
    # Shapes of an inner <svg> end at its edge: curves may leave the picture, the last dot is whole.
    parts.append(f'<svg x="{LEFT}" y="{TOP}" width="{PLOT_WIDTH + 6}" height="{PLOT_HEIGHT}">')
    for line in lines:
        if line.raw is not None:
            x, y = thinned(line.x, line.raw)
            parts.append(f'<path class="line faint run{line.index % 7}" d="{path(across(x), down(y))}"/>')
    for line in lines:
        x, y = thinned(line.x, line.y)
        there = np.isfinite(x) & np.isfinite(y)
        parts.append(f'<path class="line run{line.index % 7}" d="{path(across(x), down(y))}"/>')
        if line.marks or there.sum() == 1:
            points = zip(across(x[there]), down(y[there]), y[there], strict=True)
            parts += [
                f'<circle class="dot run{line.index % 7}" cx="{left:.1f}" cy="{top:.1f}" r="4">'
                f"<title>{value:.6g}</title></circle>"
                for left, top, value in points
            ]
    parts.append("</svg>")
    return picture(name, HEIGHT, parts)


def axes(right: float, low: float, high: float, x_title: str) -> str:
    bottom = TOP + PLOT_HEIGHT
    parts = []
    for value in ticks(low, high):
        y = TOP + (high - value) / (high - low) * PLOT_HEIGHT
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{LEFT + PLOT_WIDTH}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{short_count(value)}</text>')
    for value in ticks(0, right):
        x = LEFT + value / right * PLOT_WIDTH
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{short_count(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{LEFT + PLOT_WIDTH}"/>')
    parts.append(f'<text x="{LEFT + PLOT_WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{text(x_title)}</text>')
    return "".join(parts)


def row_chart(rows: Sequence[Row]) -> str:
    """Rows along a common axis that begins at 0: a bar up to a single value, a dot for each of several."""
    largest = max((value for row in rows for value in row.values), default=0.0) or 1.0
    parts = []
    for row in rows:
        words = f"<span>{text(row.label)}</span><strong>{text(row.figure)}</strong>"
        shapes = dots(row, largest) if len(row.values) > 1 else bar(row, largest)
        parts.append(f'<div class="words">{words}</div><svg viewBox="0 0 {WIDTH} {ROW_HEIGHT}">{shapes}</svg>')
    return "".join(parts)


def group_chart(indices: Sequence[int], groups: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """Groups of bars on one scale: name, figure, and a value for each of the runs that `indices` number."""
    largest = max((value for _, _, values in groups for value in values), default=0.0) or 1.0
    thickness = 10
    parts = []
    for label, figure, values in groups:
        bars = [
            f'<rect class="bar run{index % 7}" y="{row * (thickness + 1)}" '
            f'width="{max(1.0, value / largest * WIDTH):.1f}" height="{thickness}" rx="2"/>'
            for row, (index, value) in enumerate(zip(indices, values, strict=True))
        ]
        words = f'<div class="words"><span>{text(label)}</span><strong>{text(figure)}</strong></div>'
        height = len(values) * (thickness + 1)
        parts.append(f'{words}<svg viewBox="0 0 {WIDTH} {height}">{"".join(bars)}</svg>')
    return "".join(parts)


def bar(row: Row, largest: float) -> str:
    width = max(0.0, sum(row.values) / largest * WIDTH)
    track = f'<rect class="track" width="{WIDTH}" height="{ROW_HEIGHT}" rx="3"/>'
    return f'{track}<rect class="bar run{row.index % 7}" width="{width:.1f}" height="{ROW_HEIGHT}" rx="3"/>'


def dots(row: Row, largest: float) -> str:
    radius, middle = 5, ROW_HEIGHT / 2
    places = [radius + value / largest * (WIDTH - 2 * radius) for value in row.values]
    parts = [f'<path class="axis" d="M0 {middle}H{WIDTH}"/>']
    parts.append(f'<path class="median run{row.index % 7}" d="M{median(places):.1f} 0V{ROW_HEIGHT}"/>')
    parts += [
        f'<circle class="dot see-through run{row.index % 7}" cx="{place:.1f}" cy="{middle}" r="{radius}">'
        f"<title>{value:.6g}</title></circle>"
        for place, value in zip(places, row.values, strict=True)
    ]
    return "".join(parts)


def nothing(name: str) -> str:
    return picture(name, 70, [f'<text x="{WIDTH / 2}" y="40" text-anchor="middle">nothing was measured</text>'])


def picture(name: str, height: float, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(name)}">{"".join(parts)}</svg>'
