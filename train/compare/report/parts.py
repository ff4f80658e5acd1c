"""The small parts that reports are made of: escaped text, tables and cards."""

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def text(value: object) -> str:
    """Any text as it may stand in a page, between tags or quotes; control characters become question marks."""
    return escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value)))


def scrolling(kind: str, header: str, lines: Sequence[str]) -> str:
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def cell(tag: str, content: str, kind: str = "", exact: Any = None) -> str:
    """A cell of a table; `exact` is the figure behind a rounded number."""
    inner = text(content)
    if exact is not None:
        inner = f'<data value="{text(exact)}">{inner}</data>'
    return f'<{tag} class="{kind}">{inner}</{tag}>' if kind else f"<{tag}>{inner}</{tag}>"


def card(title: str, note: str, drawing: str, legend: str = "") -> str:
    caption = f"<figcaption><h3>{text(title)}</h3><small>{text(note)}</small>{legend}</figcaption>"
    return f'<figure class="card">{caption}{drawing}</figure>'


def legend(labels: Sequence[tuple[int, str]]) -> str:
    """A key for each curve: number, which chooses its colour, and name."""
    return _keys((f'<path class="line run{index % 7}" d="M0 5H30"/>', label) for index, label in labels)


def swatches(kinds: Sequence[tuple[str, str]]) -> str:
    """A key for each kind of bar: the class that colours it, and its name."""
    return _keys((f'<rect class="bar {kind}" width="30" height="10" rx="2"/>', name) for kind, name in kinds)


def _keys(entries: Iterable[tuple[str, str]]) -> str:
    """A shape and its name, each."""
    keys = "".join(
        f'<span><svg viewBox="0 0 30 10" aria-hidden="true">{shape}</svg>{text(name)}</span>'
        for shape, name in entries
    )
    return f'<div class="legend">{keys}</div>'
