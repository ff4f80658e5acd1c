"""The part of `report.html` that says where a step's time goes, of runs with a `profile/kernels.json` (train.kernels).

The only module that knows that file's fields.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from train.compare_figures import UNKNOWN
from train.compare_runs import NUMBER, Run, check_text, look_up, parse, read, times
from train.errors import UserError
from train.report_parts import card, cell, legend, scrolling, text
from train.report_svg import HEIGHT, LEFT, PLOT_HEIGHT, PLOT_WIDTH, TOP, group_chart, nothing, picture

SHOWN_ROWS = 12
LONGEST_NAME = 60
KERNELS_FILE = Path("profile") / "kernels.json"
KERNELS_SCHEMA = 1
OPTIONAL = (int, float, NoneType)
OPERATOR: dict[str, Any] = {"module": str, "phase": str, "operator": str, "kernel": str, "seconds": NUMBER}
# What the report takes from it: in each object, or each row of a list, these fields.
KERNELS: dict[str, dict[str, Any]] = {
    "step_seconds": {"mean": NUMBER},
    "categories": {"category": str, "seconds": NUMBER},
    "rows": OPERATOR,
    "roofline": {"peak_flops": OPTIONAL, "peak_bytes_per_second": OPTIONAL, "points": list},
    "roofline.points": OPERATOR | {"intensity": OPTIONAL, "flops_per_second": OPTIONAL},
}
Labels = Sequence[tuple[int, str]]
"""Number and name of each profiled run; the number chooses its colour."""

Kernels = dict[str, Any]
"""A run in `kernels.json`."""

IDENTITY = ("module", "phase", "operator", "kernel")


def read_kernels(folder: Path) -> Kernels | None:
    """The run's part of its `profile/kernels.json`; None where there is no such file."""
    path = folder / KERNELS_FILE
    if not path.is_file():
        return None
    content = parse(read(path), path)
    runs = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"{path} is JSON, but not what python -m train.kernels writes")
    if content.get("schema") != KERNELS_SCHEMA or len(runs) > 1:
        raise UserError(
            f"{path} has schema {content.get('schema')!r} and {len(runs)} runs; this version of compare reads schema "
            f"{KERNELS_SCHEMA} of one run: python -m train.kernels {folder} --out {path.parent}"
        )
    for key, fields in KERNELS.items():
        table = look_up(runs[0], key)
        for row in table if isinstance(table, list) else [table]:
            for name, kinds in fields.items():
                value = row.get(name) if isinstance(row, dict) else None
                if isinstance(value, bool) or not isinstance(value, kinds):
                    raise UserError(f'{path}: "{key}" has {value!r} for {name}: it is not what train.kernels writes')
    if not runs[0]["step_seconds"]["mean"] > 0:
        raise UserError(f"{path}: its steps take {runs[0]['step_seconds']['mean']} seconds: it is not whole")
    check_text(runs[0], path)
    return runs[0]


def kernels_part(runs: Sequence[Run], kernels: Sequence[Kernels | None]) -> str:
    """The whole section, of what `read_kernels` gave for each run; empty where none was profiled."""
    profiled = [(index, run, found) for index, (run, found) in enumerate(zip(runs, kernels, strict=True)) if found]
    if not profiled:
        return ""
    labels = [(index, run.label) for index, run, _ in profiled]
    found_kernels = [found for _, _, found in profiled]
    steps = ", ".join(f"{run.label} {milliseconds(found['step_seconds']['mean'])} ms" for _, run, found in profiled)
    note = f"Means of the profiled steps, the profiler's own cost included: {steps}. "
    missing = [run.label for run, found in zip(runs, kernels, strict=True) if not found]
    note += f"Not profiled: {', '.join(missing)}." if missing else ""
    charts = categories_card(labels, found_kernels) + roofline_card(labels, found_kernels)
    return (
        f"<h2>Kernels</h2><p>{text(verdict(labels, found_kernels))}</p>"
        f'<p class="quiet"><small>{text(note)}</small></p>'
        f'<div class="charts">{charts}</div>{rows_table(labels, found_kernels)}'
    )


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def by_row(kernels: Kernels) -> dict[tuple[str, ...], float]:
    """Seconds of a step by module, phase, operator and kernel."""
    seconds: dict[tuple[str, ...], float] = {}
    for row in kernels["rows"]:
        key = tuple(row[name] for name in IDENTITY)
        seconds[key] = seconds.get(key, 0.0) + row["seconds"]
    return seconds


def named(key: tuple[str, ...]) -> str:
    """What a row is, in words; a kernel's name, which may go on for lines, is cut."""
    module, phase, operator, kernel = key
    kernel = kernel if len(kernel) <= LONGEST_NAME else kernel[: LONGEST_NAME - 1] + "…"
    what = f"{operator} ({kernel})" if operator and kernel else operator or kernel or "unknown"
    where = ", ".join(filter(None, (module, phase)))
    return what + (f" in {where}" if where else "")


def verdict(labels: Labels, kernels: Sequence[Kernels]) -> str:
    """What changed most between the first profiled run and each other one."""
    first, sentences = by_row(kernels[0]), []
    for (_, label), other in zip(labels[1:], kernels[1:], strict=True):
        second = by_row(other)
        key = max({**first, **second}, key=lambda key: abs(first.get(key, 0.0) - second.get(key, 0.0)), default=None)
        if key is None:
            continue
        steps = [found["step_seconds"]["mean"] for found in (kernels[0], other)]
        sentences.append(
            f"A profiled step of {label} takes {milliseconds(steps[1])} ms, of {labels[0][1]} "
            f"{milliseconds(steps[0])}: {times(steps[0] / steps[1])} as fast. The largest change is {named(key)}: "
            f"{milliseconds(first.get(key, 0.0))} ms, then {milliseconds(second.get(key, 0.0))}."
        )
    return " ".join(sentences)


def categories_card(labels: Labels, kernels: Sequence[Kernels]) -> str:
    seconds = [{row["category"]: row["seconds"] for row in found["categories"]} for found in kernels]
    names = dict.fromkeys(name for own in seconds for name in own)
    groups = []
    for name in sorted(names, key=lambda name: -max(own.get(name, 0.0) for own in seconds)):
        values = [own.get(name, 0.0) for own in seconds]
        groups.append((name, " · ".join(map(milliseconds, values)) + " ms", values))
    drawing = group_chart([index for index, _ in labels], groups)
    return card("Where a step's time goes", "by kind of work, less is better", drawing, legend(labels))


def roofline_card(labels: Labels, kernels: Sequence[Kernels]) -> str:
    title = "Roofline"
    peaks = [(found["roofline"]["peak_flops"], found["roofline"]["peak_bytes_per_second"]) for found in kernels]
    known = [(flops, moved) for flops, moved in peaks if flops and moved]
    note = "operators by FLOPs per byte moved; larger: more of a step's time"
    note += "; the line: the device's peak" if known else "; the device's peak is not known"
    return card(title, note, roofline(title, labels, kernels, known[0] if known else None), legend(labels))


def roofline(name: str, labels: Labels, kernels: Sequence[Kernels], peak: tuple[float, float] | None) -> str:
    """FLOP/s over FLOPs per byte, both in decades, under the peak FLOP/s and bytes/s of the device."""
    points = [
        (
            index,
            point["intensity"],
            point["flops_per_second"],
            max(0.0, point["seconds"] / found["step_seconds"]["mean"]),
            point,
        )
        for (index, _), found in zip(labels, kernels, strict=True)
        for point in found["roofline"]["points"]
        if (point["intensity"] or 0) > 0 and (point["flops_per_second"] or 0) > 0
    ]
    if not points:
        return nothing(name)
    left, right = decades([intensity for _, intensity, *_ in points])
    bottom, top = decades([rate for _, _, rate, *_ in points] + ([peak[0]] if peak else []))

    def across(intensity: float) -> float:
        return LEFT + (math.log10(intensity) - left) / (right - left) * PLOT_WIDTH

    def down(rate: float) -> float:
        return TOP + (top - math.log10(rate)) / (top - bottom) * PLOT_HEIGHT

    parts = []
    for power in range(bottom, top + 1):
        y = down(10.0**power)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{LEFT + PLOT_WIDTH}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{10.0 ** (power - 9):g}</text>')
    for power in range(left, right + 1):
        x = across(10.0**power)
        parts.append(f'<text x="{x:.1f}" y="{TOP + PLOT_HEIGHT + 17}" text-anchor="middle">{10.0**power:g}</text>')
    x_title = "FLOPs per byte, against GFLOP/s"
    parts.append(f'<text x="{LEFT + PLOT_WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{x_title}</text>')
    if peak:
        ridge = min(max(peak[0] / peak[1], 10.0**left), 10.0**right)
        start = max(peak[1] * 10.0**left, 10.0**bottom)
        parts.append(
            f'<path class="roof" d="M{across(start / peak[1]):.1f} {down(start):.1f}'
            f'L{across(ridge):.1f} {down(min(peak[0], ridge * peak[1])):.1f}H{LEFT + PLOT_WIDTH}"/>'
        )
    for index, intensity, rate, share, point in sorted(points, key=lambda point: -point[3]):
        words = f"{named(tuple(point[name] for name in IDENTITY))}: {rate / 1e9:,.1f} GFLOP/s, {share:.1%} of a step"
        parts.append(
            f'<circle class="dot see-through run{index % 7}" cx="{across(intensity):.1f}" cy="{down(rate):.1f}" '
            f'r="{3 + 20 * math.sqrt(max(0.0, share)):.1f}"><title>{text(words)}</title></circle>'
        )
    return picture(name, HEIGHT, parts)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around some positive numbers, at least one apart."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def rows_table(labels: Labels, kernels: Sequence[Kernels]) -> str:
    """The operators that changed most, or of a single run those that take longest."""
    seconds = [by_row(found) for found in kernels]
    keys = dict.fromkeys(key for own in seconds for key in own)

    def weight(key: tuple[str, ...]) -> float:
        values = [own.get(key, 0.0) for own in seconds]
        return max(abs(value - values[0]) for value in values[1:]) if len(values) > 1 else values[0]

    header = cell("th", "operator") + cell("th", labels[0][1])
    header += "".join(cell("th", label) + cell("th", "saved") for _, label in labels[1:])
    lines = []
    for key in sorted(keys, key=lambda key: -weight(key))[:SHOWN_ROWS]:
        first, *others = (own.get(key) for own in seconds)
        line = cell("th", named(key)) + time_cell(first)
        for other in others:
            saved = (first or 0.0) - (other or 0.0)
            sign, mood = ("+", "good") if saved > 0 else ("-", "bad") if saved < 0 else ("", "")
            line += time_cell(other) + cell("td", sign + milliseconds(abs(saved)), mood, exact=saved)
        lines.append(f"<tr>{line}</tr>")
    title = "What changed most, in ms" if len(labels) > 1 else "What takes longest, in ms"
    return f"<h3>{title}</h3>{scrolling('figures', header, lines)}"


def time_cell(seconds: float | None) -> str:
    return cell("td", UNKNOWN if seconds is None else milliseconds(seconds), exact=seconds)
