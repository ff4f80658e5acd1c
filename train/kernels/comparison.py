"""The profiled runs of a comparison, and what changes from the first one's step to the others'.

Imports no torch, unless the traces of a run have not been summed up yet.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.kernels.summary import NAMES, Change, Comparison, RunSummary, add_up, group, read_kernels, write_kernels
from train.kernels.traces import read_recording
from train.utils.errors import UserError
from train.utils.units import milliseconds, times

SCOPE = ("module", "phase", "category")
"""Names that are the same whichever kernels do the work."""
OPERATOR = ("module", "phase", "operator", "kernel")


def read_profile(run_folder: Path, metrics: Mapping[str, Any]) -> RunSummary | None:
    """Read the `profile/kernels.json` of a run, or return None for a run that was not profiled.

    A file that is missing, or older than a trace beside it, is first made from the traces. `metrics`, the content of
    the run's `metrics.json`, tells whether the profile belongs to the run.
    """
    file = run_folder / "profile" / "kernels.json"
    traces = [trace.stat().st_mtime_ns for trace in file.parent.glob("rank-*.json.gz")]
    if traces and not (file.is_file() and file.stat().st_mtime_ns >= max(traces)):
        from train.kernels.breakdown import summarize  # imports torch

        run = summarize(read_recording(run_folder))
        try:
            write_kernels(file, [run])
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error.strerror}") from None
    if not file.is_file():
        return None
    run = read_kernels(file)
    for key in ("run_type", "tokens_per_step", "block_size"):
        if (profiled := getattr(run.facts, key)) != metrics.get(key):
            raise UserError(
                f"{file}: belongs to a different run: its {key} is {profiled}, but {metrics.get(key)} in the run's "
                "metrics.json; profile the run again, or remove the profile"
            )
    return run


def changes(runs: Sequence[RunSummary], *names: str, of: str = "rows") -> list[Change]:
    """Align the rows (or the layers) of runs by `names`: the largest change first, or the longest of a single run."""
    groups = [group(getattr(run, of), *names) for run in runs]
    operators = [group(getattr(run, of), *names, "operator", "kernel") for run in runs]
    gains = [runs[0].step_seconds - run.step_seconds for run in runs[1:]]
    found = []
    for key in dict.fromkeys(key for own in groups for key in own):
        rows = [own.get(key) or add_up([], {}) for own in groups]
        saved = [rows[0].seconds - row.seconds for row in rows[1:]]
        found.append(
            Change(
                **dict.fromkeys(NAMES, "") | dict(zip(names, key, strict=True)),
                seconds=[own[key].seconds if key in own else None for own in groups],
                saved_seconds=saved,
                share_of_gain=[part / gain if gain else None for part, gain in zip(saved, gains, strict=True)],
                launches=[row.launches for row in rows],
                flops_per_second=[row.flops_per_second for row in rows],
                bytes_per_second=[row.bytes_per_second for row in rows],
                largest=[
                    [row.work for own, row in parts.items() if own[: len(key)] == key][:3] for parts in operators
                ],
            )
        )
    return sorted(found, key=lambda change: -max(map(abs, change.saved_seconds), default=change.seconds[0] or 0.0))


def compare(first: RunSummary, second: RunSummary) -> Comparison:
    """Compare the steps of two runs, which have to be of the same model and batch."""
    runs = (first, second)
    for key in ("tokens_per_step", "block_size", "model"):
        one, other = (getattr(run.facts, key) for run in runs)
        if one != other:
            raise UserError(
                f"{first.path} and {second.path} do not do the same work in a step: {key} is {one} and {other}; "
                "profile two runs of the same model and batch"
            )
    return Comparison(
        labels=[run.label for run in runs],
        step_seconds=[run.step_seconds for run in runs],
        saved_seconds=first.step_seconds - second.step_seconds,
        speedup=first.step_seconds / second.step_seconds,
        categories=changes(runs, "category"),
        phases=changes(runs, "phase"),
        rows=changes(runs, *SCOPE),
        operators=changes(runs, *SCOPE, "operator"),
        layers=changes(runs, "module", "phase", of="layers"),
    )


def speedup_sentence(runs: Sequence[RunSummary]) -> str:
    """How much faster than the first run's a step of each other run is, and where most of the difference comes from;
    empty for a single run."""
    sentences = []
    for other in runs[1:]:
        pair = (runs[0], other)
        before, after = (run.step_seconds for run in pair)
        parts = []
        for change in changes(pair, *SCOPE)[:3]:
            [saved], [share] = change.saved_seconds, change.share_of_gain
            gain = "" if share is None else f" ({share:.0%})"
            parts.append(f"{change.scope} {signed_milliseconds(saved)} ms{gain}")
        sentence = (
            f"A profiled step takes {milliseconds(after)} ms in {other.label} and {milliseconds(before)} ms in "
            f"{runs[0].label}: {times(before / after)} as fast. Time saved, with its share of the gain: "
            f"{'; '.join(parts) or 'none'}."
        )
        for change in changes(pair, *SCOPE, "operator")[:1]:
            seconds = [milliseconds(value or 0.0) for value in change.seconds]
            where = change.module_and_phase or "no module"
            sentence += f" The largest change is {change.work} in {where}: {seconds[0]} ms, then {seconds[1]} ms."
        sentences.append(sentence)
    return " ".join(sentences)


def signed_milliseconds(saved: float) -> str:
    return ("+" if saved > 0 else "-" if saved < 0 else "") + milliseconds(abs(saved))
