"""Finished runs on disk: their folders read, checked and labelled; nothing here knows how a run was made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.metrics.summary import check_summary, is_number
from train.metrics.table import STEP_METRICS, look_up
from train.utils.errors import UserError
from train.utils.files import parse_json, read_json, read_text

SUMMARY_FILE = "metrics.json"
STEPS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class FinishedRun:
    """One finished run. `steps` holds a line of `metrics.jsonl` for each optimizer step, in order."""

    label: str
    folder: Path
    summary: dict[str, Any]
    steps: list[dict[str, Any]]

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
    # A run that was killed and resumed repeats the steps since its checkpoint: the later line counts.
    by_step = {record["step"]: record for record in read_steps(steps_path)}
    if len(by_step) != summary["steps"]:
        raise UserError(
            f"{steps_path} has {len(by_step)} steps and {SUMMARY_FILE} sums up {summary['steps']}: they are of "
            "different runs, or incomplete; train it again"
        )
    return FinishedRun(label, folder, summary, [by_step[step] for step in sorted(by_step)])


def read_steps(path: Path, until_broken: bool = False) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, each with the required `STEP_METRICS`.

    `until_broken`: whether the records before a line that is not JSON are returned, as a crash leaves them, instead of
    an error.
    """
    records = []
    # Not splitlines(): JSON may hold U+2028 and its like, which it takes for line ends.
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = parse_json(text, path, line)
        except UserError:
            if until_broken:
                break
            raise
        if not isinstance(record, dict) or not is_number(record.get("step")):
            raise UserError(f'{path}, line {line}: not a step of a run (an object with a "step")')
        for metric in STEP_METRICS:
            if metric.required and metric.key not in record:
                raise UserError(f'{path}, line {line}: "{metric.key}" is missing')
            if (value := record.get(metric.key)) is not None and not is_number(value):
                raise UserError(f'{path}, line {line}: "{metric.key}" is {value!r}, not a number')
        records.append(record)
    return records


def _why_unfinished(folder: Path) -> str:
    """Why a folder without `metrics.json` is not a finished run: it is interrupted, a parent, or something else."""
    if (folder / STEPS_FILE).is_file():
        steps = sum(1 for line in read_text(folder / STEPS_FILE).splitlines() if line.strip())
        plural = "step" if steps == 1 else "steps"
        return (
            f"{folder} has no {SUMMARY_FILE}: the run is unfinished ({STEPS_FILE} has {steps} {plural}); "
            "let it end, or resume it"
        )
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{SUMMARY_FILE}"))
    hint = f"; did you mean {' '.join(inside)}?" if inside else ""
    return f"{folder} has neither {SUMMARY_FILE} nor {STEPS_FILE}: it is not a run folder{hint}"
