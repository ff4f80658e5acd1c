"""What finished runs differ in and how much each changed against the first: metrics, warnings, and the verdict."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.checkpoints.run_folder import FinishedRun
from train.compare.intervals import Spread, spreads
from train.metrics.table import BY_KEY, METRICS, Metric
from train.utils.units import times, unit_of

NOT_COMPARABLE = "NOT COMPARABLE"
UNKNOWN = "—"
FEW_STEPS = 20
# What decides which work was done, apart from the data and the shape of the model.
SAME_WORK = ("tokens_per_step", "steps", "block_size", "config.seed", "config.model", "config.dropout",
             "config.document_mask", "val_tokens")  # fmt: skip


# What differs


def differences(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """Everything that could explain a metric's change, apart from what is being compared.

    Kind "comparability": the runs did different work. Kind "environment": they did it on different machines or with
    different software. Each entry holds the key and its value in every run.
    """
    model_keys = sorted({f"model.{key}" for run in runs for key in run.summary["model"]})
    work = {key.removeprefix("config."): [run.get(key) for run in runs] for key in SAME_WORK}
    work |= {"train_data": data_names(runs, "train"), "val_data": data_names(runs, "val")}
    work |= {key: [run.get(key) for run in runs] for key in model_keys}
    environment = {key: [run.get(key) for run in runs] for key in ("world_size", "peak_memory_kind")}
    environment |= side_by_side(runs, "hardware", "hardware.") | side_by_side(runs, "versions", "versions.")
    return [
        {"kind": kind, "key": key, "values": dict(zip((run.label for run in runs), values, strict=True))}
        for kind, table in (("comparability", work), ("environment", environment))
        for key, values in differing(table).items()
    ]


def differing(table: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same in every run."""
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def data_names(runs: Sequence[FinishedRun], split: str) -> list[str]:
    """One name for each run's data: equal names are the same data. The hash decides if every run has one."""
    found = [run.get(f"data.{split}") or {} for run in runs]
    by_hash = all(data.get("sha256") for data in found)
    first_path: dict[Any, Any] = {}
    names = []
    for data in found:
        path, tokens, digest = (data.get(key) for key in ("path", "tokens", "sha256"))
        size = f"{tokens:,} tokens" if isinstance(tokens, int) else "unknown size"
        if by_hash:  # with the same hash under two paths, the first path stands for both
            path, size = first_path.setdefault(digest, path), f"{size}, sha256 {str(digest)[:12]}"
        names.append(f"{path} ({size})" if data else "none")
    return names


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists as their JSON."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(inner, ensure_ascii=False) if isinstance(inner, list) else inner
    return flat


def side_by_side(runs: Sequence[FinishedRun], part: str, prefix: str = "") -> dict[str, list[Any]]:
    """Key → its value in that part of each summary (None where it is missing), in the order of first appearance."""
    tables = [flatten(run.summary[part], prefix) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: [table.get(key) for table in tables] for key in keys}


def warnings(runs: Sequence[FinishedRun], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must be read before the metrics, the most critical first."""
    lines = []
    for difference in found:
        values = ", ".join(f"{label} {shown(value)}" for label, value in difference["values"].items())
        head = NOT_COMPARABLE if difference["kind"] == "comparability" else "Different environment"
        lines.append(f"{head}: {difference['key']}: {values}")
    for run in runs:
        if run.missing:
            lines.append(f"Records missing: {run.label}: {run.missing}: the curves have gaps there")
        if run.get("steps") and run.get("train_loss") is None:
            lines.append(f"Diverged: {run.label}: the training loss of its last steps is not a number")
        if run.get("val_loss") is None:
            lines.append(f"No validation loss: {run.label}")
        if (run.get("steps") or 0) < FEW_STEPS:
            lines.append(f"Short run: {run.label}: {shown(run.get('steps'))} steps say little about speed")
    return lines + [line for run in runs[1:] if (line := within_spread(runs[0], run))]


def within_spread(first: FinishedRun, run: FinishedRun) -> str:
    """A warning that two speeds differ by less than each of them varies; empty if they differ by more."""
    before, after = (spreads(each).get("tokens_per_second") for each in (first, run))
    if before is None or after is None or before.median == after.median:
        return ""
    if before.high < after.low or after.high < before.low:
        return ""
    return (
        f"Speeds overlap: over intervals, {run.label} makes {after.low:,.0f} to {after.high:,.0f} tokens/s and "
        f"{first.label} {before.low:,.0f} to {before.high:,.0f}: measure again on a quiet machine"
    )


# What changed


def change(metric: Metric, first: FinishedRun, run: FinishedRun) -> dict[str, float] | None:
    """A later run's metric against the first's, in percent and as a ratio; None where they are not comparable."""
    before, after = first.get(metric.key), run.get(metric.key)
    if metric.kind == "text" or before is None or after is None or before == 0:
        return None
    if metric.same and first.get(metric.same) != run.get(metric.same):
        return None  # such as the resident memory of a process against tensors on a GPU
    return {"percent": 100 * (after - before) / before, "ratio": after / before}


def verdict(runs: Sequence[FinishedRun], found: Sequence[Mapping[str, Any]]) -> str:
    """The comparison in one sentence."""
    keys = {difference["key"] for difference in found if difference["kind"] == "comparability"}
    sentence = "; ".join(verdict_on(runs[0], run, same_validation="val_data" not in keys) for run in runs[1:]) + "."
    return f"Not comparable ({', '.join(sorted(keys))}): {sentence}" if keys else sentence


def verdict_on(first: FinishedRun, run: FinishedRun, same_validation: bool) -> str:
    speed, memory = (change(BY_KEY[key], first, run) for key in ("tokens_per_second", "peak_memory_bytes"))
    losses = first.get("val_loss"), run.get("val_loss")
    text = f"{run.label} trains {times(speed['ratio'])} as fast as {first.label}" if speed else ""
    text = text or f"{run.label} against {first.label}: training speed unknown"
    text += f" in {times(memory['ratio'])} of the memory" if memory else ", memory not comparable"
    if not same_validation:
        return text + ", validation losses are of different data"
    if losses[0] is None or losses[1] is None:
        return text + ", validation loss unknown"
    return text + f", validation loss {signed(losses[1] - losses[0])}"


# Rows of the table


@dataclass(frozen=True)
class TableRow:
    """A row as it is written: a cell for each run, and for each run but the first its change and whether that is good.

    `good` is None where there is no better or worse, or no change. `values` are the exact numbers of the cells.
    """

    title: str
    cells: list[str]
    changes: list[str]
    good: list[bool | None]
    values: list[Any]


def figure_rows(runs: Sequence[FinishedRun]) -> list[TableRow]:
    rows = []
    of_intervals = [spreads(run) for run in runs]
    for metric in METRICS:
        values = [run.get(metric.key) for run in runs]
        if not metric.required and all(value is None for value in values):
            continue
        rows.append(row(metric, *written(metric, values), [change(metric, runs[0], run) for run in runs[1:]], values))
        found = [by_key.get(metric.key) for by_key in of_intervals]
        if any(found):
            rows.append(intervals_row(metric, found))
    return rows


def row(
    metric: Metric, title: str, cells: list[str], found: Sequence[Mapping[str, float] | None], values: list[Any]
) -> TableRow:
    changes, good = [written_change(metric, each) for each in found], [is_good(metric, each) for each in found]
    return TableRow(title, cells, changes, good, values)


def intervals_row(metric: Metric, found: Sequence[Spread | None]) -> TableRow:
    """The same metric over intervals, as `intervals_note` explains."""
    divisor, unit, decimals = unit_of(metric.kind, max(spread.high for spread in found if spread))
    cells = [UNKNOWN] * len(found)
    for index, spread in enumerate(found):
        if spread:
            numbers = [f"{value / divisor:,.{decimals}f}" for value in (spread.median, spread.low, spread.high)]
            cells[index] = "{} ({} … {})".format(*numbers)
    ratios = [spread.median / found[0].median if spread and found[0] else None for spread in found[1:]]
    compared = [None if ratio is None else {"percent": 100 * (ratio - 1), "ratio": ratio} for ratio in ratios]
    title = f"{metric.title.removesuffix(', median')} over intervals ({unit})"
    return row(metric, title, cells, compared, [spread and spread.median for spread in found])


def intervals_note(runs: Sequence[FinishedRun]) -> str:
    steps = {run.label: found["tokens_per_second"].steps_per_interval for run in runs if (found := spreads(run))}
    if not steps:
        return "The runs are too short to be split into intervals."
    lengths = ", ".join(f"{count} steps ({label})" for label, count in steps.items())
    return f"Over intervals: median (lowest … highest) of intervals after the first step, each of {lengths}."


def is_good(metric: Metric, found: Mapping[str, float] | None) -> bool | None:
    """Whether a change is an improvement; None where there is no better or worse, or the change rounds to nothing."""
    if found is None or not metric.better or not round(found["percent"], 1):
        return None
    return metric.better * found["percent"] > 0


def written(metric: Metric, values: Sequence[Any]) -> tuple[str, list[str]]:
    """The row's title with the unit, and its cells, all in the unit that suits the largest value."""
    if metric.kind == "text":
        return metric.title, [shown(value) for value in values]
    divisor, unit, decimals = unit_of(metric.kind, max((value for value in values if value is not None), default=0))
    cells = [UNKNOWN if value is None else f"{value / divisor:,.{decimals}f}" for value in values]
    return (f"{metric.title} ({unit})" if unit else metric.title), cells


def written_change(metric: Metric, found: Mapping[str, float] | None) -> str:
    if found is None:
        return "" if metric.kind == "text" else UNKNOWN
    if metric.kind == "count" and found["percent"] == 0:
        return "same"
    percent = f"{round(found['percent'], 1) or 0.0:+,.1f} %"
    return f"{percent} ({times(found['ratio'])})" if metric.ratio else percent


def signed(difference: float) -> str:
    """A difference in loss with its sign; "+0.000" if it rounds to nothing."""
    return f"{round(difference, 3) or 0.0:+.3f}"


def shown(value: Any) -> str:
    return UNKNOWN if value is None else str(value)
