"""What a run is worth, in figures: pure functions from what was measured, and the facts of the machine.

Units are SI base units throughout (seconds, bytes, FLOP/s); `train.compare` picks the readable ones. No figure is ever
NaN or infinite in a file: JSON has no word for either, so both become null.
"""

import dataclasses
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from train.metrics.energy import Energy
from train.metrics.flops import count_flops, utilisation
from train.utils.devices import accelerators, cpu_has_fast_bf16, read_or_none

SCHEMA = 1
"""Version of the layout of `metrics.json`."""

FINAL_STEPS = 10
"""The reported training loss is the mean over this many last steps: a single step's loss is mostly noise."""

# Derived figures


def after_warmup(step_times: Sequence[float]) -> list[float]:
    """The steps that count: all after the first (it allocates, compiles and tunes), when there are more than one."""
    return list(step_times[1:] if len(step_times) > 1 else step_times)


def throughput(tokens_per_step: int, step_times: Sequence[float]) -> float | None:
    """Tokens per second: all tokens over all seconds of the steps after the first; None if no time was measured.

    Total over total is what the hours of a run obey; a mean of each step's rate would hide the slow steps.
    """
    times = after_warmup(step_times)
    seconds = math.fsum(times)
    return tokens_per_step * len(times) / seconds if seconds > 0 else None


def time_per_epoch(tokens_per_second: float | None, tokens_per_epoch: int | None) -> float | None:
    """Seconds that one pass over the training data takes at this throughput, whether or not a whole one was made.

    None where either is unknown, as the number of tokens is until a file that is being prepared is finished.
    """
    return tokens_per_epoch / tokens_per_second if tokens_per_second and tokens_per_epoch else None


def step_time_percentiles(step_times: Sequence[float]) -> dict[str, float | None]:
    """Median, 10th and 90th percentile in seconds of the steps after the first, interpolated linearly."""
    times = after_warmup(step_times)
    if not times:
        return {"median": None, "p10": None, "p90": None}
    median, p10, p90 = (float(value) for value in np.percentile(times, [50, 10, 90]))
    return {"median": median, "p10": p10, "p90": p90}


def latency_percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile in seconds of some latencies, interpolated linearly."""
    p50, p95 = (float(value) for value in np.percentile(seconds, [50, 95]))
    return {"p50": p50, "p95": p95}


def data_share(data_times: Sequence[float], step_times: Sequence[float]) -> float | None:
    """Share of the time of the steps after the first that was spent waiting for data; None if no time was measured."""
    seconds = math.fsum(after_warmup(step_times))
    return math.fsum(after_warmup(data_times)) / seconds if seconds > 0 else None


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats; infinite where a float cannot hold it (loss above 709), never an OverflowError."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def number(value: float | None) -> float:
    """NaN for the null that NaN became in a file: a run that diverged must not be summed up by its better past."""
    return math.nan if value is None else float(value)


def json_safe(value: Any) -> Any:
    """The same value with every NaN and infinity, however deep, as None: strict JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return value


# The machine


def physical_cores(cpuinfo: str) -> int | None:
    """Distinct (socket, core) pairs in /proc/cpuinfo; None where it does not name them, as on ARM."""
    sockets = re.findall(r"^physical id\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    cores = re.findall(r"^core id\s*:\s*(\d+)", cpuinfo, re.MULTILINE)
    return len(set(zip(sockets, cores, strict=True))) or None if len(sockets) == len(cores) else None


def hardware() -> dict[str, Any]:
    """What this process runs on. Memory in bytes. No host name: reports are shown to strangers."""
    cpuinfo = read_or_none("/proc/cpuinfo") or ""
    model_name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    gpus = accelerators()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": model_name[1].strip() if model_name else platform.processor() or platform.machine(),
        "cpu_physical_cores": physical_cores(cpuinfo),
        "cpu_logical_cores": os.cpu_count(),
        # A container or `taskset` may allow fewer than the machine has.
        "cpu_usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": cpu_has_fast_bf16(),
        "torch_threads": torch.get_num_threads(),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu_count": len(gpus),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def torch_build(version: str, cuda: str | None) -> str:
    """The version of torch with its build, such as "2.13.0+cpu" or "2.13.0+cu130".

    `version` is `torch.__version__`: the metadata of a CUDA wheel has the bare release. Builds from elsewhere may have
    the bare release in both, and are told apart by `torch.version.cuda`.
    """
    return version if "+" in version or not cuda else f"{version}+cu{cuda.replace('.', '')}"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that shape a run. None of the packages is imported."""
    packages = ["gpt2flash", "transformers", "accelerate", "deepspeed", "datasets", "evaluate", "tiktoken"]
    packages += ["flash-attn", "flash-attn-4", "kernels", "liger-kernel", "numpy"]
    found = {"python": platform.python_version(), "torch": torch_build(str(torch.__version__), torch.version.cuda)}
    for package in packages:
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            continue
    return found


# The summary of a run


def summarise(
    *,
    run_type: str,
    records: Sequence[Mapping[str, Any]],
    tokens_per_step: int,
    tokens_per_epoch: int | None,
    block_size: int,
    precision: str,
    model: Mapping[str, int],
    n_inner: int | None,
    parameters: int,
    world_size: int,
    device_peak_flops: float | None,
    memory: Mapping[str, Any],
    attn_implementation: str,
    attn_reason: str,
    data: Mapping[str, Mapping[str, Any]],
    sample: Mapping[str, str] | None,
    config: Mapping[str, Any],
    hardware: Mapping[str, Any],
    versions: Mapping[str, str],
    inference_latency_seconds: float | None = None,
    inference_seconds_per_token: float | None = None,
    inference_percentiles: Mapping[str, Mapping[str, float]] | None = None,
    activation_checkpointing: int = 0,
    activation_checkpointing_keeps: str = "nothing",
    energy: Energy | None = None,
) -> dict[str, Any]:
    """The content of `metrics.json`, from the lines of `metrics.jsonl` and from what only the running process knows.

    - `records`: one mapping an optimizer step, in order; needs "tokens", "loss", "step_time_seconds", "data_seconds"
      (the part of a step in which the main process waited for its data), and on the steps that were validated
      "val_loss". `tokens_per_step` and the times are those of all processes together.
    - `precision`: "bf16", "fp16", "tf32" or "fp32", what the matrix products run in; `device_peak_flops` is
      `flops.peak_flops(name, precision)` of one of the `world_size` devices.
    - `memory`: what `peak_memory` returned, of the process with the most.
    - training time is the sum of the step times: validation and checkpoints are not in it, every attempt of a run that
      was resumed is. Throughput, step times and the share of waiting leave the steps out that are "profiled".
    - `energy`: that of the steps of this attempt that throughput counts; None where no device says.
    - inference: one sequence at a time, the latency up to the first token, then the seconds of each further one.
      Percentiles: "first_token" and "per_token", each with "p50" and "p95" in seconds over all that were timed.
    """
    plain = [record for record in records if not record.get("profiled")]
    times = [float(record["step_time_seconds"]) for record in plain]
    waits = [number(record.get("data_seconds")) for record in plain]  # a run begun by an older version has none
    losses = [number(record["loss"]) for record in records[-FINAL_STEPS:]]
    validations = [number(record["val_loss"]) for record in records if "val_loss" in record]
    tokens_per_second = throughput(tokens_per_step, times)
    flops = count_flops(
        *(model["n_layer"], model["n_embd"], n_inner, model["vocab_size"], block_size),
        activation_checkpointing=activation_checkpointing,
        keeps=activation_checkpointing_keeps,
        fused_attention=attn_implementation != "eager",
    )
    summary = {
        "schema": SCHEMA,
        "run_type": run_type,
        "steps": len(records),
        "tokens": records[-1]["tokens"] if records else 0,
        "training_time_seconds": math.fsum(float(record["step_time_seconds"]) for record in records),
        "time_per_epoch_seconds": time_per_epoch(tokens_per_second, tokens_per_epoch),
        "tokens_per_second": tokens_per_second,
        "step_time_seconds": step_time_percentiles(times),
        "data_share": data_share(waits, times),
        "train_loss": sum(losses) / len(losses) if losses else None,
        "val_loss": validations[-1] if validations else None,
        "perplexity": perplexity(validations[-1]) if validations else None,
        "inference_latency_seconds": inference_latency_seconds,
        "inference_seconds_per_token": inference_seconds_per_token,
        "inference_tokens_per_second": 1 / inference_seconds_per_token if inference_seconds_per_token else None,
        "inference_percentiles": inference_percentiles,
        "val_tokens": next((r["val_tokens"] for r in reversed(records) if r.get("val_tokens")), None),
        "peak_memory_bytes": memory["peak_memory_bytes"],
        "peak_memory_kind": memory["peak_memory_kind"],
        "peak_memory_reserved_bytes": memory["peak_memory_reserved_bytes"],
        "energy_joules": energy and energy.joules,
        "joules_per_token": energy and energy.joules / (energy.steps * tokens_per_step),
        "energy_covers": energy and energy.covers,
        "parameters": parameters,
        "flops_per_token": flops.model,
        "flops_per_token_by_part": dataclasses.asdict(flops),
        "hardware_flops_per_token": flops.hardware,
        "flops_per_second": None if tokens_per_second is None else flops.model * tokens_per_second,
        "mfu": utilisation(tokens_per_second, flops.model, device_peak_flops, world_size),
        "hfu": utilisation(tokens_per_second, flops.hardware, device_peak_flops, world_size),
        "data": data,
        "model": model,
        "tokens_per_step": tokens_per_step,
        "block_size": block_size,
        "precision": precision,
        "world_size": world_size,
        "attn_implementation": attn_implementation,
        "attn_reason": attn_reason,
        "sample": sample,
        "config": config,
        "hardware": hardware,
        "versions": versions,
    }
    return json_safe(summary)
