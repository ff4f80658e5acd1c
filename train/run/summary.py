"""The end of a run: measure the saved model's inference, generate a sample, and write metrics.json."""

import dataclasses
import shlex
import sys
from typing import Any

import torch
from transformers import PreTrainedModel

from train.checkpoints.loading import load_for_inference
from train.checkpoints.run_folder import latest
from train.data.token_file import TokenFile
from train.generate.decoding import Decoding
from train.generate.latency import measure_latency
from train.generate.texts import generate_text
from train.metrics.flops import count_flops, peak_flops
from train.metrics.hardware import hardware, versions
from train.metrics.summary import RunFacts, summarize
from train.run.setup import ResolvedRun
from train.utils.devices import device_name
from train.utils.files import write_json

LATENCY_TOKENS = 32  # generated for each timing, after a prompt of as many from the validation data


def write_summary(run: ResolvedRun, records: list[dict[str, Any]], world_size: int, measured: dict[str, Any]) -> None:
    """Write metrics.json into the run folder, from its checkpoint. Main process only, with the engine closed.

    `measured`: the metrics of memory and energy.
    """
    config = run.config
    model = load_for_inference(latest(config.run_folder), dtype="bfloat16" if run.precision == "bf16" else "float32")
    facts = RunFacts(
        run_type=config.run_type,
        tokens_per_step=run.tokens_per_step,
        block_size=run.train.block_size,
        precision=run.precision,
        world_size=world_size,
        parameters=model.num_parameters(),
        attn_implementation=run.attention[0],
        attn_reason=run.attention[1],
        model={key: value for key, value in run.shape.items() if value is not None},
        data={"train": data_facts(run.train.tokens), "val": data_facts(run.val.tokens)},
        config=dataclasses.asdict(config),
        hardware=hardware(),
        versions=versions(),
        sample=generate_sample(run, model),
        command=shlex.join(["python", "-m", "train", *sys.argv[1:]]),
    )
    flops = count_flops(
        *(run.model.n_layer, run.model.n_embd, run.model.n_inner, run.model.vocab_size),
        run.train.block_size,
        activation_checkpointing=config.activation_checkpointing,
        activation_checkpointing_interval=config.activation_checkpointing_interval,
        fused_attention=run.attention[0] != "eager",
    )
    length = min(LATENCY_TOKENS, run.model.n_positions // 2)
    prompt_ids = torch.tensor(run.val.tokens.read(0, length)[None].astype("int64"), device=model.device)
    summary = summarize(
        facts,
        records,
        measured | measure_latency(model, prompt_ids, length),
        flops,
        tokens_per_epoch=run.train.blocks * run.train.block_size,
        device_peak_flops=peak_flops(device_name(model.device), run.precision),
    )
    write_json(config.run_folder / "metrics.json", summary)


def data_facts(tokens: TokenFile) -> dict[str, Any]:
    return {"path": str(tokens.path), **tokens.identity, "source": tokens.sidecar.source if tokens.sidecar else None}


def generate_sample(run: ResolvedRun, model: PreTrainedModel) -> dict[str, str] | None:
    """The prompt and the text that the model continues it with; None if the run wants none, or has no tokenizer."""
    config, tokenizer = run.config, run.tokenizer
    if config.max_new_tokens == 0 or tokenizer is None:
        return None
    room = run.model.n_positions - len(tokenizer(config.prompt).input_ids)
    text = generate_text(model, tokenizer, config.prompt, Decoding(min(config.max_new_tokens, room)))
    return {"prompt": config.prompt, "text": text}
