"""Compare finished runs: what changed in speed, memory and quality, and whether the comparison is a fair one."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.checkpoints.run_folder import FinishedRun, read_runs
from train.compare.figures import (
    NOT_COMPARABLE,
    changes,
    configurations,
    differences,
    figure_rows,
    flatten,
    intervals_note,
    shown,
    side_by_side,
    verdict,
    warnings,
)
from train.compare.gate import EXAMPLE as GATE_EXAMPLE
from train.compare.gate import Result, check, parse_gate
from train.compare.intervals import spreads
from train.compare.plots import draw
from train.compare.report.kernels import kernels_sentence
from train.compare.report.page import page
from train.kernels.comparison import read_profile
from train.kernels.summary import RunSummary
from train.metrics.memory_profile import MemoryProfile, read_memory
from train.utils.command import run_command
from train.utils.errors import UserError
from train.utils.files import atomic_write, write_json, write_text
from train.utils.tables import markdown_table

EXAMPLE = "python -m train.compare checkpoint/baseline checkpoint/optimized --out comparison"


# The tables


def figures_table(runs: Sequence[FinishedRun]) -> str:
    header = ["", runs[0].label]
    for run in runs[1:]:
        header += [run.label, "change"]
    rows = []
    for row in figure_rows(runs):
        after = zip(row.cells[1:], row.changes, strict=True)
        rows.append([row.title, row.cells[0], *(cell for pair in after for cell in pair)])
    return markdown_table(header, rows)


# The report


def report(
    runs: Sequence[FinishedRun],
    found: Sequence[Mapping[str, Any]],
    gate: Sequence[Result],
    kernels: Sequence[RunSummary | None],
) -> str:
    labels = [run.label for run in runs]
    lines = warnings(runs, found)
    critical = [line for line in lines if line.startswith(NOT_COMPARABLE)]
    parts = ["# Comparison: " + " and ".join(labels)]
    parts += ["\n".join(f"> **{line}**  " for line in critical)] if critical else []
    parts += [f"**{verdict(runs, found)}**"]
    parts += ["\n".join(f"- {line}" for line in lines if line not in critical)] if len(lines) > len(critical) else []
    parts += ["## Gate", "\n".join(f"- {result.sentence}" for result in gate)] if gate else []
    parts += ["## Figures", figures_table(runs), f"Changes are against {labels[0]}. {intervals_note(runs)}"]
    changed = kernels_sentence(runs, kernels)
    parts += ["## Kernels", changed] if changed else []
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


def settings_table(settings: Mapping[str, Sequence[Any]], labels: Sequence[str], empty: str = "None recorded.") -> str:
    rows = [[key, *map(shown, values)] for key, values in settings.items()]
    return markdown_table(["", *labels], rows) if rows else empty


def sample_of(run: FinishedRun) -> str:
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


def as_json(runs: Sequence[FinishedRun], found: Sequence[Mapping[str, Any]], gate: Sequence[Result]) -> dict[str, Any]:
    return {
        "schema": 1,
        "verdict": verdict(runs, found),
        "comparable": not any(difference["kind"] == "comparability" for difference in found),
        "differences": list(found),
        "warnings": warnings(runs, found),
        "first": runs[0].label,
        "changes": changes(runs),
        "intervals": {run.label: {key: spread.as_json() for key, spread in spreads(run).items()} for run in runs},
        "gate": [result.as_json() for result in gate],
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
        description="Compare finished runs: speed, memory and loss of each against the first, as a page that opens "
        "anywhere, as Markdown with plots, and as JSON. Runs that did different work are compared only under a "
        "warning.",
        epilog=f"examples:\n  {EXAMPLE}\n  {EXAMPLE} \\\n      --gate '{GATE_EXAMPLE}'\n\n"
        "The first run is the one that the others are measured against. A gate's metrics have their names in\n"
        "metrics.json (peak_memory is short for peak_memory_bytes); 1.2x is times the first run's figure, +0.02 is\n"
        "that much more than it, a bare number is the figure itself. The exit code is 1 when a run misses a\n"
        "condition, or when a figure is unknown or not comparable.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run's folder, with its metrics.json")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        metavar="FOLDER",
        help="where report.html, report.md, comparison.json and five PNG plots go; made if missing "
        "(default: %(default)s)",
    )
    parser.add_argument("--gate", metavar="CONDITIONS", help="what every run but the first has to meet, by commas")
    return parser.parse_args(argv)


def write(
    folder: Path,
    runs: Sequence[FinishedRun],
    found: Sequence[Mapping[str, Any]],
    gate: Sequence[Result],
    kernels: Sequence[RunSummary | None],
    memories: Sequence[MemoryProfile | None],
) -> None:
    """Everything is made before the first byte is written; the reports, which show the rest, come last."""
    plots, text, data = draw(runs), report(runs, found, gate, kernels), as_json(runs, found, gate)
    html = page(runs, found, gate, kernels, memories, data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in plots.items():
            with atomic_write(folder / name) as temporary:
                temporary.write_bytes(png)
        write_json(folder / "comparison.json", data)
        write_text(folder / "report.md", text)
        write_text(folder / "report.html", html)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror}") from None


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if len(arguments.runs) < 2:
        raise UserError(f"compare needs two run folders or more, not {len(arguments.runs)}: {EXAMPLE}")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out} is a file: give a folder")
    conditions = parse_gate(arguments.gate) if arguments.gate is not None else []
    runs = read_runs(arguments.runs)
    found = differences(runs)
    gate = check(conditions, runs, found)
    kernels = [read_profile(run.folder, run.summary) for run in runs]
    memories = [read_memory(run.folder) for run in runs]
    write(arguments.out, runs, found, gate, kernels, memories)
    lines = warnings(runs, found)
    print("\n".join([*lines, ""]) if lines else "", end="\n" if lines else "")
    print(f"{verdict(runs, found)}\n\n{figures_table(runs)}\n\nReport: {arguments.out / 'report.html'}")
    for result in gate:
        print(result.sentence)
    if not all(result.met for result in gate):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
