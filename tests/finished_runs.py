"""Folders of finished runs for tests to compare, made of the figures that a test wants to see in them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from train.metrics.flops import count_flops
from train.metrics.summary import RunFacts, summarize

FACTS = RunFacts(
    run_type="baseline",
    tokens_per_step=1000,
    block_size=250,
    precision="fp32",
    world_size=1,
    parameters=5000,
    attn_implementation="sdpa",
    attn_reason="no GPU here",
    model={"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 250, "vocab_size": 101},
    data={
        "train": {"path": "train.bin", "tokens": 100_000, "sha256": "a" * 64},
        "val": {"path": "val.bin", "tokens": 1000, "sha256": "b" * 64},
    },
    config={"seed": 1, "learning_rate": 1e-3},
    hardware={"cpu": "Some CPU", "gpus": []},
    versions={"torch": "2.13.0"},
    sample={"prompt": "Once", "text": "upon a time\n```\ncode"},
)
MEASURED = {
    "peak_memory_bytes": 2**30,
    "peak_memory_kind": "rss",
    "peak_memory_reserved_bytes": None,
    "inference_latency_seconds": 0.05,
    "inference_tokens_per_second": 100.0,
}


def summary(
    records: list[dict[str, Any]],
    measured: dict[str, Any] | None = None,
    tokens_per_epoch: int | None = 100_000,
    device_peak_flops: float | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """A `metrics.json` of these records, with what differs from `FACTS` and `MEASURED`."""
    changed = dataclasses.replace(FACTS, **facts)
    shape = changed.model
    flops = count_flops(
        *(shape["n_layer"], shape["n_embd"], None, shape["vocab_size"]),
        changed.block_size,
        fused_attention=changed.attn_implementation != "eager",
    )
    return summarize(
        changed,
        records,
        MEASURED | (measured or {}),
        flops,
        tokens_per_epoch=tokens_per_epoch,
        device_peak_flops=device_peak_flops,
    )


def write_run(
    folder: Path,
    step_time: float = 1.0,
    peak: int = 2**30,
    steps: int = 40,
    val_loss: float = 2.0,
    wobble: float = 0.0,
    measured: dict[str, Any] | None = None,
    **facts: Any,
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
    found = summary(records, {"peak_memory_bytes": peak, **(measured or {})}, **{"run_type": folder.name, **facts})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "metrics.json").write_text(json.dumps(found, allow_nan=False))
    return folder
