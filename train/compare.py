"""Compare finished runs: what changed in speed, memory and quality, and whether the comparison is a fair one."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.compare_plots import draw
from train.compare_runs import Run, read_runs, times, unit_of
from train.errors import UserError, run_command
from train.files import write_json, write_text, written_aside

EXAMPLE = "python -m train.compare checkpoint/baseline checkpoint/optimized --out comparison"

NOT_COMPARABLE = "NOT COMPARABLE LIKE FOR LIKE"
UNKNOWN = "—"
FEW_STEPS = 20


@dataclass(frozen=True)
class Figure:
    """A row of the table: where it lies in the summary, what it is called, and how it is written."""

    key: str
    title: str
    kind: str
    ratio: bool = False


FIGURES = (
    Figure("tokens_per_second", "Training throughput", "rate", ratio=True),
    Figure("step_time_seconds.median", "Step time, median", "seconds"),
    Figure("step_time_seconds.p10", "Step time, 10th percentile", "seconds"),
    Figure("step_time_seconds.p90", "Step time, 90th percentile", "seconds"),
    Figure("data_share", "Waiting for data, share of a step", "fraction"),
    Figure("training_time_seconds", "Training time", "seconds"),
    Figure("time_per_epoch_seconds", "Time per epoch", "seconds"),
    Figure("train_loss", "Training loss, last steps", "nats"),
    Figure("val_loss", "Validation loss", "nats"),
    Figure("perplexity", "Perplexity", "perplexity"),
    Figure("peak_memory_bytes", "Peak memory", "bytes", ratio=True),
    Figure("peak_memory_reserved_bytes", "Peak memory, reserved", "bytes", ratio=True),
    Figure("inference_latency_seconds", "Inference latency, first token", "seconds"),
    Figure("inference_tokens_per_second", "Inference throughput", "rate", ratio=True),
    Figure("flops_per_second", "Model FLOP/s achieved", "flops"),
    Figure("mfu", "MFU", "fraction"),
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
    work["follow"] = [run.get("config.follow") for run in runs]
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
    return lines


# What changed


def change(figure: Figure, first: Run, run: Run) -> dict[str, float] | None:
    """A later run's figure against the first's, in per cent and as a ratio; None where that says nothing."""
    before, after = first.get(figure.key), run.get(figure.key)
    if figure.kind == "text" or before is None or after is None or before == 0:
        return None
    if figure.kind == "bytes" and first.get("peak_memory_kind") != run.get("peak_memory_kind"):
        return None  # resident memory of a process against tensors on a GPU
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
    return text + f", validation loss {losses[1] - losses[0] or 0.0:+.3f}"


# Tables


def figures_table(runs: Sequence[Run]) -> str:
    header = ["", runs[0].label]
    for run in runs[1:]:
        header += [run.label, "change"]
    rows = []
    for figure in FIGURES:
        values = [run.get(figure.key) for run in runs]
        if all(value is None for value in values) and figure.key == "peak_memory_reserved_bytes":
            continue  # no such thing outside CUDA
        title, cells = written(figure, values)
        row = [title, cells[0]]
        for run, cell in zip(runs[1:], cells[1:], strict=True):
            row += [cell, written_change(figure, change(figure, runs[0], run))]
        rows.append(row)
    return markdown_table(header, rows)


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


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as plain text too: the first column to the left, figures to the right."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, rule)
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    )


def shown(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


# The report


def report(runs: Sequence[Run], found: Sequence[Mapping[str, Any]]) -> str:
    labels = [run.label for run in runs]
    said = warnings(runs, found)
    grave = [line for line in said if line.startswith(NOT_COMPARABLE)]
    parts = ["# Comparison: " + " and ".join(labels)]
    parts += ["\n".join(f"> **{line}**  " for line in grave)] if grave else []
    parts += [f"**{verdict(runs, found)}**"]
    parts += ["\n".join(f"- {line}" for line in said if line not in grave)] if len(said) > len(grave) else []
    parts += ["## Figures", figures_table(runs), f"Changes are against {labels[0]}."]
    parts += ["## Plots"]
    parts += [
        "![Training throughput in tokens per second over optimizer steps](throughput.png)",
        "![Training loss over training tokens](training_loss.png)",
        "![Validation loss over training tokens](validation_loss.png)",
        "![Time per epoch of each run](time_per_epoch.png)",
        "![Peak memory of each run](peak_memory.png)",
    ]
    parts += [
        "## Configuration differences",
        settings_table(configurations(runs), labels, "The configurations agree."),
    ]
    parts += ["## Attention", "\n".join(f"- {run.label}: {run.get('attn_reason')}" for run in runs)]
    parts += ["## Samples", *[sample_of(run) for run in runs]]
    for title, key in [("Model", "model"), ("Data", "data"), ("Hardware", "hardware"), ("Versions", "versions")]:
        parts += [f"## {title}", settings_table(side_by_side([flatten(run.summary[key]) for run in runs]), labels)]
    return "\n\n".join(parts) + "\n"


def configurations(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in every run."""
    table = side_by_side([flatten(run.summary["config"]) for run in runs])
    return {key: values for key, values in table.items() if any(value != values[0] for value in values)}


def settings_table(settings: Mapping[str, Sequence[Any]], labels: Sequence[str], empty: str = "None recorded.") -> str:
    rows = [[key, *map(shown, values)] for key, values in settings.items()]
    return markdown_table(["", *labels], rows) if rows else empty


def sample_of(run: Run) -> str:
    """A run's text in a fence longer than any in the text, which a model may well have learnt to write."""
    sample = run.get("sample")
    if not isinstance(sample, dict):
        return f"### {run.label}\n\nNo sample was taken."
    text = f"{sample.get('text')}"
    fence = "```"
    while fence in text:
        fence += "`"
    prompt = json.dumps(sample.get("prompt"), ensure_ascii=False)
    return f"### {run.label}\n\nPrompt: {prompt}\n\n{fence}text\n{text}\n{fence}"


def as_json(runs: Sequence[Run], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "schema": 1,
        "verdict": verdict(runs, found),
        "comparable": not any(difference["kind"] == "comparability" for difference in found),
        "differences": list(found),
        "warnings": warnings(runs, found),
        "first": runs[0].label,
        "changes": changes(runs),
        "configuration_differences": {
            key: dict(zip((run.label for run in runs), values, strict=True))
            for key, values in configurations(runs).items()
        },
        "runs": [{"label": run.label, "folder": str(run.folder), "summary": run.summary} for run in runs],
    }


# The command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.compare",
        description="Compare finished runs: speed, memory and loss of each against the first, with plots and a "
        "report. Runs that did different work are compared only with that said on top.",
        epilog=f"example:\n  {EXAMPLE}\n\nThe first run is the one that the others are measured against.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run's folder, with its metrics.json")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        metavar="FOLDER",
        help="where report.md, comparison.json and five PNG plots go; made if missing (default: %(default)s)",
    )
    return parser.parse_args(argv)


def write(folder: Path, runs: Sequence[Run], found: Sequence[Mapping[str, Any]]) -> None:
    """Everything is made before the first byte is written; the report, which shows the rest, comes last."""
    plots, text, data = draw(runs), report(runs, found), as_json(runs, found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in plots.items():
            with written_aside(folder / name) as aside:
                aside.write_bytes(png)
        write_json(folder / "comparison.json", data)
        write_text(folder / "report.md", text)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}") from None


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if len(arguments.runs) < 2:
        raise UserError(f"compare needs two run folders or more, not {len(arguments.runs)}: {EXAMPLE}")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a file: give a folder")
    runs = read_runs(arguments.runs)
    found = differences(runs)
    write(arguments.out, runs, found)
    said = warnings(runs, found)
    print("\n".join([*said, ""]) if said else "", end="\n" if said else "")
    print(f"{verdict(runs, found)}\n\n{figures_table(runs)}\n\nReport: {arguments.out / 'report.md'}")


if __name__ == "__main__":
    run_command(main)
