"""The end of a run: time the saved model at work, write a sample, and sum everything up in metrics.json."""

import dataclasses
import shlex
import sys
from typing import Any

import torch

from train.checkpoints.loading import load_for_inference
from train.data.batches import describe
from train.data.token_file import TokenFile
from train.generate.decoding import Decoding
from train.generate.latency import measure_latency
from train.generate.texts import generate_text
from train.metrics.energy import Energy
from train.metrics.flops import peak_flops
from train.metrics.summary import hardware, latency_percentiles, summarise, versions
from train.run.setup import Run
from train.utils.devices import device_name, matmul_precision
from train.utils.files import write_json

LATENCY_TOKENS = 32  # generated per timing, after a prompt of as many


def write_summary(
    run: Run,
    records: list[dict[str, Any]],
    world_size: int,
    memory: dict[str, Any],
    energy: Energy | None,
) -> None:
    """Write metrics.json into the run folder, from its checkpoint. Main process only, with the engine closed."""
    config = run.config
    precision = matmul_precision(config.mixed_precision, config.optimized)
    folder = config.run_folder / f"step-{run.total_steps}"
    model = load_for_inference(folder, dtype="bfloat16" if precision == "bf16" else "float32")
    length = min(LATENCY_TOKENS, run.model_config.n_positions // 2)
    prompt_ids = torch.tensor(run.val.tokens.ids[None, :length].astype("int64"), device=model.device)
    latencies = measure_latency(model, prompt_ids, length)
    sample = None
    tokenizer = run.tokenizer
    if config.max_new_tokens > 0 and tokenizer is not None:
        room = run.model_config.n_positions - len(tokenizer(config.prompt).input_ids)
        text = generate_text(model, tokenizer, config.prompt, Decoding(min(config.max_new_tokens, room)))
        sample = {"prompt": config.prompt, "text": text}
    summary = summarise(
        run_type=config.run_type,
        records=records,
        tokens_per_step=run.tokens_per_step,
        tokens_per_epoch=run.train.windows * run.train.block_size,
        block_size=run.train.block_size,
        precision=precision,
        model={key: value for key, value in run.shape.items() if value is not None},
        n_inner=run.model_config.n_inner,
        parameters=model.num_parameters(),
        world_size=world_size,
        device_peak_flops=peak_flops(device_name(model.device), precision),
        memory=memory,
        energy=energy,
        attn_implementation=run.attention[0],
        attn_reason=run.attention[1],
        data={
            "train": {"path": str(run.train.tokens.path), **_account(run.train.tokens)},
            "val": {"path": config.val_data_path, **_account(run.val.tokens)},
        },
        sample=sample,
        config=dataclasses.asdict(config),
        hardware=hardware(),
        versions=versions(),
        inference_latency_seconds=latencies.median_first_token,
        inference_seconds_per_token=latencies.median_per_token,
        inference_percentiles={
            "first_token": latency_percentiles(latencies.first_tokens),
            "per_token": latency_percentiles(latencies.further_tokens),
        },
        activation_checkpointing=config.activation_checkpointing or 0,
        activation_checkpointing_keeps=config.activation_checkpointing_keeps,
    )
    summary["command"] = shlex.join(["python", "-m", "train", *sys.argv[1:]])
    write_json(config.run_folder / "metrics.json", summary)


def _account(tokens: TokenFile) -> dict[str, Any]:
    return {**describe(tokens), "source": (tokens.sidecar or {}).get("source")}
