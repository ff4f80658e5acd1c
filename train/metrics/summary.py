"""The metrics of a finished run: pure functions from what was measured, and the schema of `metrics.json`.

Units are SI base units throughout (seconds, bytes, FLOP/s); `utils.units` picks the readable ones. No figure is NaN
or infinite in a file: JSON has neither, so both become null.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.metrics.flops import Flops, utilization
from train.metrics.table import METRICS, look_up
from train.utils.errors import UserError, shortened
from train.utils.files import from_json, json_safe

SCHEMA = 1  # version of the layout of `metrics.json`
FINAL_STEPS = 10  # whose mean is the reported training loss: a single step's loss is mostly noise


def percentiles(values: Sequence[float], **percents: float) -> dict[str, float | None]:
    """Percentiles under the names of `percents`, interpolated linearly; None without values."""
    if not values:
        return dict.fromkeys(percents)
    return dict(zip(percents, np.percentile(values, list(percents.values())).tolist(), strict=True))


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinite where a float cannot hold it (loss above 709), never an OverflowError."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def nan_for_null(value: float | None) -> float:
    """NaN for the null that it became in a file: the summary of a diverged run must not report its better past."""
    return math.nan if value is None else float(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class RunFacts:
    """What a run was: with its `METRICS`, the schema of `metrics.json`.

    `tokens_per_step` is that of all processes together. `precision` is what matmuls run in: "bf16", "fp16", "tf32" or
    "fp32". `data` has the token files of "train" and "val".
    """

    run_type: str
    tokens_per_step: int
    block_size: int
    precision: str
    world_size: int
    parameters: int
    attn_implementation: str
    attn_reason: str
    model: dict[str, int]
    data: dict[str, dict[str, Any]]
    config: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, Any]
    sample: dict[str, str] | None = None
    command: str | None = None  # runs of older versions did not keep it


def summarize(
    facts: RunFacts,
    records: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any],
    flops: Flops,
    *,
    tokens_per_epoch: int | None,
    device_peak_flops: float | None,
) -> dict[str, Any]:
    """The content of `metrics.json`: `facts` and every metric of the table, null where it was not measured.

    - `records`: the lines of `metrics.jsonl`, one an optimizer step, in order; after a resumption some may be missing.
      "data_seconds" is the part of a step in which the main process waited for its data.
    - `measured`: metrics that do not follow from the records, such as memory, energy and inference, under their keys.
    - `flops`: per token; `device_peak_flops` is `flops.peak_flops(name, precision)` of one device.

    Training time is the sum of the step times: validation and checkpoints are not in it, every attempt of a run that
    was resumed is; it is unknown if the record of a step is missing. Throughput, step times and the share of waiting
    leave out the steps that are "profiled", and the first, which allocates, compiles and tunes, unless it is the only
    one. Throughput is all their tokens over all their seconds: a mean of each step's rate would hide slow steps.
    """
    counted = [record for record in records if not record.get("profiled")]
    counted = counted[1:] or counted
    times = [nan_for_null(record["step_time_seconds"]) for record in counted]
    waits = [nan_for_null(record.get("data_seconds")) for record in counted]  # records of older versions have none
    seconds = math.fsum(times)
    steps = records[-1]["step"] if records else 0
    training_time = math.fsum(nan_for_null(record["step_time_seconds"]) for record in records)
    tokens_per_second = facts.tokens_per_step * len(times) / seconds if seconds > 0 else None
    metrics: dict[str, Any] = {
        **{metric.key: over_steps(records, metric.key, metric.over_steps) for metric in METRICS if metric.over_steps},
        "steps": steps,
        "tokens": records[-1]["tokens"] if records else 0,
        "training_time_seconds": training_time if len(records) == steps else None,
        "time_per_epoch_seconds": (
            tokens_per_epoch / tokens_per_second if tokens_per_second and tokens_per_epoch else None
        ),
        "tokens_per_second": tokens_per_second,
        "step_time_seconds": percentiles(times, median=50, p10=10, p90=90),
        "data_share": math.fsum(waits) / seconds if seconds > 0 else None,
        "train_loss": over_steps(records, "loss", "mean"),
        "val_tokens": next((r["val_tokens"] for r in reversed(records) if r.get("val_tokens")), None),
        "flops_per_token": flops.model,
        "flops_per_token_by_part": dataclasses.asdict(flops),
        "hardware_flops_per_token": flops.hardware,
        "flops_per_second": None if tokens_per_second is None else flops.model * tokens_per_second,
        "mfu": utilization(tokens_per_second, flops.model, device_peak_flops, facts.world_size),
        "hfu": utilization(tokens_per_second, flops.hardware, device_peak_flops, facts.world_size),
    }
    best = best_validation(records)
    metrics["best_validation"] = {"step": best.step, "val_loss": best.val_loss} if best.step else None
    metrics["perplexity"] = None if metrics["val_loss"] is None else perplexity(metrics["val_loss"])
    unknown = dict.fromkeys(metric.key.partition(".")[0] for metric in METRICS)
    return json_safe({"schema": SCHEMA, **unknown, **metrics, **measured, **dataclasses.asdict(facts)})


@dataclass(frozen=True)
class Best:
    """The validation with the lowest loss: its step, 0 if there is none, and how many validations came after it."""

    step: int
    val_loss: float
    since: int


def best_validation(records: Sequence[Mapping[str, Any]]) -> Best:
    """The best of those records that were validated on as many tokens as the last one; of equal ones, the first."""
    validated = [record for record in records if "val_loss" in record]
    validated = [record for record in validated if record.get("val_tokens") == validated[-1].get("val_tokens")]
    best = Best(0, math.inf, 0)
    for record in validated:
        loss = nan_for_null(record["val_loss"])
        best = (
            Best(record["step"], loss, 0) if loss < best.val_loss else dataclasses.replace(best, since=best.since + 1)
        )
    return best


def over_steps(records: Sequence[Mapping[str, Any]], key: str, how: str) -> float | None:
    """The last value of a step metric, or the mean of its last `FINAL_STEPS`; None if no step has it.

    Steps whose update was skipped do not count.
    """
    values = [nan_for_null(record[key]) for record in records if key in record and not record.get("skipped")]
    values = values[-1:] if how == "last" else values[-FINAL_STEPS:]
    return sum(values) / len(values) if values else None


def check_summary(summary: Any, path: Path) -> None:
    """Refuse what is not a complete `metrics.json` of this version.

    Raises:
        UserError: naming the keys that are missing, or the first value of another type.
    """
    if not isinstance(summary, dict) or "schema" not in summary or "run_type" not in summary:
        raise UserError(f"{path} is JSON, but not the summary of a run (it lacks schema and run_type)")
    if summary["schema"] != SCHEMA:
        raise UserError(f"{path} has schema {shortened(summary['schema'])}; this version reads schema {SCHEMA}")
    required = [metric.key.partition(".")[0] for metric in METRICS if metric.required]
    required += [field.name for field in dataclasses.fields(RunFacts) if field.default is dataclasses.MISSING]
    if missing := [key for key in dict.fromkeys(required) if key not in summary]:
        raise UserError(f"{path} lacks {', '.join(missing)}: it is not a complete summary of a run")
    for metric in METRICS:
        value = look_up(summary, metric.key)
        expected = "a string" if metric.kind == "text" else "a number or null"
        if not (isinstance(value, str) if metric.kind == "text" else value is None or is_number(value)):
            raise UserError(f'{path}: "{metric.key}" is {shortened(value)}, not {expected}')
    from_json(RunFacts, summary, path, "train")
