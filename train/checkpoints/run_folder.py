"""Run folders as they lie on the disk: read, checked and labelled; nothing here knows how a run was made."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.utils.errors import UserError

SCHEMA = 1
SUMMARY_FILE = "metrics.json"
STEPS_FILE = "metrics.jsonl"

NUMBER = (int, float)
NUMBERS = [
    *("steps", "tokens", "tokens_per_step", "block_size", "world_size", "parameters"),
    *("training_time_seconds", "time_per_epoch_seconds", "tokens_per_second", "flops_per_second", "mfu", "data_share"),
    *("train_loss", "val_loss", "perplexity", "inference_latency_seconds", "inference_tokens_per_second"),
    *("peak_memory_bytes", "peak_memory_reserved_bytes"),
]
NESTED_NUMBERS = [  # and what older summaries lack
    "joules_per_token",
    *("step_time_seconds.median", "step_time_seconds.p10", "step_time_seconds.p90"),
    *("inference_percentiles.first_token.p50", "inference_percentiles.first_token.p95"),
    *("inference_percentiles.per_token.p50", "inference_percentiles.per_token.p95"),
]
TEXTS = ["run_type", "precision", "attn_implementation", "attn_reason", "peak_memory_kind"]
MAPPINGS = ["step_time_seconds", "data", "model", "config", "hardware", "versions"]
STEP_NUMBERS = ["step", "tokens", "loss", "tokens_per_second", "step_time_seconds"]


@dataclass(frozen=True)
class Run:
    """One finished run. `steps` holds a line of `metrics.jsonl` for each optimizer step, in order."""

    label: str
    folder: Path
    summary: dict[str, Any]
    steps: list[dict[str, Any]]

    def get(self, key: str) -> Any:
        """A value of the summary by its dotted path ("step_time_seconds.median"); None where it is not."""
        return look_up(self.summary, key)


def look_up(summary: dict[str, Any], key: str) -> Any:
    value: Any = summary
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Every folder as a `Run`, in the order given; a `UserError` names the first that cannot be compared."""
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


def read_run(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: give the run folders that training wrote, like checkpoint/baseline"
        )
    summary_path, steps_path = folder / SUMMARY_FILE, folder / STEPS_FILE
    if not summary_path.is_file():
        raise UserError(without_summary(folder))
    if not steps_path.is_file():
        raise UserError(f"{folder} has {SUMMARY_FILE} but no {STEPS_FILE}: its curves are lost; train it again")
    summary = parse(read(summary_path), summary_path)
    check_summary(summary, summary_path)
    check_text(summary, summary_path)
    # A run that was killed and resumed repeats the steps since its checkpoint: the later line is the one that counts.
    by_step = {record["step"]: record for record in read_steps(steps_path)}
    if len(by_step) != summary["steps"]:
        raise UserError(
            f"{steps_path} has {len(by_step)} steps and {SUMMARY_FILE} sums up {summary['steps']}: they are not of "
            "one run, or not whole; train it again"
        )
    return Run(label, folder, summary, [by_step[step] for step in sorted(by_step)])


def without_summary(folder: Path) -> str:
    """Why a folder without `metrics.json` is no finished run: half-way, its parent, or something else."""
    if (folder / STEPS_FILE).is_file():
        steps = sum(1 for line in read(folder / STEPS_FILE).splitlines() if line.strip())
        plural = "step" if steps == 1 else "steps"
        return (
            f"{folder} has no {SUMMARY_FILE}: the run is unfinished ({STEPS_FILE} has {steps} {plural}); "
            "let it end, or resume it"
        )
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{SUMMARY_FILE}"))
    hint = f"; did you mean {' '.join(inside)}?" if inside else ""
    return f"{folder} has neither {SUMMARY_FILE} nor {STEPS_FILE}: it is no run folder{hint}"


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: byte {error.start} is no UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def parse(text: str, path: Path, line: int = 1) -> Any:
    """JSON whose first line is `line` of `path`. NaN and Infinity, which Python writes by default, become null."""
    try:
        return json.loads(text, parse_constant=lambda name: None, parse_float=finite)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{where}: broken JSON ({error.msg})") from None


def finite(text: str) -> float | None:
    """A JSON number as a float; None beyond a float's range ("1e999")."""
    value = float(text)
    return value if math.isfinite(value) else None


def read_steps(path: Path) -> list[dict[str, Any]]:
    records = []
    # Not splitlines(): JSON may hold U+2028 and its like, which it takes for line ends.
    for line, text in enumerate(read(path).split("\n"), start=1):
        if not text.strip():
            continue
        record = parse(text, path, line)
        if not isinstance(record, dict) or not is_number(record.get("step")):
            raise UserError(f'{path}, line {line}: not a step of a run (an object with a "step")')
        for key in [*STEP_NUMBERS, "val_loss"]:
            missing = key in STEP_NUMBERS and key not in record
            if missing or not (record.get(key) is None or is_number(record[key])):
                found = "is missing" if missing else f"is {record[key]!r}, not a number"
                raise UserError(f'{path}, line {line}: "{key}" {found}')
        records.append(record)
    return records


def check_summary(summary: Any, path: Path) -> None:
    """Refuse a JSON file that is something else, or of another version, before any figure is taken from it."""
    if not isinstance(summary, dict) or "schema" not in summary or "run_type" not in summary:
        raise UserError(f"{path} is JSON, but not the summary of a run (it lacks schema and run_type)")
    if summary["schema"] != SCHEMA:
        raise UserError(f"{path} has schema {summary['schema']!r}; this version of compare reads schema {SCHEMA}")
    missing = [key for key in [*NUMBERS, *TEXTS, *MAPPINGS] if key not in summary]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it is not a whole summary of a run")
    for keys, right, wanted in [
        ([*NUMBERS, *NESTED_NUMBERS], lambda value: value is None or is_number(value), "a number or null"),
        (TEXTS, lambda value: isinstance(value, str), "a string"),
        (MAPPINGS, lambda value: isinstance(value, dict), "an object"),
    ]:
        for key in keys:
            if not right(look_up(summary, key)):
                raise UserError(f'{path}: "{key}" is {look_up(summary, key)!r}, not {wanted}')


def check_fields(path: Path, key: str, table: Any, fields: Mapping[str, Any], writer: str) -> None:
    """Refuse a table ("key" in the file) that is no list of objects with these fields, each of one of these types."""
    if not isinstance(table, list):
        raise UserError(f'{path}: "{key}" is {table!r}, not a list: it is not what {writer} writes')
    for row in table:
        for name, kinds in fields.items():
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise UserError(f'{path}: "{key}" has {value!r} for {name}: it is not what {writer} writes')


def check_text(summary: dict[str, Any], path: Path) -> None:
    """Refuse half characters, which JSON can name (a lone "\\ud800") and no file can hold."""
    try:
        json.dumps(summary, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} holds half a character (U+{ord(error.object[error.start]):04X} alone)") from None


def is_number(value: Any) -> bool:
    return isinstance(value, NUMBER) and not isinstance(value, bool)


# Readable units

TIMES = "\N{MULTIPLICATION SIGN}"


def times(ratio: float) -> str:
    return f"{ratio:.2f}{TIMES}" if ratio < 10 else f"{ratio:.1f}{TIMES}"


def unit_of(kind: str, largest: float) -> tuple[float, str, int]:
    """(divisor, unit, decimals) in which values of a kind up to `largest` read well side by side."""
    if kind == "seconds":
        if largest < 1:
            return 1e-3, "ms", 1
        if largest < 300:
            return 1.0, "s", 3 if largest < 10 else 2
        return (60.0, "min", 1) if largest < 3 * 3600 else (3600.0, "h", 2)
    if kind == "bytes":
        return (2.0**30, "GiB", 2) if largest >= 2**30 else (2.0**20, "MiB", 1)
    if kind == "joules":
        return (1e-3, "mJ", 1) if largest < 1 else (1.0, "J", 2)
    if kind == "flops":
        return (1e12, "TFLOP/s", 1) if largest >= 1e13 else (1e9, "GFLOP/s", 1)
    if kind == "rate":
        return 1.0, "tokens/s", 0 if largest >= 1000 else 1
    return {"fraction": (1e-2, "%", 2), "nats": (1.0, "", 4), "perplexity": (1.0, "", 2)}.get(kind, (1.0, "", 0))
