"""What is computed again in the backward pass: all of a block, all but its attention, or what is no product either."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT, engine_steps, losses, python
from tests.engine_steps import Operations
from tests.flash_stubs import attend, attend_varlen, install, make_flash
from tests.test_packed_documents import packed_positions
from tests.tiny_gpt2 import gradients, make_ours, tokens
from train.config.run_config import parse
from train.engines.transforms import ATTENTION_OPERATORS, checkpoint_arguments, checkpoint_blocks
from train.run.setup import settle
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
    for keeps in ("all", "nothing", "attention", "products"):
        if keeps != "all":
            checkpoint_blocks(model, checkpoint_arguments(keeps))
        counts[keeps], results[keeps] = step(model, **more)
    assert [counts[keeps][SDPA] for keeps in counts] == [3, 6, 3, 3]
    assert [counts[keeps]["aten::tanh"] for keeps in counts] == [3, 6, 6, 6], "an activation, for one"

    def spared(keeps: str) -> dict[str, int]:
        differing = counts["nothing"] - counts[keeps] + (counts[keeps] - counts["nothing"])
        return {name: count for name, count in differing.items() if name not in ("aten::detach", "prim::device")}

    assert spared("attention") == {SDPA: 3}
    # Of four products the last is no input of anything that is needed again, so not even "nothing" has it twice.
    assert spared("products") == {SDPA: 3, "aten::addmm": 9}
    for keeps in ("nothing", "attention", "products"):
        assert all(map(torch.equal, results[keeps], results["all"]))


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
def test_flash_attentions_operation_is_kept_too(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    more = {"position_ids": packed_positions()} if packed else {}
    name = f"flash_attn::_flash_attn_{'varlen_' * packed}forward"
    assert name in ATTENTION_OPERATORS
    with flash_attention_2_as_an_operation(monkeypatch):
        model = make_flash("flash_attention_2", n_layer=3).bfloat16().train()
        _, expected = step(model, **more)
        for keeps, runs in (("nothing", 6), ("attention", 3), ("products", 3)):
            checkpoint_blocks(model, checkpoint_arguments(keeps))
            counts, found = step(model, **more)
            assert counts[name] == runs
            assert counts["aten::tanh"] == 6
            assert all(map(torch.equal, found, expected))


@pytest.mark.slow
def test_a_run_with_attention_kept_has_the_same_losses(flags: list[str], tmp_path: Path) -> None:
    shared = [*flags, "--attn_implementation=sdpa", "--activation_checkpointing"]
    for name, more in (("full", []), ("kept", ["--activation_checkpointing_keeps=attention"])):
        python("-m", "train", *shared, *more, f"--checkpoint_path={tmp_path}/{name}", cwd=tmp_path)
    full, kept = (losses(tmp_path / name / "baseline") for name in ("full", "kept"))
    assert kept == full


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attn_implementation=sdpa"], "everything is kept as it is; give --activation_checkpointing"),
        (
            ["--activation_checkpointing"],
            "eager attention cannot be told from others; give --attn_implementation sdpa",
        ),
        (
            ["--activation_checkpointing", "--attn_implementation=sdpa", "--dropout=0.1"],
            r"with --dropout 0.1 the rest would be recomputed with other dropouts",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(flags: list[str], tmp_path: Path, more: list[str], message: str) -> None:
    keeps = "--activation_checkpointing_keeps=attention"
    with pytest.raises(UserError, match=message):
        settle(parse([*flags, *more, keeps, f"--checkpoint_path={tmp_path}"]))


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 2])
def test_stages_keep_their_attention_too(flags: list[str], tmp_path: Path, interval: int) -> None:
    two = ["--run_type=optimized", f"--deepspeed_config={tmp_path}/ds.json", "--pipeline_stages=2",
           "--train_micro_batch_size_per_gpu=2", "--gradient_accumulation_steps=2", "--mixed_precision=no",
           "--max_steps=2", "--attn_implementation=sdpa"]  # fmt: skip
    settings = json.loads((ROOT / "ds_configs" / "pipeline.json").read_text())
    settings["pipeline"] |= {"partition": [2, 3]}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    recomputed = [f"--activation_checkpointing={interval}"]
    said = {
        "all": engine_steps("counted", tmp_path / "all", *flags, *two),
        "nothing": engine_steps("counted", tmp_path / "nothing", *flags, *two, *recomputed),
        "attention": engine_steps(
            "counted", tmp_path / "attention", *flags, *two, *recomputed, "--activation_checkpointing_keeps=attention"
        ),
    }
    for stage in (0, 1):
        for number, all_kept in enumerate(said["all"][stage]):
            nothing, attention = said["nothing"][stage][number], said["attention"][stage][number]
            # One block a stage, two micro-batches.
            assert [one["operations"][SDPA] for one in (all_kept, nothing, attention)] == [2, 4, 2]
            assert [one["operations"]["aten::gelu"] for one in (all_kept, nothing, attention)] == [2, 4, 4]
            assert all_kept["loss"] == nothing["loss"] == attention["loss"]
            assert all_kept["grad_norm"] == nothing["grad_norm"] == attention["grad_norm"]
