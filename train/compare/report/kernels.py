"""The part of `report.html` that shows where the time of a step goes, of runs that were profiled (train.kernels)."""

import math
from collections.abc import Sequence
from dataclasses import replace

from train.checkpoints.run_folder import FinishedRun
from train.compare.figures import UNKNOWN
from train.compare.report.parts import card, cell, legend, scrolling, text
from train.compare.report.pipeline import pipeline_card
from train.compare.report.svg import HEIGHT, LEFT, PLOT_HEIGHT, PLOT_WIDTH, TOP, group_chart, nothing, picture
from train.kernels.comparison import (
    OPERATOR,
    SCOPE,
    changes,
    operator_in_scope,
    scope_name,
    signed_milliseconds,
    speedup_sentence,
)
from train.kernels.summary import Row, RunSummary
from train.metrics.units import milliseconds

SHOWN_ROWS = 12
Labels = Sequence[tuple[int, str]]
"""Number and name of each profiled run; the number chooses its colour."""


def kernels_part(runs: Sequence[FinishedRun], kernels: Sequence[RunSummary | None]) -> str:
    """The section of the report, from each run's `kernels.comparison.read_profile`; empty where none was profiled."""
    labels, profiled = of_profiled(runs, kernels)
    if not labels:
        return ""
    steps = ", ".join(f"{run.label} {milliseconds(run.step_seconds)} ms" for run in profiled)
    note = f"Means of the profiled steps, the profiler's own overhead included: {steps}. "
    missing = [run.label for run, found in zip(runs, kernels, strict=True) if not found]
    note += f"Not profiled: {', '.join(missing)}." if missing else ""
    charts = categories_card(labels, profiled) + roofline_card(labels, profiled)
    charts += "".join(pipeline_card(run.label, run.pipeline) for run in profiled if run.pipeline)
    return (
        f"<h2>Kernels</h2><p>{text(speedup_sentence(profiled))}</p>"
        f'<p class="quiet"><small>{text(note)}</small></p>'
        f'<div class="charts">{charts}</div>{scopes_table(labels, profiled)}'
        f"{operators_table(labels, profiled)}"
    )


def of_profiled(runs: Sequence[FinishedRun], kernels: Sequence[RunSummary | None]) -> tuple[Labels, list[RunSummary]]:
    """The profiled runs by number and label, and their kernels under the same labels."""
    there = [
        (index, replace(found, label=run.label))
        for index, (run, found) in enumerate(zip(runs, kernels, strict=True))
        if found
    ]
    return [(index, found.label) for index, found in there], [found for _, found in there]


def kernels_sentence(runs: Sequence[FinishedRun], kernels: Sequence[RunSummary | None]) -> str:
    """What makes the difference between the profiled runs; empty where there are not two."""
    return speedup_sentence(of_profiled(runs, kernels)[1])


def categories_card(labels: Labels, kernels: Sequence[RunSummary]) -> str:
    found = changes(kernels, "category")
    groups = []
    for change in sorted(found, key=lambda change: -max(second or 0.0 for second in change.seconds)):
        values = [seconds or 0.0 for seconds in change.seconds]
        groups.append((change.category, " · ".join(map(milliseconds, values)) + " ms", values))
    drawing = group_chart([index for index, _ in labels], groups)
    return card("Where a step's time goes", "by kind of work, less is better", drawing, legend(labels))


def roofline_card(labels: Labels, kernels: Sequence[RunSummary]) -> str:
    title = "Roofline"
    peaks = [(run.facts.peak_flops, run.facts.peak_bytes_per_second) for run in kernels]
    known = [(flops, moved) for flops, moved in peaks if flops and moved]
    note = "operators by FLOPs per byte moved; larger: more of a step's time"
    note += "; the line: the device's peak" if known else "; the device's peak is not known"
    return card(title, note, roofline(title, labels, kernels, known[0] if known else None), legend(labels))


def roofline(name: str, labels: Labels, kernels: Sequence[RunSummary], peak: tuple[float, float] | None) -> str:
    """FLOP/s over FLOPs per byte, both in decades, under the peak FLOP/s and bytes/s of the device."""
    points: list[tuple[int, float, float, float, Row]] = [
        (index, row.intensity or 0.0, row.flops_per_second or 0.0, max(0.0, row.seconds / run.step_seconds), row)
        for (index, _), run in zip(labels, kernels, strict=True)
        for row in run.roofline_points
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
    for index, intensity, rate, share, row in sorted(points, key=lambda point: -point[3]):
        words = f"{operator_in_scope(row)}: {rate / 1e9:,.1f} GFLOP/s, {share:.1%} of a step"
        parts.append(
            f'<circle class="dot see-through run{index % 7}" cx="{across(intensity):.1f}" cy="{down(rate):.1f}" '
            f'r="{3 + 20 * math.sqrt(max(0.0, share)):.1f}"><title>{text(words)}</title></circle>'
        )
    return picture(name, HEIGHT, parts)


def decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around some positive numbers, at least one apart."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def scopes_table(labels: Labels, kernels: Sequence[RunSummary]) -> str:
    """The runs aligned by module, phase and category, which are the same whichever kernels do the work."""
    header = cell("th", "work") + cell("th", labels[0][1])
    for _, label in labels[1:]:
        header += cell("th", label) + cell("th", "saved") + cell("th", "share of gain")
    header += cell("th", "launches") + cell("th", "most of it in", "wide")
    lines = []
    for change in changes(kernels, *SCOPE)[:SHOWN_ROWS]:
        line = cell("th", scope_name(change)) + time_cell(change.seconds[0])
        for seconds, saved, share in zip(change.seconds[1:], change.saved_seconds, change.share_of_gain, strict=True):
            line += time_cell(seconds) + saved_cell(saved) + cell("td", UNKNOWN if share is None else f"{share:.1%}")
        line += cell("td", " → ".join(f"{count:,.0f}" for count in change.launches))
        largest = dict.fromkeys(names[0] if names else "nothing" for names in change.largest)
        lines.append(f"<tr>{line}{cell('td', ' → '.join(largest), 'wide')}</tr>")
    title = "What made the difference, in ms a step" if len(labels) > 1 else "What takes longest, in ms a step"
    return f"<h3>{title}</h3>{scrolling('figures', header, lines)}"


def operators_table(labels: Labels, kernels: Sequence[RunSummary]) -> str:
    """The same by operator and kernel, one click away."""
    header = cell("th", "operator") + cell("th", labels[0][1])
    header += "".join(cell("th", label) + cell("th", "saved") for _, label in labels[1:])
    lines = []
    for change in changes(kernels, *OPERATOR)[:SHOWN_ROWS]:
        line = cell("th", operator_in_scope(change)) + time_cell(change.seconds[0])
        for seconds, saved in zip(change.seconds[1:], change.saved_seconds, strict=True):
            line += time_cell(seconds) + saved_cell(saved)
        lines.append(f"<tr>{line}</tr>")
    return f"<details><summary>By operator and kernel</summary>{scrolling('figures', header, lines)}</details>"


def saved_cell(saved: float) -> str:
    return cell("td", signed_milliseconds(saved), "good" if saved > 0 else "bad" if saved < 0 else "", exact=saved)


def time_cell(seconds: float | None) -> str:
    return cell("td", UNKNOWN if seconds is None else milliseconds(seconds), exact=seconds)
