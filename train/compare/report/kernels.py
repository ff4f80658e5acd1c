"""The part of `report.html` that says where a step's time goes, of runs with a `profile/kernels.json` (train.kernels).

Beside `train.kernels` the only module that knows that file's fields.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from train.checkpoints.run_folder import NUMBER, Run, check_fields, check_text, look_up, parse, read, times
from train.compare.figures import UNKNOWN
from train.compare.report.parts import card, cell, legend, scrolling, text
from train.compare.report.pipeline import check_pipeline, pipeline_card
from train.compare.report.svg import HEIGHT, LEFT, PLOT_HEIGHT, PLOT_WIDTH, TOP, group_chart, nothing, picture
from train.utils.errors import UserError
from train.utils.files import write_json

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
    "rows": OPERATOR | {"category": str, "launches": NUMBER},
    "roofline": {"peak_flops": OPTIONAL, "peak_bytes_per_second": OPTIONAL, "points": list},
    "facts": {"run_type": str, "tokens_per_step": NUMBER, "block_size": NUMBER},
    "roofline.points": OPERATOR | {"intensity": OPTIONAL, "flops_per_second": OPTIONAL},
}
SAME_RUN = ("run_type", "tokens_per_step", "block_size")
Labels = Sequence[tuple[int, str]]
"""Number and name of each profiled run; the number chooses its colour."""

Kernels = dict[str, Any]
"""A run in `kernels.json`."""

IDENTITY = ("module", "phase", "operator", "kernel")
PLACE = ("module", "phase", "category")


def read_kernels(run: Run) -> Kernels | None:
    """The run's part of its `profile/kernels.json`; None for a run that was not profiled.

    Where the file is missing, or older than a trace beside it, it is made of the traces first.
    """
    path = run.folder / KERNELS_FILE
    traces = [trace.stat().st_mtime_ns for trace in path.parent.glob("rank-*.json.gz")]
    if traces and not (path.is_file() and path.stat().st_mtime_ns >= max(traces)):
        from train.kernels.__main__ import of_run  # it brings torch, for which a comparison does not wait otherwise

        content = of_run(run.folder)
        try:
            write_json(path, content)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
    if not path.is_file():
        return None
    content = parse(read(path), path)
    runs = content.get("runs") if isinstance(content, dict) else None
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise UserError(f"{path} is JSON, but not what python -m train.kernels writes")
    if content.get("schema") != KERNELS_SCHEMA or len(runs) > 1:
        raise UserError(
            f"{path} has schema {content.get('schema')!r} and {len(runs)} runs; this version of compare reads schema "
            f"{KERNELS_SCHEMA} of one run: python -m train.kernels {run.folder} --out {path.parent}"
        )
    for key, fields in KERNELS.items():
        table = look_up(runs[0], key)
        check_fields(path, key, table if isinstance(table, list) else [table], fields, "train.kernels")
    check_pipeline(path, runs[0].get("pipeline"))
    for key in SAME_RUN:
        if runs[0]["facts"][key] != run.get(key):
            raise UserError(
                f"{path}: is of another run: its {key} is {runs[0]['facts'][key]}, and {run.get(key)} in the run's "
                "metrics.json; profile the run again, or remove the profile"
            )
    if not runs[0]["step_seconds"]["mean"] > 0:
        raise UserError(f"{path}: its steps take {runs[0]['step_seconds']['mean']} seconds: it is not whole")
    check_text(runs[0], path)
    return runs[0]


def kernels_part(runs: Sequence[Run], kernels: Sequence[Kernels | None]) -> str:
    """The whole section, of what `read_kernels` gave for each run; empty where none was profiled."""
    labels, found_kernels = of_profiled(runs, kernels)
    if not labels:
        return ""
    profiled = list(zip([label for _, label in labels], found_kernels, strict=True))
    steps = ", ".join(f"{label} {milliseconds(found['step_seconds']['mean'])} ms" for label, found in profiled)
    note = f"Means of the profiled steps, the profiler's own cost included: {steps}. "
    missing = [run.label for run, found in zip(runs, kernels, strict=True) if not found]
    note += f"Not profiled: {', '.join(missing)}." if missing else ""
    charts = categories_card(labels, found_kernels) + roofline_card(labels, found_kernels)
    charts += "".join(pipeline_card(label, found["pipeline"]) for label, found in profiled if found.get("pipeline"))
    return (
        f"<h2>Kernels</h2><p>{text(verdict(labels, found_kernels))}</p>"
        f'<p class="quiet"><small>{text(note)}</small></p>'
        f'<div class="charts">{charts}</div>{places_table(labels, found_kernels)}'
        f"{rows_table(labels, found_kernels)}"
    )


def of_profiled(runs: Sequence[Run], kernels: Sequence[Kernels | None]) -> tuple[Labels, list[Kernels]]:
    """The profiled ones among the runs, by number and name, and what `read_kernels` gave for them."""
    there = [(index, run.label, found) for index, (run, found) in enumerate(zip(runs, kernels, strict=True)) if found]
    return [(index, label) for index, label, _ in there], [found for *_, found in there]


def kernels_sentence(runs: Sequence[Run], kernels: Sequence[Kernels | None]) -> str:
    """What makes the difference between the profiled runs; empty where there are not two."""
    labels, found = of_profiled(runs, kernels)
    return verdict(labels, found) if found else ""


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def sums(kernels: Kernels, names: Sequence[str], of: str = "seconds") -> dict[tuple[str, ...], float]:
    """Seconds (or launches) of a step by some of the names of its rows."""
    found: dict[tuple[str, ...], float] = {}
    for row in kernels["rows"]:
        key = tuple(row[name] for name in names)
        found[key] = found.get(key, 0.0) + row[of]
    return found


def by_change(seconds: Sequence[dict[tuple[str, ...], float]]) -> list[tuple[str, ...]]:
    """The keys of several runs, those first that change most; of one run, those that take longest."""

    def weight(key: tuple[str, ...]) -> float:
        values = [own.get(key, 0.0) for own in seconds]
        return max(abs(value - values[0]) for value in values[1:]) if len(values) > 1 else values[0]

    return sorted(dict.fromkeys(key for own in seconds for key in own), key=lambda key: -weight(key))


def named(key: tuple[str, ...]) -> str:
    """What a row is, in words; a kernel's name, which may go on for lines, is cut."""
    module, phase, operator, kernel = key
    kernel = kernel if len(kernel) <= LONGEST_NAME else kernel[: LONGEST_NAME - 1] + "…"
    what = f"{operator} ({kernel})" if operator and kernel else operator or kernel or "unknown"
    where = ", ".join(filter(None, (module, phase)))
    return what + (f" in {where}" if where else "")


def verdict(labels: Labels, kernels: Sequence[Kernels]) -> str:
    """How much faster a step is, and where most of that comes from, for each profiled run but the first."""
    first, sentences = sums(kernels[0], PLACE), []
    for (_, label), other in zip(labels[1:], kernels[1:], strict=True):
        second = sums(other, PLACE)
        steps = [found["step_seconds"]["mean"] for found in (kernels[0], other)]
        total = steps[0] - steps[1]
        changes = []
        for key in by_change([first, second])[:3]:
            saved = first.get(key, 0.0) - second.get(key, 0.0)
            share = f" ({saved / total:.0%})" if total else ""
            changes.append(f"{place(key)} {signed_milliseconds(saved)} ms{share}")
        sentences.append(
            f"A profiled step of {label} takes {milliseconds(steps[1])} ms, of {labels[0][1]} "
            f"{milliseconds(steps[0])}: {times(steps[0] / steps[1])} as fast. Saved, and the share of the gain: "
            f"{'; '.join(changes) or 'nothing'}."
        )
    return " ".join(sentences)


def place(key: tuple[str, ...]) -> str:
    *where, category = key
    return ": ".join(filter(None, (", ".join(filter(None, where)), category)))


def signed_milliseconds(saved: float) -> str:
    return ("+" if saved > 0 else "-" if saved < 0 else "") + milliseconds(abs(saved))


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


def places_table(labels: Labels, kernels: Sequence[Kernels]) -> str:
    """The runs aligned by module, phase and category, which are the same whatever kernels do the work."""
    seconds = [sums(found, PLACE) for found in kernels]
    launches = [sums(found, PLACE, "launches") for found in kernels]
    steps = [found["step_seconds"]["mean"] for found in kernels]
    several = len(labels) > 1
    header = cell("th", "work") + cell("th", labels[0][1])
    for _, label in labels[1:]:
        header += cell("th", label) + cell("th", "saved") + cell("th", "share of gain")
    header += cell("th", "launches") + cell("th", "most of it in", "wide")
    lines = []
    for key in by_change(seconds)[:SHOWN_ROWS]:
        first, *others = (own.get(key) for own in seconds)
        line = cell("th", place(key)) + time_cell(first)
        for other, step in zip(others, steps[1:], strict=True):
            saved = (first or 0.0) - (other or 0.0)
            share = f"{saved / (steps[0] - step):.1%}" if steps[0] != step else UNKNOWN
            line += time_cell(other) + saved_cell(saved) + cell("td", share)
        line += cell("td", " → ".join(f"{own.get(key, 0.0):,.0f}" for own in launches))
        line += cell("td", " → ".join(dict.fromkeys(largest(found, key) for found in kernels)), "wide")
        lines.append(f"<tr>{line}</tr>")
    title = "What made the difference, in ms a step" if several else "What takes longest, in ms a step"
    return f"<h3>{title}</h3>{scrolling('figures', header, lines)}"


def largest(kernels: Kernels, key: tuple[str, ...]) -> str:
    """The operator (and kernel) that takes most of a module's work of one category in one phase."""
    own = [row for row in kernels["rows"] if tuple(row[name] for name in PLACE) == key]
    if not own:
        return "nothing"
    row = max(own, key=lambda row: row["seconds"])
    return named(("", "", row["operator"], row["kernel"]))


def rows_table(labels: Labels, kernels: Sequence[Kernels]) -> str:
    """The same by operator and kernel, one click away."""
    seconds = [sums(found, IDENTITY) for found in kernels]
    header = cell("th", "operator") + cell("th", labels[0][1])
    header += "".join(cell("th", label) + cell("th", "saved") for _, label in labels[1:])
    lines = []
    for key in by_change(seconds)[:SHOWN_ROWS]:
        first, *others = (own.get(key) for own in seconds)
        line = cell("th", named(key)) + time_cell(first)
        for other in others:
            line += time_cell(other) + saved_cell((first or 0.0) - (other or 0.0))
        lines.append(f"<tr>{line}</tr>")
    return f"<details><summary>By operator and kernel</summary>{scrolling('figures', header, lines)}</details>"


def saved_cell(saved: float) -> str:
    return cell("td", signed_milliseconds(saved), "good" if saved > 0 else "bad" if saved < 0 else "", exact=saved)


def time_cell(seconds: float | None) -> str:
    return cell("td", UNKNOWN if seconds is None else milliseconds(seconds), exact=seconds)
