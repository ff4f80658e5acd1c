"""What finished runs differ in and how much each changed against the first: figures, warnings, and the verdict."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.checkpoints.run_folder import Run, times, unit_of
from train.compare.intervals import Spread, spreads

NOT_COMPARABLE = "NOT COMPARABLE LIKE FOR LIKE"
UNKNOWN = "—"
# Outside of CUDA; before p95 was taken; where no device says what it takes.
MAY_BE_MISSING = ("peak_memory_reserved_bytes", "inference_percentiles", "joules_per_token")
FEW_STEPS = 20


@dataclass(frozen=True)
class Figure:
    """A row of the table: where it lies in the summary, what it is called, and how it is written."""

    key: str
    title: str
    kind: str
    ratio: bool = False
    better: int = 0
    """1: more of it is better, -1: less, 0: neither."""


FIGURES = (
    Figure("tokens_per_second", "Training throughput", "rate", ratio=True, better=1),
    Figure("step_time_seconds.median", "Step time, median", "seconds", better=-1),
    Figure("step_time_seconds.p10", "Step time, 10th percentile", "seconds", better=-1),
    Figure("step_time_seconds.p90", "Step time, 90th percentile", "seconds", better=-1),
    Figure("data_share", "Waiting for data, share of a step", "fraction", better=-1),
    Figure("training_time_seconds", "Training time", "seconds", better=-1),
    Figure("time_per_epoch_seconds", "Time per epoch", "seconds", better=-1),
    Figure("train_loss", "Training loss, last steps", "nats", better=-1),
    Figure("val_loss", "Validation loss", "nats", better=-1),
    Figure("perplexity", "Perplexity", "perplexity", better=-1),
    Figure("peak_memory_bytes", "Peak memory", "bytes", ratio=True, better=-1),
    Figure("peak_memory_reserved_bytes", "Peak memory, reserved", "bytes", ratio=True, better=-1),
    Figure("joules_per_token", "Energy per token", "joules", ratio=True, better=-1),
    Figure("inference_latency_seconds", "Inference latency, first token", "seconds", better=-1),
    Figure("inference_percentiles.first_token.p95", "First token, 95th percentile", "seconds", better=-1),
    Figure("inference_percentiles.per_token.p50", "Each further token, median", "seconds", better=-1),
    Figure("inference_percentiles.per_token.p95", "Each further token, 95th percentile", "seconds", better=-1),
    Figure("inference_tokens_per_second", "Inference throughput", "rate", ratio=True, better=1),
    Figure("flops_per_second", "Model FLOP/s achieved", "flops", better=1),
    Figure("mfu", "MFU", "fraction", better=1),
    Figure("steps", "Optimizer steps", "count"),
    Figure("tokens", "Training tokens", "count"),
    Figure("tokens_per_step", "Tokens per step", "count"),
    Figure("parameters", "Parameters", "count"),
    Figure("world_size", "Processes", "count"),
    Figure("run_type", "Run type", "text"),
    Figure("precision", "Precision", "text"),
    Figure("attn_implementation", "Attention kernel", "text"),
    Figure("peak_memory_kind", "Memory measured as", "text"),
)


# What differs


def differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Everything that could explain a figure other than what is being compared.

    kind "comparability": the runs did not do the same work. kind "environment": they did it elsewhere. Each entry
    holds the key and its value in every run.
    """
    model_keys = sorted({key for run in runs for key in run.summary["model"]})
    work: dict[str, list[Any]] = {key: [run.get(key) for run in runs] for key in ("tokens_per_step", "steps")}
    work["block_size"] = [run.get("block_size") for run in runs]
    work["seed"] = [run.get("config.seed") for run in runs]
    work["model"] = [run.get("config.model") for run in runs]
    work["dropout"] = [run.get("config.dropout") for run in runs]
    work["document_mask"] = [run.get("config.document_mask") for run in runs]
    work["val_tokens"] = [run.get("val_tokens") for run in runs]
    work["train_data"] = data_names(runs, "train")
    work["val_data"] = data_names(runs, "val")
    work |= {f"model.{key}": [run.get(f"model.{key}") for run in runs] for key in model_keys}
    place: dict[str, list[Any]] = {"world_size": [run.get("world_size") for run in runs]}
    place["peak_memory_kind"] = [run.get("peak_memory_kind") for run in runs]
    for part in ("hardware", "versions"):
        place |= side_by_side([flatten(run.summary[part], f"{part}.") for run in runs])
    return [
        {"kind": kind, "key": key, "values": dict(zip((run.label for run in runs), values, strict=True))}
        for kind, table in (("comparability", work), ("environment", place))
        for key, values in table.items()
        if any(value != values[0] for value in values)
    ]


def data_names(runs: Sequence[Run], split: str) -> list[str]:
    """One name for each run's data: equal names are the same data. The hash decides if every run has one."""
    found = [run.get(f"data.{split}") or {} for run in runs]
    by_hash = all(data.get("sha256") for data in found)
    first_path: dict[Any, str] = {}
    names = []
    for data in found:
        if not data:
            names.append("none")
            continue
        digest = data.get("sha256")
        # With the same hash under two paths, the first path stands for both.
        path = first_path.setdefault(digest, str(data.get("path"))) if by_hash else str(data.get("path"))
        tokens = data.get("tokens")
        size = f"{tokens:,} tokens" if isinstance(tokens, int) else "unknown size"
        names.append(f"{path} ({size}, sha256 {str(digest)[:12]})" if by_hash else f"{path} ({size})")
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


def side_by_side(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Key → its value in each table (None where it is missing), in the order in which keys first appear."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: [table.get(key) for table in tables] for key in keys}


def configurations(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in every run."""
    table = side_by_side([flatten(run.summary["config"]) for run in runs])
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def warnings(runs: Sequence[Run], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What must be read before the figures, the gravest first."""
    lines = []
    for difference in found:
        values = ", ".join(f"{label} {shown(value)}" for label, value in difference["values"].items())
        head = NOT_COMPARABLE if difference["kind"] == "comparability" else "Different environment"
        lines.append(f"{head}: {difference['key']}: {values}")
    for run in runs:
        if run.get("steps") and run.get("train_loss") is None:
            lines.append(f"Diverged: {run.label}: the training loss of its last steps is not a number")
        if run.get("val_loss") is None:
            lines.append(f"No validation loss: {run.label}")
        if (run.get("steps") or 0) < FEW_STEPS:
            lines.append(f"Short run: {run.label}: {shown(run.get('steps'))} steps say little about speed")
    return lines + [line for run in runs[1:] if (line := within_spread(runs[0], run))]


def within_spread(first: Run, run: Run) -> str:
    """Says that two speeds differ by less than each varies in itself; else empty."""
    before, after = (spreads(each).get("tokens_per_second") for each in (first, run))
    if before is None or after is None or not before.overlaps(after) or before.median == after.median:
        return ""
    return (
        f"Speeds overlap: in windows, {run.label} makes {after.low:,.0f} to {after.high:,.0f} tokens/s and "
        f"{first.label} {before.low:,.0f} to {before.high:,.0f}: measure again on a quiet machine"
    )


# What changed


def change(figure: Figure, first: Run, run: Run) -> dict[str, float] | None:
    """A later run's figure against the first's, in per cent and as a ratio; None where that says nothing."""
    before, after = first.get(figure.key), run.get(figure.key)
    if figure.kind == "text" or before is None or after is None or before == 0:
        return None
    if figure.kind == "bytes" and first.get("peak_memory_kind") != run.get("peak_memory_kind"):
        return None  # resident memory of a process against tensors on a GPU
    if figure.kind == "joules" and first.get("energy_covers") != run.get("energy_covers"):
        return None  # CPUs against GPUs
    return {"percent": 100 * (after - before) / before, "ratio": after / before}


def changes(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, float] | None]]:
    return {run.label: {figure.key: change(figure, runs[0], run) for figure in FIGURES} for run in runs[1:]}


def verdict(runs: Sequence[Run], found: Sequence[Mapping[str, Any]]) -> str:
    """The comparison in one sentence."""
    keys = {difference["key"] for difference in found if difference["kind"] == "comparability"}
    sentence = "; ".join(verdict_on(runs[0], run, same_validation="val_data" not in keys) for run in runs[1:]) + "."
    return f"Not like for like ({', '.join(sorted(keys))}): {sentence}" if keys else sentence


def verdict_on(first: Run, run: Run, same_validation: bool) -> str:
    measured = {figure.key: change(figure, first, run) for figure in FIGURES}
    speed, memory = measured["tokens_per_second"], measured["peak_memory_bytes"]
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
class Row:
    """A row as it is written: a cell for each run, and for each run but the first its change and whether that is good.

    `good` is None where there is no better or worse, or no change.
    """

    title: str
    cells: list[str]
    changes: list[str]
    good: list[bool | None]
    values: list[Any]


def figure_rows(runs: Sequence[Run]) -> list[Row]:
    rows = []
    windows = [spreads(run) for run in runs]
    for figure in FIGURES:
        values = [run.get(figure.key) for run in runs]
        if figure.key.startswith(MAY_BE_MISSING) and all(value is None for value in values):
            continue
        title, cells = written(figure, values)
        rows.append(Row(title, cells, *changes_of(figure, [change(figure, runs[0], run) for run in runs[1:]]), values))
        found = [by_key.get(figure.key) for by_key in windows]
        if any(found):
            rows.append(windows_row(figure, found))
    return rows


def windows_row(figure: Figure, found: Sequence[Spread | None]) -> Row:
    """The same figure over windows, as `windows_note` explains."""
    highest = max(spread.high for spread in found if spread)
    divisor, unit, decimals = unit_of(figure.kind, highest)
    cells = []
    for spread in found:
        numbers = (
            [f"{value / divisor:,.{decimals}f}" for value in (spread.median, spread.low, spread.high)]
            if spread
            else []
        )
        cells.append("{} ({} … {})".format(*numbers) if numbers else UNKNOWN)
    ratios = [spread.median / found[0].median if spread and found[0] else None for spread in found[1:]]
    compared = [None if ratio is None else {"percent": 100 * (ratio - 1), "ratio": ratio} for ratio in ratios]
    title = f"{figure.title.removesuffix(', median')} in windows ({unit})"
    return Row(title, cells, *changes_of(figure, compared), [spread and spread.median for spread in found])


def windows_note(runs: Sequence[Run]) -> str:
    steps = {run.label: found["tokens_per_second"].steps for run in runs if (found := spreads(run))}
    if not steps:
        return "The runs are too short to be cut into windows."
    lengths = ", ".join(f"{count} steps ({label})" for label, count in steps.items())
    return f"In windows: median (lowest … highest) of stretches after the first step, each of {lengths}."


def changes_of(figure: Figure, found: Sequence[Mapping[str, float] | None]) -> tuple[list[str], list[bool | None]]:
    return [written_change(figure, each) for each in found], [is_good(figure, each) for each in found]


def is_good(figure: Figure, found: Mapping[str, float] | None) -> bool | None:
    """Whether a change is for the better; None where there is no better or worse, or no change that is written."""
    if found is None or not figure.better or not round(found["percent"], 1):
        return None
    return figure.better * found["percent"] > 0


def written(figure: Figure, values: Sequence[Any]) -> tuple[str, list[str]]:
    """The row's title with the unit, and its cells, all in the unit that suits the largest."""
    if figure.kind == "text":
        return figure.title, [shown(value) for value in values]
    divisor, unit, decimals = unit_of(figure.kind, max((value for value in values if value is not None), default=0))
    cells = [UNKNOWN if value is None else f"{value / divisor:,.{decimals}f}" for value in values]
    return (f"{figure.title} ({unit})" if unit else figure.title), cells


def written_change(figure: Figure, found: Mapping[str, float] | None) -> str:
    if found is None:
        return "" if figure.kind == "text" else UNKNOWN
    if figure.kind == "count" and found["percent"] == 0:
        return "same"
    percent = f"{round(found['percent'], 1) or 0.0:+,.1f} %"
    return f"{percent} ({times(found['ratio'])})" if figure.ratio else percent


def signed(difference: float) -> str:
    """A difference in loss with its sign, which a difference that rounds to nothing has not."""
    return f"{round(difference, 3) or 0.0:+.3f}"


def shown(value: Any) -> str:
    return UNKNOWN if value is None else str(value)
