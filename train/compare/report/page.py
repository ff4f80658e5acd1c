"""A comparison as one page that opens anywhere: no server, no script, nothing fetched.

Whatever comes out of a run folder goes through `text()`, and the page forbids itself everything but its own style.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.checkpoints.run_folder import FinishedRun as Run
from train.compare.figures import (
    NOT_COMPARABLE,
    change,
    figure_rows,
    flatten,
    intervals_note,
    is_good,
    shown,
    side_by_side,
    signed,
    verdict,
    warnings,
    written,
)
from train.compare.gate import Result
from train.compare.intervals import spreads
from train.compare.plots import limits, series, smoothing_window, trailing_mean
from train.compare.report.kernels import kernels_part
from train.compare.report.memory import memory_part
from train.compare.report.parts import card, cell, legend, scrolling, text
from train.compare.report.style import STYLE
from train.compare.report.svg import Line, Row, line_chart, row_chart
from train.kernels.summary import RunSummary
from train.metrics.memory_profile import MemoryProfile
from train.metrics.table import BY_KEY
from train.metrics.units import times, unit_of

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SAID_ANYWAY = ("hardware", "versions")
MEMORY_KINDS = {"rss": "resident memory of a process", "cuda_allocated": "GPU memory in tensors"}


def page(
    runs: Sequence[Run],
    found: Sequence[Mapping[str, Any]],
    gate: Sequence[Result],
    kernels: Sequence[RunSummary | None],
    memories: Sequence[MemoryProfile | None],
    data: Mapping[str, Any],
) -> str:
    """The whole document: the differences and the gate's results, what `read_profile` and `read_memory` returned for
    each run, and the content of `comparison.json`, which travels in it for programs.
    """
    title = text("Comparison: " + " and ".join(run.label for run in runs))
    body = [
        f"<header><h1>{title}</h1>{verdict_part(runs, found)}</header>",
        gate_part(gate),
        f"<h2>Figures</h2>{figures_part(runs)}",
        f'<h2>Curves</h2><div class="charts">{"".join(charts(runs))}</div>',
        kernels_part(runs, kernels),
        memory_part(runs, memories),
        f"<h2>Configuration</h2>{settings_part(runs, 'config', 'settings')}",
        f'<h2>Samples</h2><div class="samples">{"".join(sample_card(run) for run in runs)}</div>',
    ]
    for heading, key in (("Model", "model"), ("Data", "data"), ("Hardware", "hardware"), ("Versions", "versions")):
        body.append(f"<h2>{heading}</h2>{settings_part(runs, key, 'entries', key in SAID_ANYWAY)}")
    attention = "".join(f"<li>{text(run.label)}: {text(run.get('attn_reason'))}</li>" for run in runs)
    body.append(f"<h2>Attention</h2><ul>{attention}</ul>")
    # The only text of the page that is no markup to a browser; "<" could end it.
    island = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f'\n</main>\n<script type="application/json" id="comparison">{island}</script>\n</body>\n</html>\n'
    )


# The answer


def verdict_part(runs: Sequence[Run], found: Sequence[Mapping[str, Any]]) -> str:
    said = warnings(runs, found)
    grave = [line for line in said if line.startswith(NOT_COMPARABLE)]
    parts = ["".join(f'<p class="alarm">{text(line)}</p>' for line in grave)]
    parts.append(f'<p class="verdict">{text(verdict(runs, found))}</p>')
    for run in runs[1:]:
        parts.append(f"<h3>{text(run.label)} against {text(runs[0].label)}</h3>" if len(runs) > 2 else "")
        parts.append(f'<div class="tiles">{tiles(runs[0], run, found)}</div>')
    rest = "".join(f"<li>{text(line)}</li>" for line in said if line not in grave)
    return "".join(parts) + (f"<ul>{rest}</ul>" if rest else "")


def tiles(first: Run, run: Run, found: Sequence[Mapping[str, Any]]) -> str:
    """How much faster, how much leaner, how good, and whether it is the same work."""
    parts = []
    for question, key in (("Speed", "tokens_per_second"), ("Peak memory", "peak_memory_bytes")):
        changed = change(BY_KEY[key], first, run)
        answer = times(changed["ratio"]) if changed else shown(None)
        parts.append(tile(question, answer, against(key, first, run), is_good(BY_KEY[key], changed)))
    losses = first.get("val_loss"), run.get("val_loss")
    differing = {entry["key"]: entry["values"] for entry in found if entry["kind"] == "comparability"}
    known = None not in losses and "val_data" not in differing
    answer = signed(losses[1] - losses[0]) if known else shown(None)
    parts.append(tile("Validation loss", answer, against("val_loss", first, run), None))
    other = [key for key, values in differing.items() if values[first.label] != values[run.label]]
    alike = "same shape, data, seed and steps" if not other else "other " + ", ".join(other)
    parts.append(tile("Same model and work?", "No" if other else "Yes", alike, None if not other else False))
    return "".join(parts)


def against(key: str, first: Run, run: Run) -> str:
    values = [first.get(key), run.get(key)]
    _, cells = written(BY_KEY[key], values)
    unit = unit_of(BY_KEY[key].kind, max((value for value in values if value is not None), default=0))[1]
    return f"{cells[1]} against {cells[0]} {unit or 'nats per token'}"


def tile(question: str, answer: str, explanation: str, good: bool | None) -> str:
    return (
        f'<div class="card tile"><span class="quiet">{text(question)}</span>'
        f'<strong class="{mood(good)}">{text(answer)}</strong><small class="quiet">{text(explanation)}</small></div>'
    )


def mood(good: bool | None) -> str:
    return {True: "good", False: "bad", None: ""}[good]


def gate_part(gate: Sequence[Result]) -> str:
    if not gate:
        return ""
    lines = "".join(f'<li class="{mood(result.met)}">{text(result.sentence)}</li>' for result in gate)
    return f"<h2>Gate</h2><ul>{lines}</ul>"


# Tables


def figures_part(runs: Sequence[Run]) -> str:
    header = cell("th", "") + cell("th", runs[0].label)
    for run in runs[1:]:
        header += cell("th", run.label) + cell("th", "change")
    lines = []
    for row in figure_rows(runs):
        line = cell("th", row.title) + cell("td", row.cells[0], exact=row.values[0])
        for written_, value, changed, good in zip(row.cells[1:], row.values[1:], row.changes, row.good, strict=True):
            line += cell("td", written_, exact=value) + cell("td", changed, mood(good))
        lines.append(f"<tr>{line}</tr>")
    note = f"Changes are against {runs[0].label}. {intervals_note(runs)}"
    return f'{scrolling("figures", header, lines)}<p class="quiet"><small>{text(note)}</small></p>'


def settings_part(runs: Sequence[Run], key: str, things: str, wanted: bool = False) -> str:
    """A mapping of every run side by side: what differs in the open, all of it one click away.

    What is `wanted` lies open also where nothing differs.
    """
    table = side_by_side([flatten(run.summary[key]) for run in runs])
    header = cell("th", "") + "".join(cell("th", run.label) for run in runs)
    lines, differing = [], []
    for name, values in table.items():
        differs = any(value != values[0] for value in values)
        cells = "".join(cell("td", shown(value)) for value in values)
        lines.append(f'<tr class="{"differs" if differs else ""}">{cell("th", name)}{cells}</tr>')
        differing += lines[-1:] if differs else []
    if not lines:
        return "<p>None recorded.</p>"
    table_ = scrolling("settings", header, lines)
    if not differing:
        return f"<details{' open' * wanted}><summary>All the same: {len(lines)} {things}</summary>{table_}</details>"
    whole = f"<details><summary>All {len(lines)} {things}</summary>{table_}</details>"
    return scrolling("settings", header, differing) + whole


def sample_card(run: Run) -> str:
    sample = run.get("sample")
    if not isinstance(sample, dict):
        return f'<div class="card"><h3>{text(run.label)}</h3><p class="quiet">No sample was taken.</p></div>'
    return (
        f'<div class="card"><h3>{text(run.label)}</h3><small class="quiet">prompt: <code>{text(sample.get("prompt"))}'
        f"</code></small><pre>{text(sample.get('text'))}</pre></div>"
    )


# Charts


def charts(runs: Sequence[Run]) -> list[str]:
    elapsed = {run.label: np.cumsum(series(run, "step_time_seconds")) for run in runs}
    longest = max((float(np.nanmax(each)) for each in elapsed.values() if np.isfinite(each).any()), default=0.0)
    divisor, unit, _ = unit_of("seconds", longest)
    tokens = {run.label: series(run, "tokens") for run in runs}
    return [
        loss_chart(runs, "Training loss over tokens", tokens, "training tokens"),
        loss_chart(
            runs, "Training loss over time", {k: v / divisor for k, v in elapsed.items()}, f"training time ({unit})"
        ),
        validation_chart(runs, tokens),
        throughput_chart(runs),
        windows_chart(runs),
        figure_chart(runs, "peak_memory_bytes", "Peak memory", memory_kinds(runs) + ", less is better"),
        figure_chart(runs, "time_per_epoch_seconds", "Time per epoch", "at the throughput above, less is better"),
    ]


def names(runs: Sequence[Run]) -> list[tuple[int, str]]:
    return [(index, run.label) for index, run in enumerate(runs)]


def loss_chart(runs: Sequence[Run], title: str, across: Mapping[str, Any], x_title: str) -> str:
    lines, shown_losses, first_losses, windows = [], [], [], []
    for index, run in enumerate(runs):
        losses = series(run, "loss")
        windows.append(smoothing_window(len(losses)))
        raw = losses if windows[-1] > 1 else None
        lines.append(Line(index, across[run.label], trailing_mean(losses, windows[-1]), raw))
        # The fall from ln(vocabulary) in the first steps would flatten everything after it: it leaves the picture.
        shown_losses += list(losses[len(losses) // 20 :])
        first_losses += list(losses[:1])
    span = limits(shown_losses)
    note = "cross-entropy, nats per token"
    if max(windows) > 1:
        note += f"; strong: mean of {'/'.join(str(w) for w in dict.fromkeys(windows))} steps"
    highest = max((loss for loss in first_losses if math.isfinite(loss)), default=-math.inf)
    if span and highest > span[1]:
        note += f"; starts at {highest:.1f}, above the axis"
    return card(title, note, line_chart(title, lines, x_title, span), legend(names(runs)))


def validation_chart(runs: Sequence[Run], tokens: Mapping[str, Any]) -> str:
    lines = []
    for index, run in enumerate(runs):
        losses = series(run, "val_loss")
        there = np.isfinite(losses)
        lines.append(Line(index, tokens[run.label][there], losses[there], marks=True))
    span = limits([value for line in lines for value in line.y])
    title = "Validation loss"
    drawing = line_chart(title, lines, "training tokens", span)
    return card(title, "cross-entropy, nats per token", drawing, legend(names(runs)))


def throughput_chart(runs: Sequence[Run]) -> str:
    lines, highest = [], 0.0
    for index, run in enumerate(runs):
        rates = series(run, "tokens_per_second")
        window = smoothing_window(len(rates))
        raw = rates if window > 1 else None
        lines.append(Line(index, series(run, "step"), trailing_mean(rates, window), raw))
        known = rates[np.isfinite(rates)]
        highest = max(highest, float(np.percentile(known, 99)) if len(known) else 0.0)
    title = "Throughput"
    drawing = line_chart(title, lines, "optimizer step", (0.0, 1.15 * highest) if highest else None)
    return card(title, "tokens per second, more is better", drawing, legend(names(runs)))


def windows_chart(runs: Sequence[Run]) -> str:
    rows = []
    for index, run in enumerate(runs):
        spread = spreads(run).get("tokens_per_second")
        if spread:
            figure = f"{spread.median:,.0f} ({spread.low:,.0f} … {spread.high:,.0f}) tokens/s"
            rows.append(Row(index, spread.values, run.label, figure))
    note = "a dot for each interval of steps, a stroke at their median"
    return card("Throughput over intervals", note, row_chart(rows)) if rows else ""


def figure_chart(runs: Sequence[Run], key: str, title: str, note: str) -> str:
    values = [run.get(key) for run in runs]
    divisor, unit, decimals = unit_of(BY_KEY[key].kind, max((v for v in values if v is not None), default=0))
    rows = []
    for index, (run, value) in enumerate(zip(runs, values, strict=True)):
        figure = "not measured" if value is None else f"{value / divisor:,.{decimals}f} {unit}"
        changed = change(BY_KEY[key], runs[0], run) if index else None
        figure += f" ({times(changed['ratio'])})" if changed else ""
        rows.append(Row(index, () if value is None else (float(value),), run.label, figure))
    return card(title, note, row_chart(rows))


def memory_kinds(runs: Sequence[Run]) -> str:
    kinds = dict.fromkeys(run.get("peak_memory_kind") for run in runs)
    return ", ".join(MEMORY_KINDS.get(kind, kind) for kind in kinds)
