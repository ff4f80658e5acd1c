"""Runs on disk: their folders read, checked and labelled; nothing here knows how a run was made."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from train.metrics.summary import check_summary, is_number
from train.metrics.table import STEP_METRICS, look_up
from train.utils.errors import UserError, shortened
from train.utils.files import parse_json, read_json

SUMMARY_FILE = "metrics.json"
STEPS_FILE = "metrics.jsonl"
LATEST = "latest"  # the file that names the last complete step folder
BEST = "best"  # the file that names the step folder of the lowest validation loss
NAMED_GAPS = 5  # in a message about missing steps


@dataclass(frozen=True)
class FinishedRun:
    """One finished run.

    `steps` holds a line of `metrics.jsonl` for each optimizer step, in order; of a step whose line is lost, its number
    only. `missing` says which these are.
    """

    label: str
    folder: Path
    summary: dict[str, Any]
    steps: list[dict[str, Any]]
    missing: str = ""

    def get(self, key: str) -> Any:
        """A value of the summary by its dotted path ("step_time_seconds.median"); None where it is not."""
        return look_up(self.summary, key)


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """Every folder as a `FinishedRun`, in the order given; a `UserError` names the first that cannot be compared."""
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise UserError(f"{folders[index]} is given twice: a run cannot be compared with itself")
    labels = labels_for(resolved)
    return [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]


def labels_for(folders: Sequence[Path]) -> list[str]:
    """The shortest tail of each path that tells it from the others: its name, or "a/optimized" and "b/optimized"."""
    labels = []
    for folder in folders:
        for count in range(1, len(folder.parts) + 1):
            tail = folder.parts[-count:]
            if sum(other.parts[-count:] == tail for other in folders) == 1:
                break
        labels.append("/".join(tail))
    return labels


def latest(run_folder: Path) -> Path:
    """The step folder that the run folder's `latest` names; a `UserError` if it names something else."""
    name = (run_folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"step-\d+", name):
        raise UserError(
            f"{run_folder / LATEST}: names {name!r}; write the step-N folder in {run_folder} to resume from"
        )
    return run_folder / name


def model_folder(path: Path) -> Path:
    """Where the model in a folder is: in the step folder that a run folder's `latest` names, otherwise in it.

    The model files in a run folder are for other tools: a kill can leave those of the step before. Without its step
    folders, a run folder is a model folder like any other.
    """
    if (path / LATEST).is_file() and (folder := latest(path)).is_dir():
        return folder
    return path


def read_run(folder: Path, label: str) -> FinishedRun:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: give the run folders that training wrote, like checkpoint/baseline"
        )
    summary_path, steps_path = folder / SUMMARY_FILE, folder / STEPS_FILE
    if not summary_path.is_file():
        raise UserError(_why_unfinished(folder))
    if not steps_path.is_file():
        raise UserError(f"{folder} has {SUMMARY_FILE} but no {STEPS_FILE}: its curves are lost; train it again")
    summary = read_json(summary_path)
    check_summary(summary, summary_path)
    records, fault = read_steps(steps_path)
    steps, fault = summary["steps"], f" ({fault})" if fault else ""
    if not isinstance(steps, int) or 2 * len(records) < steps or (records and records[-1]["step"] > steps):
        raise UserError(
            f"{steps_path} has {len(records)} steps{fault} and {SUMMARY_FILE} sums up {shortened(steps)}: they are "
            "from different runs, or incomplete; train it again"
        )
    missing = missing_steps(records, steps)
    known = {record["step"]: record for record in records}
    return FinishedRun(
        label,
        folder,
        summary,
        [known.get(step, {"step": step}) for step in range(1, steps + 1)],
        f"{missing} have no record in {steps_path}{fault}" if missing else "",
    )


def read_steps(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The records of a `metrics.jsonl`, one per step, in order; and what is wrong with the first line left out, or "".

    Of two lines of a step the later counts: validation is added to a step in a second line, and a run that was killed
    and resumed repeats the steps since its checkpoint. Lines that are not such a record, with the required
    `STEP_METRICS`, are left out: after a power failure a file may end in zeros, or in the middle of a line.
    """
    if not path.is_file():
        return [], "there is no such file"
    try:
        content = path.read_bytes()
    except OSError as error:
        return [], f"{error.strerror}"
    by_step, fault = {}, ""
    # Not splitlines(): JSON may hold U+2028 and its like, which it takes for line ends.
    for line, text in enumerate(content.split(b"\n"), start=1):
        if not (text := text.strip(b"\0 \t\r")):
            continue
        try:
            record = _record(text, path, line)
        except UserError as error:
            fault = fault or str(error).removeprefix(f"{path}, ")
            continue
        by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)], fault


def missing_steps(records: Sequence[dict[str, Any]], last: int) -> str:
    """Which steps from 1 to `last` have no record, as "3 of 40 steps (5, 7 and 8)"; "" if there is none."""
    edges = [0, *(record["step"] for record in records), last + 1]
    gaps = [(before + 1, after - 1) for before, after in pairwise(edges) if after > before + 1]
    if not gaps:
        return ""
    named = [str(first) if first == end else f"{first} to {end}" for first, end in gaps]
    named = named if len(named) <= NAMED_GAPS else [*named[: NAMED_GAPS - 1], f"… {named[-1]}"]
    return f"{sum(end - first + 1 for first, end in gaps):,} of {last:,} steps ({', '.join(named)})"


def _record(text: bytes, path: Path, line: int) -> dict[str, Any]:
    """A line of `metrics.jsonl`; a `UserError` if it is not the record of a step."""
    try:
        record = parse_json(text.decode(), path, line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {line}: byte {error.start} is not UTF-8") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or record["step"] < 1:
        raise UserError(f'{path}, line {line}: not a step of a run (an object with a "step")')
    for metric in STEP_METRICS:
        if metric.required and metric.key not in record:
            raise UserError(f'{path}, line {line}: "{metric.key}" is missing')
        if (value := record.get(metric.key)) is not None and not is_number(value):
            raise UserError(f'{path}, line {line}: "{metric.key}" is {shortened(value)}, not a number')
    return record


def _why_unfinished(folder: Path) -> str:
    """Why a folder without `metrics.json` is not a finished run: it is interrupted, a parent, or something else."""
    if (folder / STEPS_FILE).is_file():
        steps = len(read_steps(folder / STEPS_FILE)[0])
        plural = "step" if steps == 1 else "steps"
        return (
            f"{folder} has no {SUMMARY_FILE}: the run is unfinished ({STEPS_FILE} has {steps} {plural}); "
            "let it end, or resume it"
        )
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{SUMMARY_FILE}"))
    hint = f"; did you mean {' '.join(inside)}?" if inside else ""
    return f"{folder} has neither {SUMMARY_FILE} nor {STEPS_FILE}: it is not a run folder{hint}"
