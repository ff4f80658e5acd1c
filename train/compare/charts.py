"""What charts are made of: each is drawn once by matplotlib, as SVG for the page and as PNG elsewhere.

A figure is as wide as `WIDTH` units, which are points in matplotlib and pixels in the page, which scales it.
"""

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common form of color blindness, and by lightness in grey print.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#010101")
GRID, AXIS, QUIET, INK, TRACK, ON_BAR, WAITING = (
    "#d9d9d8", "#8c8c8b", "#5c6068", "#1d1f23", "#ecece7", "#fffffe", "#d0d0cf",
)  # fmt: skip
# In the page, whose style sheet has them for light and dark mode.
VARIABLES = {color: f"--run{index}" for index, color in enumerate(COLORS)}
VARIABLES |= {GRID: "--rule", AXIS: "--axis", QUIET: "--quiet", INK: "--ink", TRACK: "--track", ON_BAR: "--card",
              WAITING: "--rule"}  # fmt: skip
WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 42
DASHES = ["-", (0, (5, 2.2)), (0, (5, 2.2, 1.1, 2.2)), (0, (1.1, 2.2))]  # equal curves show through each other's gaps
FONT_SIZE = 9.0
PNG_WIDTH, MARGIN = 960, 10  # pixels; units around a PNG
LONGEST_LABEL = 30
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")


Keys = Sequence[tuple[int | str, str]]
"""Color, or the number of one, and name of each entry of a legend."""


@dataclass(frozen=True)
class Chart:
    """A figure with what a page writes above it; its PNG has the same in a header."""

    title: str
    note: str
    figure: "Figure"
    keys: Keys
    kind: Literal["line", "bar"] = "line"
    tooltips: dict[str, str] = field(default_factory=dict)
    """Texts for artists by their gid."""
    name: str = ""
    """Of the PNG, for charts that stand in `report.md` too."""

    def svg(self) -> str:
        """The figure as an element `<svg>`, in the colors and fonts of the page, with the tooltips."""
        from matplotlib import rc_context

        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with rc_context({
            "svg.fonttype": "none",
            "svg.hashsalt": self.title,  # makes the ids of markers and clip paths the figure's own
            "path.simplify_threshold": 0.5,  # units: a curve of many steps stays small
            "text.parse_math": False,
        }):  # fmt: skip
            self.figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        drawn = file.getvalue().partition("</defs>")[2]  # without matplotlib's own header and style sheet
        drawn = re.sub(r' (d|style)="([^"]*)"', _for_page, drawn)
        drawn = re.sub(r'<g id="([^"]*)"(/?)>', self._group, drawn)
        _, height = 72 * self.figure.get_size_inches()
        return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(self.title)}">{drawn}'

    def _group(self, found: re.Match[str]) -> str:
        """The opening tag of a group, with its tooltip instead of its id, which would not be unique in a page."""
        gid, empty = found.groups()
        tooltip = self.tooltips.get(gid)
        return "" if empty else f"<g><title>{escape(tooltip)}</title>" if tooltip else "<g>"

    def png(self) -> bytes:
        from matplotlib import rc_context
        from matplotlib.transforms import Bbox

        with rc_context({"text.parse_math": False}):
            artists, header = self._add_header()
        width, height = self.figure.get_size_inches()
        file = io.BytesIO()
        box = Bbox([[-MARGIN / 72, -MARGIN / 72], [width + MARGIN / 72, height + header]])
        self.figure.savefig(file, format="png", dpi=PNG_WIDTH / box.width, bbox_inches=box)
        for artist in artists:  # which the page says itself
            artist.remove()
        return file.getvalue()

    def _add_header(self) -> "tuple[list[Artist], float]":
        """Title, note and legend above the figure's upper edge, and their height in inches."""
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        columns = 3
        rows = -(-len(self.keys) // columns) if len(self.keys) > 1 else 0
        lines = textwrap.wrap(self.note, 100)
        note_bottom = 10 + 16 * rows
        title_bottom = note_bottom + 13 * len(lines) + 4
        height = 72 * self.figure.get_size_inches()[1]
        artists: list[Artist] = [
            self.figure.text(0, 1 + bottom / height, clean(text), size=size, color=INK, va="bottom")
            for text, bottom, size in (("\n".join(lines), note_bottom, FONT_SIZE), (self.title, title_bottom, 12.0))
        ]
        if rows:
            handles = [
                Line2D([], [], **stroke(color)) if isinstance(color, int) and self.kind == "line"
                else Patch(color=color_of(color))
                for color, _ in self.keys
            ]  # fmt: skip
            names = [clean(label) for _, label in self.keys]
            legend = self.figure.legend(handles, names, loc="lower left", bbox_to_anchor=(0, 1 + 4 / height),
                                        ncols=columns, frameon=False, fontsize=FONT_SIZE, borderaxespad=0)  # fmt: skip
            artists.append(legend)
        return artists, (title_bottom + 20) / 72


def _for_page(found: re.Match[str]) -> str:
    """An attribute of matplotlib's SVG: a path to a tenth of a unit, or a style without fonts and fixed colors."""
    name, value = found.groups()
    if name == "d":
        value = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.1f}", " ".join(value.split()))
    else:
        value = re.sub(r"font-(size|family): [^;]*; ", "", value)
        value = re.sub("#[0-9a-f]{6}", lambda color: page_color(color[0]), value)
    return f' {name}="{value}"'


@dataclass(frozen=True)
class ChartRow:
    """A name and a figure written above a bar for each value (the number of its color, and it), or a dot for each."""

    label: str
    figure: str
    values: Sequence[tuple[int, float]] = ()
    dots: bool = False


# Building blocks


def color_of(color: int | str) -> str:
    return color if isinstance(color, str) else COLORS[color % len(COLORS)]


def page_color(color: int | str) -> str:
    """The same as a color of the page's style sheet."""
    return f"var({VARIABLES[color_of(color)]})"


def stroke(index: int) -> dict[str, Any]:
    return {"color": color_of(index), "linestyle": DASHES[index % len(DASHES)], "linewidth": 2.2}


def clean(text: object) -> str:
    """A text without control characters, which neither XML nor a font has."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))


def canvas(
    height: float, left: float = LEFT, bottom: float = BOTTOM, right: float = RIGHT, x_title: str = ""
) -> "tuple[Figure, Axes]":
    """A figure with axes that have a grid and no frame; its margins are in units of the picture."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display
    from matplotlib.transforms import blended_transform_factory

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    box = (left / WIDTH, bottom / height, (WIDTH - left - right) / WIDTH, (height - bottom - TOP) / height)
    axes = figure.add_axes(box)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(AXIS)
    axes.tick_params(length=0, labelsize=FONT_SIZE, labelcolor=QUIET, pad=7)
    axes.grid(color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.locator_params(nbins=5, steps=[1, 2, 5, 10])
    axes.set_xlabel(x_title, size=FONT_SIZE, color=QUIET, va="baseline")
    just_above_lower_edge = blended_transform_factory(axes.transAxes, figure.dpi_scale_trans)
    axes.xaxis.set_label_coords(0.5, 5 / 72, transform=just_above_lower_edge)
    return figure, axes


def write(axes: "Axes", x: float, y: float, text: str, color: str = QUIET, **options: Any) -> None:
    axes.text(x, y, clean(text), color=color, parse_math=False, **{"size": FONT_SIZE, **options})


def nothing() -> "Figure":
    figure, axes = canvas(70, 0, 0, 0)
    axes.axis("off")
    write(axes, 0.5, 0.4, "nothing was measured", ha="center")
    return figure


def row_figure(rows: Sequence[ChartRow]) -> "Figure":
    """Rows on a common scale from 0: a bar for each value, or dots with a stroke at their median."""
    largest = max((value for row in rows for _, value in row.values), default=0.0) or 1.0
    lines = [1 if row.dots else max(1, len(row.values)) for row in rows]
    heights = [22 + (18 if count == 1 else 11 * count) + 12 for count in lines]
    figure, axes = canvas(sum(heights), 0, 0, 0)
    axes.set_position((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, WIDTH), ylim=(sum(heights), 0))
    top = 0
    for row, count, height in zip(rows, lines, heights, strict=True):
        label = row.label if len(row.label) <= LONGEST_LABEL else f"{row.label[: LONGEST_LABEL - 1]}…"
        write(axes, 0, top + 16, label, INK, size=FONT_SIZE + 1)
        write(axes, WIDTH, top + 16, row.figure, INK, size=FONT_SIZE + 1, ha="right", weight="bold")
        bars = top + 22
        if row.dots:
            color = color_of(row.values[0][0])
            across = [5 + value / largest * (WIDTH - 10) for _, value in row.values]
            axes.plot([0, WIDTH], [bars + 9] * 2, color=AXIS, linewidth=1)
            axes.plot([median(across)] * 2, [bars, bars + 18], color=color, linewidth=3)
            axes.plot(across, [bars + 9] * len(across), "o", color=color, markersize=10, alpha=0.55, markeredgewidth=0)
        else:
            if count == 1:
                axes.barh(bars, WIDTH, 18, align="edge", color=TRACK)
            for place, (index, value) in enumerate(row.values):
                width = max(1.0, value / largest * WIDTH)
                thickness = 18 if count == 1 else 10
                axes.barh(bars + 11 * place, width, thickness, align="edge", color=color_of(index))
        top += height
    return figure


def pngs(charts: Sequence[Chart]) -> dict[str, bytes]:
    """File name → PNG, of the charts that have a name."""
    return {f"{chart.name}.png": chart.png() for chart in charts if chart.name}
