"""What is computed again in the backward pass: all of a block, all but its attention, or what is no product either."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT, engine_steps, losses, train
from tests.engine_steps import Operations
from tests.flash_stubs import attend, attend_varlen, install, make_flash
from tests.test_packed_documents import packed_positions
from tests.tiny_gpt2 import gradients, make_ours, tokens
from train.config.run_config import parse
from train.engines.transforms import ATTENTION_OPERATORS, checkpoint_arguments, checkpoint_blocks
from train.run.setup import resolve
from train.utils.errors import UserError

SDPA = "aten::_scaled_dot_product_flash_attention_for_cpu"


def step(model, **more) -> tuple[Counter[str], list[Tensor]]:
    """The operations of a training step, and its loss and gradients."""
    ids = tokens(3)
    model.zero_grad()
    with Operations() as operations:
        loss = model(ids, labels=ids, use_cache=False, **more).loss
        loss.backward()
    return operations.counts, [loss.detach(), *gradients(model).values()]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_runs_once_and_all_else_as_often_as_before(dtype: torch.dtype, packed: bool) -> None:
    model = make_ours(n_layer=3).train().to(dtype)
    more = {"position_ids": packed_positions()} if packed else {}
    counts, results = {}, {}
    for mode in ("none", "full", "selective"):
        if mode != "none":
            checkpoint_blocks(model, checkpoint_arguments(mode))
        counts[mode], results[mode] = step(model, **more)
    assert [counts[mode][SDPA] for mode in counts] == [3, 6, 3]
    assert [counts[mode]["aten::tanh"] for mode in counts] == [3, 6, 6], "an activation, for one"

    def spared(mode: str) -> dict[str, int]:
        differing = counts["full"] - counts[mode] + (counts[mode] - counts["full"])
        return {name: count for name, count in differing.items() if name not in ("aten::detach", "prim::device")}

    # Of four products the last is no input of anything that is needed again, so not even "full" computes it twice.
    assert spared("selective") == {SDPA: 3, "aten::addmm": 9}
    for mode in ("full", "selective"):
        assert all(map(torch.equal, results[mode], results["none"]))


@contextmanager
def flash_attention_2_as_an_operation(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its stub, called through an operation of torch of the name and at the place that flash-attn 2.8 has for it."""
    with torch.library._scoped_library("flash_attn", "DEF") as library:
        library.define("_flash_attn_forward(Tensor q, Tensor k, Tensor v, float s) -> Tensor")
        library.define("_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor bounds, float s) -> Tensor")

        def rows(q, k, v, bounds, scale):
            return attend_varlen(q, k, v, bounds, bounds, scale, True)

        library.impl("_flash_attn_varlen_forward", rows, "CPU")
        library.impl("_flash_attn_forward", lambda q, k, v, scale: attend(q, k, v, scale, True), "CPU")

        class Kernel(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v, bounds, scale):
                ctx.save_for_backward(q, k, v, bounds)
                ctx.scale = scale
                if bounds is None:
                    return torch.ops.flash_attn._flash_attn_forward(q, k, v, scale)
                return torch.ops.flash_attn._flash_attn_varlen_forward(q, k, v, bounds, scale)

            @staticmethod
            def backward(ctx, gradient):
                *inputs, bounds = ctx.saved_tensors
                with torch.enable_grad():
                    inputs = [x.detach().requires_grad_() for x in inputs]
                    output = attend(*inputs, ctx.scale, True) if bounds is None else rows(*inputs, bounds, ctx.scale)
                return *torch.autograd.grad(output, inputs, gradient), None, None

        def plain(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
            return Kernel.apply(q, k, v, None, softmax_scale)

        def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
            return Kernel.apply(q, k, v, cu_seqlens_q, softmax_scale)

        install(patch, two=plain, two_varlen=varlen)
        yield


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attentions_output_is_saved_too(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    more = {"position_ids": packed_positions()} if packed else {}
    name = f"flash_attn::_flash_attn_{'varlen_' * packed}forward"
    assert name in ATTENTION_OPERATORS
    with flash_attention_2_as_an_operation(monkeypatch):
        model = make_flash("flash_attention_2", n_layer=3).bfloat16().train()
        _, expected = step(model, **more)
        for mode, runs in (("full", 6), ("selective", 3)):
            checkpoint_blocks(model, checkpoint_arguments(mode))
            counts, found = step(model, **more)
            assert counts[name] == runs
            assert counts["aten::tanh"] == 6
            assert all(map(torch.equal, found, expected))


@pytest.mark.slow
def test_runs_of_every_mode_have_the_same_losses(flags: list[str], tmp_path: Path) -> None:
    shared = [*flags, "--attn_implementation=sdpa"]
    for mode in ("none", "full", "selective"):
        own = [f"--activation_checkpointing={mode}", f"--checkpoint_path={tmp_path}/{mode}"]
        train(*shared, *own, cwd=tmp_path)
    none, full, selective = (losses(tmp_path / mode / "baseline") for mode in ("none", "full", "selective"))
    assert none == full == selective


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "output of eager attention from other tensors; give --attn_implementation sdpa or flash_attention_2"),
        (["--attn_implementation=sdpa", "--dropout=0.1"], r"with --dropout 0.1 the recomputed dropout masks"),
    ],
)
def test_selective_refuses_what_differs(flags: list[str], tmp_path: Path, more: list[str], message: str) -> None:
    selective = "--activation_checkpointing=selective"
    with pytest.raises(UserError, match=message):
        resolve(parse([*flags, *more, selective, f"--checkpoint_path={tmp_path}"]))


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 2])
def test_stages_save_their_attention_too(flags: list[str], tmp_path: Path, interval: int) -> None:
    two = ["--run_type=optimized", f"--deepspeed_config={tmp_path}/ds.json", "--pipeline_stages=2",
           "--train_micro_batch_size_per_gpu=2", "--gradient_accumulation_steps=2", "--mixed_precision=no",
           "--max_steps=2", "--attn_implementation=sdpa"]  # fmt: skip
    settings = json.loads((ROOT / "ds_configs" / "pipeline.json").read_text())
    settings["pipeline"] |= {"partition": [2, 3]}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    every = f"--activation_checkpointing_interval={interval}"
    steps = {"none": engine_steps("counted", tmp_path / "none", *flags, *two)} | {
        mode: engine_steps("counted", tmp_path / mode, *flags, *two, f"--activation_checkpointing={mode}", every)
        for mode in ("full", "selective")
    }
    for stage in (0, 1):
        for modes in zip(*(of_mode[stage] for of_mode in steps.values()), strict=True):
            # One block a stage, two micro-batches.
            assert [step["operations"][SDPA] for step in modes] == [2, 4, 2]
            assert [step["operations"]["aten::gelu"] for step in modes] == [2, 4, 4]
            assert len({(step["loss"], step["grad_norm"]) for step in modes}) == 1
