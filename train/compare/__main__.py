"""Compare finished runs: what changed in speed, memory and loss, and whether the runs are comparable."""

import argparse
import sys
from pathlib import Path

from train.checkpoints.run_folder import read_runs
from train.compare.charts import pngs
from train.compare.figures import differences, verdict, warnings
from train.compare.gate import EXAMPLE as GATE_EXAMPLE
from train.compare.gate import check, parse_gate
from train.compare.report.content import Report
from train.compare.report.kernels import kernels_section
from train.compare.report.memory import memory_charts
from train.compare.run_charts import draw
from train.config.arguments import ArgumentParser
from train.kernels.comparison import read_profile
from train.metrics.memory_profile import read_memory
from train.utils.command import run_command
from train.utils.errors import FAILED, UserError
from train.utils.files import atomic_write, write_json, write_text

EXAMPLE = "python -m train.compare checkpoint/baseline checkpoint/optimized --out comparison"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m train.compare",
        description="Compare finished runs: speed, memory and loss of each against the first, as a self-contained "
        "page, as Markdown with charts, and as JSON. Runs that did different work are compared only under a warning.",
        epilog=f"examples:\n  {EXAMPLE}\n  {EXAMPLE} \\\n      --gate '{GATE_EXAMPLE}'\n\n"
        "The first run is the one that the others are compared with. A gate's metrics have their names in\n"
        "metrics.json (peak_memory is short for peak_memory_bytes); 1.2x is times the first run's value, +0.02 is\n"
        "that much more than it, a bare number is the value itself. The exit code is 1 when a run misses a\n"
        "condition, or when a value is unknown or not comparable.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="a run folder with its metrics.json")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        metavar="FOLDER",
        help="folder for report.html, report.md, comparison.json and PNG charts; created if missing "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--gate", metavar="CONDITIONS", help="conditions for every run but the first, separated by commas"
    )
    return parser.parse_args(argv)


def write(folder: Path, report: Report) -> None:
    """Create everything before the first byte is written; the reports, which show the rest, are written last."""
    images, text, data, html = pngs(report.charts), report.markdown(), report.as_json(), report.html()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in images.items():
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
    kernels = [read_profile(run.folder, run.summary) for run in runs]
    memories = [read_memory(run.folder) for run in runs]
    found = differences(runs)
    report = Report(
        runs,
        found,
        verdict(runs, found),
        warnings(runs, found),
        check(conditions, runs, found),
        draw(runs),
        kernels_section(runs, kernels),
        memory_charts(runs, memories),
    )
    write(arguments.out, report)
    if report.warnings:
        print("\n".join(report.warnings), end="\n\n")
    print(f"{report.verdict}\n\n{report.figures_table()}\n\nReport: {arguments.out / 'report.html'}")
    for result in report.gate:
        print(result.sentence)
    if not all(result.met for result in report.gate):
        sys.exit(FAILED)


if __name__ == "__main__":
    run_command(main)
