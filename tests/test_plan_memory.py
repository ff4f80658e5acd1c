"""What the planner says a process holds, against what its tensors take in real steps: within a tenth, over shapes."""

import dataclasses
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from tests.conftest import engine_steps
from train.engines.pipeline.partition import partition
from train.engines.transforms import checkpoint_arguments, checkpoint_blocks
from train.metrics.annotations import annotate
from train.metrics.memory_profile import CATEGORIES
from train.metrics.memory_tracker import MemoryTracker
from train.optim.parameter_groups import build_optimizer
from train.plan.memory import predict, predict_stage
from train.plan.shapes import Buckets, Layout, Shape

WITHIN = 0.10
# Layers, heads, width, width of the MLP, vocabulary, positions, tokens of a sequence: narrow, long, odd, wide.
SHAPES = [
    Shape(3, 4, 48, 192, 331, 64, 64),
    Shape(2, 2, 32, 128, 61, 256, 256),
    Shape(5, 3, 36, 150, 1009, 48, 40),
    Shape(2, 4, 64, 256, 3001, 32, 16),
]


def config_of(shape: Shape, **fields: Any) -> GPT2FlashConfig:
    sizes = {key: value for key, value in dataclasses.asdict(shape).items() if key != "block_size"}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2FlashConfig(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0, **fields)


def track(shape: Shape, layout: Layout) -> dict[str, Any]:
    """The second step of a model in this process, as an engine takes it."""
    config = config_of(shape, loss_chunk_size=layout.loss_chunk_size)
    model = GPT2FlashForCausalLM._from_config(config, attn_implementation="sdpa").train()
    if layout.activation_checkpointing != "none":
        checkpoint_blocks(model, checkpoint_arguments(layout.activation_checkpointing))
    optimizer = build_optimizer(model, "adamw", learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=False)
    ids = torch.randint(shape.vocab_size, (layout.micro_batch, shape.block_size))

    def step() -> None:
        for _ in range(layout.accumulation):
            cast: AbstractContextManager = torch.autocast("cpu", torch.bfloat16) if layout.bf16 else nullcontext()
            with annotate("forward"), cast:
                loss = model(input_ids=ids, shift_labels=ids, use_cache=False, skip_logits=True).loss
            with annotate("backward"):
                loss.backward()
        with annotate("optimizer"):
            optimizer.step()
            optimizer.zero_grad()

    def holdings() -> list[tuple[str, torch.Tensor]]:
        found: list[tuple[str, torch.Tensor]] = [("parameters", p.detach()) for p in model.parameters()]
        found += [("gradients", p.grad) for p in model.parameters() if p.grad is not None]
        return found + [("optimizer", value) for state in optimizer.state.values() for value in state.values()]

    step()
    with MemoryTracker(holdings, shape.vocab_size, "cpu") as tracker:
        step()
    return asdict(tracker.profile())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize(
    "shapes", [[SHAPES[2]], pytest.param(SHAPES, marks=pytest.mark.slow)], ids=["odd", "all shapes"]
)
def test_one_process(checkpointing: Any, bf16: bool, shapes: list[Shape]) -> None:
    for shape in shapes:
        for micro_batch, accumulation in ((1, 1), (5, 2)):
            layout = Layout(
                "single",
                1,
                micro_batch,
                accumulation,
                activation_checkpointing=checkpointing,
                bf16=bf16,
                loss_chunk_size=50,
                device="cpu",
            )
            measured, predicted = track(shape, layout), predict(shape, layout)
            said = f"{shape} {layout}\n{measured['at_peak']}\n{predicted.at_peak}"
            assert predicted.peak == pytest.approx(measured["peak_bytes"], rel=WITHIN), said


SMALL_BUCKETS = Buckets(reduce=20_000, prefetch=20_000)
ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
}


def zero_json(file: Path, stage: int, pipeline: bool) -> Path:
    """As the shipped ones, with buckets that do not hide all else."""
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": SMALL_BUCKETS.reduce}
    if stage > 1:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": SMALL_BUCKETS.prefetch}
        zero |= {"stage3_param_persistence_threshold": 1000}
    stages = {"pipeline": {"stages": "auto", "partition": "cost"}} if pipeline else {}
    file.write_text(json.dumps(ZERO | {"zero_optimization": zero} | stages))
    return file


LAYOUTS = {
    "ddp": Layout("ddp", 2, 3, bf16=False),
    "ddp-bf16": Layout("ddp", 2, 2, 2, bf16=True, loss_chunk_size=50),
    "fsdp2": Layout("fsdp2", 2, 3, bf16=False),
    "fsdp2-bf16": Layout("fsdp2", 2, 2, 2, bf16=True, loss_chunk_size=50, activation_checkpointing="full"),
    "zero1": Layout("zero", 2, 3, zero_stage=1, bf16=True),
    "zero1-recompute": Layout(
        "zero", 2, 1, 2, zero_stage=1, bf16=False, activation_checkpointing="full", loss_chunk_size=50
    ),
    "zero2": Layout("zero", 2, 3, zero_stage=2, bf16=True, loss_chunk_size=50),
    "zero2-recompute": Layout("zero", 2, 1, 2, zero_stage=2, bf16=False, activation_checkpointing="full"),
    "zero3": Layout("zero", 2, 3, zero_stage=3, bf16=True),
    "zero3-recompute": Layout(
        "zero", 2, 1, 2, zero_stage=3, bf16=False, activation_checkpointing="full", loss_chunk_size=50
    ),
    "pipeline": Layout("zero", 2, 2, 4, zero_stage=1, stages=2, bf16=True),
    "pipeline-fp32": Layout("zero", 2, 3, 2, zero_stage=1, stages=2, bf16=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_processes(name: str, tmp_path: Path) -> None:
    shape = SHAPES[0] if list(LAYOUTS).index(name) % 2 else SHAPES[2]  # each kind of layout sees both
    layout = dataclasses.replace(LAYOUTS[name], device="cpu", buckets=SMALL_BUCKETS)
    config = config_of(shape)
    GPT2FlashForCausalLM(config).save_pretrained(tmp_path / "model")
    for file in ("train.bin", "val.bin"):
        ids = torch.randint(shape.vocab_size, (4000,)).numpy().astype("uint16")
        ids.tofile(tmp_path / file)
    words = [
        f"--model={tmp_path}/model",
        f"--train_data_path={tmp_path}/train.bin",
        f"--val_data_path={tmp_path}/val.bin",
        f"--block_size={shape.block_size}",
        "--max_steps=3",
        "--report_to=none",
        "--prompt=",
        "--max_new_tokens=0",
        f"--train_micro_batch_size_per_gpu={layout.micro_batch}",
        f"--gradient_accumulation_steps={layout.accumulation}",
        f"--mixed_precision={'bf16' if layout.bf16 else 'no'}",
        "--attn_implementation=sdpa",
        f"--loss_chunk_size={layout.loss_chunk_size}",
        f"--activation_checkpointing={layout.activation_checkpointing}",
    ]
    if layout.kind == "zero":
        file = zero_json(tmp_path / "zero.json", layout.zero_stage, layout.stages > 1)
        words += ["--run_type=optimized", f"--deepspeed_config={file}", f"--pipeline_stages={layout.stages}"]
    if layout.stages > 1:
        bounds = partition(config, layout.stages, block_size=shape.block_size).bounds
        layout = dataclasses.replace(layout, bounds=bounds)
    launcher = "fsdp2" if layout.kind == "fsdp2" else None
    said = engine_steps("tracked", tmp_path / "out", *words, layout=launcher)
    assert len(said) == layout.stages, "a process of each stage"
    for stage, steps in enumerate(said):
        measured, predicted = steps[-1], predict_stage(shape, layout, stage)
        assert set(measured["at_peak"]) == set(CATEGORIES)
        message = f"stage {stage}\n{measured['at_peak']}\n{dict(predicted.at_peak)}"
        assert predicted.peak == pytest.approx(measured["peak_bytes"], rel=WITHIN), message
