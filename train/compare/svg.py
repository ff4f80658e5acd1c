"""A matplotlib figure as SVG inside a page: shapes and text carry classes, which the page's style sheet colors.

matplotlib writes a document of its own: colors and fonts in style attributes, markers as references, an id on every
group. Inside a page this would not follow dark mode, and ids of several figures would collide.
"""

import io
import re
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common form of color blindness, and by lightness in grey print.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#010101")
GRID, AXIS, QUIET, INK, TRACK, ON_BAR, WAITING = (
    "#d9d9d8", "#8c8c8b", "#5c6068", "#1d1f23", "#ecece7", "#fffffe", "#d0d0cf",
)  # fmt: skip
CLASSES = {color: f"run{index}" for index, color in enumerate(COLORS)}
CLASSES |= {GRID: "grid", AXIS: "axis", QUIET: "", INK: "ink", TRACK: "track", ON_BAR: "on-bar", WAITING: "waiting"}
OPACITIES = ("opacity", "fill-opacity", "stroke-opacity")
KEPT = (*OPACITIES, "stroke-width", "stroke-dasharray")
HEADER = "header"
"""gid of what a figure's PNG shows and a page says itself: title, note, legend."""


def to_svg(figure: "Figure", name: str, tooltips: Mapping[str, str]) -> str:
    """The figure as an element `<svg>` called `name`; `tooltips` are texts for artists by their gid."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    body = _Converter(root, name, tooltips).convert(root)
    return f'<svg viewBox="{root.get("viewBox")}" role="img" aria-label="{escape(name)}">{body}</svg>'


class _Converter:
    def __init__(self, root: ElementTree.Element, name: str, tooltips: Mapping[str, str]) -> None:
        self.tooltips = tooltips
        self.prefix = re.sub(r"\W+", "-", name.lower())
        self.by_id = {element.get("id"): element for element in root.iter() if element.get("id")}
        self.clips: dict[str, str] = {}

    def convert(self, element: ElementTree.Element) -> str:
        tag = element.tag.rpartition("}")[2]
        if tag in ("metadata", "style") or element.get("id") == HEADER:
            return ""
        if tag == "text":
            return self._text(element)
        if tag == "path":
            return self._shape(element, element, "line" if "none" in _style(element).get("fill", "") else "bar")
        if tag == "use":
            target = self.by_id[next(value for key, value in element.items() if key.endswith("href"))[1:]]
            return self._shape(target, element, "dot")
        children = [child for child in element if not (tag == "defs" and child.tag.endswith("path"))]
        inner = "".join(map(self.convert, children))
        if tag == "clipPath":
            return f'<clipPath id="{self._clip(element.get("id") or "")}">{inner}</clipPath>'
        if tag == "rect":
            return f"<rect{_attributes(dict(element.items()), 'x', 'y', 'width', 'height')}/>"
        if not inner:
            return ""
        if tooltip := self.tooltips.get(element.get("id") or ""):
            return f"<g{self._clipped(element)}><title>{escape(tooltip)}</title>{inner}</g>"
        return f"<g{clipped}>{inner}</g>" if (clipped := self._clipped(element)) else inner

    def _clip(self, own_id: str) -> str:
        return self.clips.setdefault(own_id, f"{self.prefix}-{len(self.clips)}")

    def _clipped(self, element: ElementTree.Element) -> str:
        reference = element.get("clip-path")
        return f' clip-path="url(#{self._clip(reference[5:-1])})"' if reference else ""

    def _shape(self, geometry: ElementTree.Element, element: ElementTree.Element, kind: str) -> str:
        """A path; of a marker or a collection's member, moved to where it is used."""
        style = _style(geometry) | _style(element)
        color = next((style[key] for key in ("fill", "stroke") if style.get(key, "none") != "none"), None)
        if color is None:
            return ""
        own = CLASSES[color]
        kinds = f"{kind} {own}" if own.startswith("run") else own
        if any(float(style.get(key, 1)) < 1 for key in OPACITIES) and own.startswith("run"):
            kinds = f"{kind} {'faint' if kind == 'line' else 'see-through'} {own}"
        moved = _attributes({"transform": f"translate({_short(element.get('x'))} {_short(element.get('y'))})"}
                            if element is not geometry else {}, "transform")  # fmt: skip
        path = re.sub(r"-?\d+\.\d+", lambda found: _short(found[0]), " ".join((geometry.get("d") or "").split()))
        path = re.sub(r" ?([MLHVCQZz]) ?", r"\1", path)
        return f'<path class="{kinds}" d="{path}"{moved}{_attributes(style, *KEPT)}{self._clipped(element)}/>'

    def _text(self, element: ElementTree.Element) -> str:
        style = _style(element)
        bold = "strong" if "700" in f"{style.get('font-weight')} {style.get('font')}".split() else ""
        own = " ".join(filter(None, (CLASSES[style.get("fill", QUIET)], bold)))
        place = {key: _short(element.get(key)) for key in ("x", "y")}
        anchor = _attributes(style, "text-anchor")
        kind = f' class="{own}"' if own else ""
        return f"<text{kind}{_attributes(place, 'x', 'y')}{anchor}>{escape(element.text or '')}</text>"


def _style(element: ElementTree.Element) -> dict[str, str]:
    parts = (part.partition(":") for part in (element.get("style") or "").split(";") if part.strip())
    return {key.strip(): value.strip() for key, _, value in parts}


def _attributes(values: Mapping[str, str], *names: str) -> str:
    return "".join(f' {name}="{values[name]}"' for name in names if name in values)


def _short(number: str | None) -> str:
    """A coordinate to a tenth of a unit, which is less than a pixel."""
    return f"{float(number or 0):.1f}".removesuffix(".0")
