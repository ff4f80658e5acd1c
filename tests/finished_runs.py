"""Folders of finished runs for tests to compare, made of the figures that a test wants to see in them."""

import json
import math
from pathlib import Path
from typing import Any

from train.metrics.summary import summarise


def write_run(
    folder: Path,
    step_time: float = 1.0,
    peak: int = 2**30,
    steps: int = 40,
    val_loss: float = 2.0,
    wobble: float = 0.0,
    **changed: Any,
) -> Path:
    """A finished run of `steps` steps of 1,000 tokens, as the training loop leaves it."""
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        record = {"step": step, "epoch": 0.1, "tokens": 1000 * step, "loss": 3.0 + 8.0 / step, "learning_rate": 1e-3}
        seconds = step_time * (1 + wobble * (step % 4))
        record |= {"grad_norm": None, "tokens_per_second": 1000 / seconds, "step_time_seconds": seconds}
        record["data_seconds"] = 0.01 * seconds
        records.append(record)
    for record in records[steps // 2 - 1 :: steps // 2]:
        record |= {"val_loss": val_loss, "perplexity": math.exp(val_loss)}
    arguments: dict[str, Any] = {
        "run_type": folder.name,
        "records": records,
        "tokens_per_step": 1000,
        "tokens_per_epoch": 100_000,
        "block_size": 250,
        "precision": "fp32",
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 250, "vocab_size": 101},
        "n_inner": None,
        "parameters": 5000,
        "world_size": 1,
        "device_peak_flops": None,
        "memory": {"peak_memory_bytes": peak, "peak_memory_kind": "rss", "peak_memory_reserved_bytes": None},
        "attn_implementation": "sdpa",
        "attn_reason": "no GPU here",
        "data": {
            "train": {"path": "train.bin", "tokens": 100_000, "sha256": "a" * 64},
            "val": {"path": "val.bin", "tokens": 1000, "sha256": "b" * 64},
        },
        "sample": {"prompt": "Once", "text": "upon a time\n```\ncode"},
        "config": {"seed": 1, "learning_rate": 1e-3},
        "hardware": {"cpu": "Some CPU", "gpus": []},
        "versions": {"torch": "2.13.0"},
        "inference_latency_seconds": 0.05,
        "inference_seconds_per_token": 0.01,
    }
    summary = summarise(**{**arguments, **changed})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "metrics.json").write_text(json.dumps(summary, allow_nan=False))
    return folder
