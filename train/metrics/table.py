"""The table of metrics: each one's key, title, unit, which way is better, and where it is shown.

A new metric is an entry here and the line that measures it: of a step, in the record that `run/loop.py` logs; of a
run, in `metrics/summary.py` or in what `run/summary.py` passes to it as measured. The progress bar, `metrics.json`,
its checks, the report with its charts and gates, and the model card follow from the entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class StepMetric:
    """A number in the lines of `metrics.jsonl` that is read again, or shown in the progress bar."""

    key: str
    required: bool = False  # whether a line without it is refused
    label: str = ""  # in the progress bar
    log: str = ""  # its format there


@dataclass(frozen=True)
class Metric:
    """A figure of a finished run in `metrics.json`; null where it is unknown."""

    key: str  # dotted path in `metrics.json`
    title: str
    kind: str  # what `units.unit_of` picks the unit by, or "text"
    better: Literal[-1, 0, 1] = 0  # 1: higher is better, -1: lower is better, 0: neither
    ratio: bool = False  # whether a change is also written as a ratio
    # Whether a file without the key is refused. Not for a new metric: earlier runs do not have it. A row that is not
    # required is left out where no run has it.
    required: bool = False
    same: str = ""  # only runs with the same value of this key are compared by the metric
    # How the step metric with the same key becomes the run's: its last value, or the mean of the last steps.
    over_steps: Literal["", "last", "mean"] = ""
    chart: str = ""  # name of the metric's bar chart in the report; also a short name for it in gates
    tile: str = ""  # heading of the metric's tile at the top of the report
    card: bool = False  # whether the model card has it


STEP_METRICS = (
    StepMetric("step", required=True),
    StepMetric("tokens", required=True),
    StepMetric("loss", required=True, label="loss", log=".3f"),
    StepMetric("tokens_per_second", required=True, label="tokens/s", log=",.0f"),
    StepMetric("step_time_seconds", required=True),
    StepMetric("val_loss", label="val_loss", log=".3f"),
)

METRICS = (
    Metric("tokens_per_second", "Training throughput", "rate", 1, ratio=True, required=True, tile="Speed", card=True),
    Metric("step_time_seconds.median", "Step time, median", "seconds", -1, required=True),
    Metric("step_time_seconds.p10", "Step time, 10th percentile", "seconds", -1, required=True),
    Metric("step_time_seconds.p90", "Step time, 90th percentile", "seconds", -1, required=True),
    Metric("data_share", "Waiting for data, share of a step", "fraction", -1, required=True),
    Metric("peak_memory_bytes", "Peak memory", "bytes", -1, ratio=True, required=True, same="peak_memory_kind",
           chart="peak_memory", tile="Peak memory", card=True),
    Metric("peak_memory_reserved_bytes", "Peak memory, reserved", "bytes", -1, ratio=True, same="peak_memory_kind"),
    Metric("joules_per_token", "Energy per token", "joules", -1, ratio=True, same="energy_covers", card=True),
    Metric("training_time_seconds", "Training time", "seconds", -1, required=True, card=True),
    Metric("time_per_epoch_seconds", "Time per epoch", "seconds", -1, required=True, chart="time_per_epoch"),
    Metric("train_loss", "Training loss, last steps", "nats", -1, required=True, card=True),
    Metric("val_loss", "Validation loss", "nats", -1, required=True, same="val_data", over_steps="last",
           tile="Validation loss", card=True),
    Metric("perplexity", "Perplexity", "perplexity", -1, required=True, same="val_data", card=True),
    Metric("inference_latency_seconds", "Inference latency, first token", "seconds", -1, required=True),
    Metric("inference_percentiles.first_token.p95", "First token, 95th percentile", "seconds", -1),
    Metric("inference_percentiles.per_token.p50", "Each further token, median", "seconds", -1),
    Metric("inference_percentiles.per_token.p95", "Each further token, 95th percentile", "seconds", -1),
    Metric("inference_tokens_per_second", "Inference throughput", "rate", 1, ratio=True, required=True),
    Metric("flops_per_second", "Model FLOP/s achieved", "flops", 1, required=True),
    Metric("mfu", "MFU", "fraction", 1, required=True, card=True),
    Metric("steps", "Optimizer steps", "count", required=True),
    Metric("tokens", "Training tokens", "count", required=True),
    Metric("tokens_per_step", "Tokens per step", "count", required=True),
    Metric("parameters", "Parameters", "count", required=True),
    Metric("world_size", "Processes", "count", required=True),
    Metric("run_type", "Run type", "text", required=True),
    Metric("precision", "Precision", "text", required=True),
    Metric("attn_implementation", "Attention kernel", "text", required=True),
    Metric("peak_memory_kind", "Memory measured as", "text", required=True),
)  # fmt: skip

BY_KEY = {metric.key: metric for metric in METRICS}


def look_up(summary: Mapping[str, Any], key: str) -> Any:
    """A value of a summary by its dotted path ("step_time_seconds.median"); None where it is not."""
    value: Any = summary
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
