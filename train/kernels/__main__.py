"""Where the time of a step goes, operator by operator, and which of them make one run faster than another.

Reads only the traces that `python -m train --profile` wrote, of every process.
"""

from collections.abc import Sequence
from pathlib import Path

from train.config.arguments import ArgumentParser
from train.kernels.attribution import CATEGORIES
from train.kernels.breakdown import summarize
from train.kernels.comparison import compare, speedup_sentence
from train.kernels.summary import Change, Comparison, PipelineTimeline, Row, RunSummary, write_kernels
from train.kernels.traces import read_recording
from train.utils.command import run_command
from train.utils.errors import UserError
from train.utils.files import write_text
from train.utils.tables import markdown_table
from train.utils.units import milliseconds

EXAMPLE = """\
examples:
  python -m train.kernels checkpoint/baseline
  python -m train.kernels checkpoint/baseline checkpoint/optimized --out checkpoint/kernels
"""
SHOWN_ROWS = 20


def run_section(run: RunSummary) -> str:
    """A run in Markdown: its categories, and the rows that take longest."""
    step, facts = run.step_seconds, run.facts
    categories = sorted(run.categories, key=lambda row: CATEGORIES.index(row.category))
    between = sum(row.seconds for row in run.phases if row.phase in ("validation", "checkpoint"))
    return "\n\n".join([
        f"## {run.label}: {milliseconds(step)} ms per step",
        f"Steps {facts.first_step} to {facts.first_step + facts.steps - 1} of {run.processes} "
        f"process{'es' * (run.processes > 1)} ({milliseconds(run.step_seconds_min)} to "
        f"{milliseconds(run.step_seconds_max)} ms) on {facts.device_name}, with the profiler's own overhead. "
        f"{run.attributed_share:.1%} of the time is attributed to a phase; "
        f"{milliseconds(run.unattributed_seconds)} ms lie outside of all annotations."
        + (f" Validation and checkpoints take {milliseconds(between)} ms of it." if between else ""),
        *([idle_sentence(run.pipeline)] if run.pipeline else []),
        markdown_table(
            ["category", "ms", "share", "launches"], [[row.category, *_costs(row, step)] for row in categories]
        ),
        markdown_table(
            ["module", "phase", "operator", "ms", "share", "launches", "GFLOP/s", "GB/s"],
            [
                [row.module or "(none)", row.phase or "(none)", row.work, *_costs(row, step),
                 _giga(row.flops_per_second), _giga(row.bytes_per_second)]
                for row in run.rows[:SHOWN_ROWS]
            ],
        ),
    ])  # fmt: skip


def idle_sentence(pipeline: PipelineTimeline) -> str:
    """How idle a pipeline's stages were."""
    theory = "" if pipeline.theory is None else f"; {pipeline.theory:.1%} in theory, with all stages alike"
    return (
        f"A pipeline of {pipeline.stages} processes, {pipeline.micro_batches} micro-batches a step: of the time "
        f"from the first forward to the last backward they are idle {pipeline.idle_share:.1%}{theory}."
    )


def comparison_section(runs: Sequence[RunSummary], comparison: Comparison) -> str:
    """Two runs side by side in Markdown, the largest change first."""
    first, second = comparison.labels
    header = [f"{first}, ms", f"{second}, ms", "saved, ms", "share of gain", "launches", "GFLOP/s", "GB/s"]
    return "\n\n".join([
        f"## {first} and {second}",
        speedup_sentence(runs),
        markdown_table(["category", *header], [[row.category, *_changed(row)] for row in comparison.categories]),
        markdown_table(
            ["module", "phase", "category", *header],
            [
                [row.module or "(none)", row.phase or "(none)", row.category, *_changed(row)]
                for row in comparison.rows[:SHOWN_ROWS]
            ],
        ),
    ])  # fmt: skip


def _costs(row: Row, step: float) -> list[str]:
    return [milliseconds(row.seconds), f"{row.seconds / step:.1%}", f"{row.launches:,.0f}"]


def _changed(change: Change) -> list[str]:
    [share] = change.share_of_gain
    return [
        *(milliseconds(seconds or 0.0) for seconds in [*change.seconds, *change.saved_seconds]),
        "-" if share is None else f"{share:.1%}",
        " → ".join(f"{count:,.0f}" for count in change.launches),
        " → ".join(map(_giga, change.flops_per_second)),
        " → ".join(map(_giga, change.bytes_per_second)),
    ]


def _giga(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e9:,.1f}"


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m train.kernels", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="one or two run folders, or trace files")
    parser.add_argument("--out", type=Path, default=Path("kernels"), help="folder for kernels.json and kernels.md")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) > 2:
        raise UserError(f"{len(arguments.runs)} runs: give one, or two to compare")
    recordings = [read_recording(path) for path in arguments.runs]
    if len({recording.label for recording in recordings}) < len(recordings):
        for recording in recordings:
            recording.label = str(recording.path)
    runs = [summarize(recording) for recording in recordings]
    comparison = compare(*runs) if len(runs) == 2 else None
    sections = [comparison_section(runs, comparison)] if comparison else []
    text = "\n\n".join([*sections, *map(run_section, runs)])
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_kernels(arguments.out / "kernels.json", runs, comparison)
    write_text(arguments.out / "kernels.md", f"# Where the time goes\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    run_command(main)
