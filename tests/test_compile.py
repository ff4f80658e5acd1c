"""Regional compilation: one block is compiled for all, whole, and only once for training and once for evaluation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from modeling_gpt2flash.documents import document_bounds, kernel_arguments
from tests.conftest import ROOT, engine_steps
from tests.flash_stubs import FLASH, attend, attend_varlen, install, make_flash
from tests.tiny_gpt2 import gradients, make_ours, tokens
from train.engines.transforms import checkpoint_arguments, checkpoint_blocks, compile_blocks

PACKS = [[5, 7], [3, 4, 5], [2] * 6, [12]]


def positions(step: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in PACKS[step]]).expand(3, -1)


@pytest.fixture
def dynamo():
    """Nothing compiled before and nothing left behind."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


HOW: dict[str, Callable[[torch.nn.Module], None]] = {
    "all kept": lambda model: None,
    "recomputed": lambda model: checkpoint_blocks(model, checkpoint_arguments("full")),
    "recomputed selectively": lambda model: checkpoint_blocks(model, checkpoint_arguments("selective")),
}


def none(step: int) -> dict[str, Any]:
    return {}


def looked_for(step: int) -> dict[str, Any]:
    return {"position_ids": positions(step)}


def given(step: int) -> dict[str, Any]:
    return {"position_ids": positions(step), **kernel_arguments(document_bounds(positions(step) == 0), 12)}


@pytest.mark.parametrize(
    ("how", "kernel", "documents"),
    [
        ("all kept", "sdpa", none),
        ("recomputed selectively", "sdpa", given),
        pytest.param("all kept", "sdpa", given, marks=pytest.mark.slow),
        pytest.param("all kept", "sdpa", looked_for, marks=pytest.mark.slow),
        pytest.param("recomputed", "sdpa", none, marks=pytest.mark.slow),
        pytest.param("recomputed", "eager", looked_for, marks=pytest.mark.slow),
        pytest.param("all kept", "eager", given, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("dynamo")
def test_all_blocks_share_one_compilation(how: str, kernel: str, documents: Callable[[int], dict[str, Any]]) -> None:
    models = [make_ours(n_layer=12, attn_implementation=kernel) for _ in range(2)]
    backend = CompileCounterWithBackend("aot_eager")
    for model in models:
        HOW[how](model)
    compile_blocks(models[1], backend=backend, fullgraph=True)
    for step in range(4):
        ids, more = tokens(3, seed=step), documents(step)
        losses = []
        for model in models:
            model.train().zero_grad()
            loss = model(ids, labels=ids, use_cache=False, **more).loss
            loss.backward()
            with torch.no_grad():
                losses.append([loss, model.eval()(ids, labels=ids, use_cache=False, **more).loss])
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-6)
        expected = gradients(models[0])
        for name, gradient in gradients(models[1]).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
        # The last rows are found to be one document each, for which sdpa needs no mask.
        unmasked = kernel == "sdpa" and documents is looked_for and step == 3
        assert backend.frame_count == (4 if unmasked else 2)
    assert not counters["graph_break"]


@pytest.mark.usefixtures("dynamo")
def test_what_is_quick_is_recomputed_inside_of_what_is_compiled() -> None:
    kept, counts, results = {}, {}, {}
    for mode in ("none", "selective"):
        model = make_ours(n_layer=3).train()
        recompute = None if mode == "none" else checkpoint_arguments(mode)
        compile_blocks(model, recompute, backend="aot_eager_decomp_partition", fullgraph=True)
        ids = tokens(3)
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
        kept[mode] = sum(sizes.values())
        counts[mode] = {row.key: row.count for row in recorded.key_averages()}
        results[mode] = [loss.detach(), *gradients(model).values()]
    for operation in ("aten::addmm", "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert counts["selective"][operation] == counts["none"][operation] > 0
    assert kept["selective"] < 0.8 * kept["none"]
    torch.testing.assert_close(results["selective"], results["none"], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("dynamo")
def test_blocks_with_a_flash_kernel_share_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention's kernels are operations that torch.compile does not look into, and so are these."""
    with torch.library._scoped_library("stub", "FRAGMENT") as library:
        library.define("plain(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
        library.define("varlen(Tensor q, Tensor k, Tensor v, Tensor bounds, int longest, float scale) -> Tensor")
        library.impl("plain", lambda q, k, v, scale: attend(q, k, v, scale, True).contiguous(), "CPU")
        library.impl(
            "varlen",
            lambda q, k, v, bounds, longest, scale: attend_varlen(q, k, v, bounds, bounds, scale, True),
            "CPU",
        )
        for name in ("plain", "varlen"):
            library.impl(name, lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format), "Meta")

        def two(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
            return torch.ops.stub.plain(q, k, v, softmax_scale)

        def two_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
        ):
            return torch.ops.stub.varlen(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)

        install(monkeypatch, two=two, two_varlen=two_varlen, recording=False)
        models = [make_flash(FLASH[0], n_layer=12).bfloat16() for _ in range(2)]
        backend = CompileCounterWithBackend("eager")
        compile_blocks(models[1], backend=backend, fullgraph=True)
        counts = []
        with torch.no_grad():
            for step in (3, 0, 1, 2):
                ids = tokens(3, seed=step)
                logits = [model(ids, position_ids=positions(step), use_cache=False).logits for model in models]
                torch.testing.assert_close(*logits, rtol=3e-2, atol=5e-2)
                counts.append(backend.frame_count)
    # One document a row; several; when their number changed, one for any number.
    assert counts == [1, 2, 3, 3]


def zero(stage: int) -> list[str]:
    return ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/zero{stage}.json"]


def check(found: list[list[dict[str, Any]]], expected: list[list[dict[str, Any]]]) -> None:
    """The same losses, in two compilations: one for training, one for evaluation."""
    for compiled, plain in zip(found, expected, strict=True):
        for ours, theirs in zip(compiled, plain, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
            assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-6)  # of a sum in fp32
            assert ours["graph_breaks"] == []
        assert compiled[-1]["compilations"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (1, []),
        (1, ["--activation_checkpointing=full"]),
        (1, ["--activation_checkpointing=selective"]),
        (1, ["--document_mask", "--activation_checkpointing=selective"]),
        (1, ["--document_mask"]),
        (2, []),
        (2, ["--activation_checkpointing=full"]),
        (2, ["--document_mask", "--activation_checkpointing=selective"]),
        (2, zero(1)),
        (2, [*zero(2), "--activation_checkpointing=full"]),
        (2, [*zero(3), "--document_mask"]),
        (2, [*zero(3), "--activation_checkpointing=selective"]),
    ],
)
def test_inductor_in_every_layout(
    flags: list[str], documents: Path, tmp_path: Path, processes: int, more: list[str]
) -> None:
    shared = [*flags, *more, "--attn_implementation=sdpa", "--mixed_precision=no", "--max_steps=5",
              f"--train_micro_batch_size_per_gpu={4 // processes}", f"--train_data_path={documents}/train.bin",
              f"--val_data_path={documents}/val.bin"]  # fmt: skip
    expected = engine_steps("alternating", tmp_path / "eager", *shared, processes=processes)
    found = engine_steps("alternating", tmp_path / "compiled", *shared, "--torch_compile", processes=processes)
    check(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recompute",
    [
        [],
        ["--activation_checkpointing=full", "--activation_checkpointing_interval=2"],
        ["--activation_checkpointing=selective"],
    ],
)
def test_inductor_in_stages(flags: list[str], documents: Path, tmp_path: Path, recompute: list[str]) -> None:
    settings = json.loads((ROOT / "ds_configs" / "pipeline.json").read_text())
    settings["pipeline"] |= {"partition": [2, 3]}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    shared = [*flags, "--run_type=optimized", f"--deepspeed_config={tmp_path}/ds.json", "--pipeline_stages=2",
              "--train_micro_batch_size_per_gpu=2", "--gradient_accumulation_steps=2", "--mixed_precision=no",
              "--max_steps=5", "--attn_implementation=sdpa", *recompute, "--document_mask",
              f"--train_data_path={documents}/train.bin", f"--val_data_path={documents}/val.bin"]  # fmt: skip
    expected = engine_steps("alternating", tmp_path / "eager", *shared)
    found = engine_steps("alternating", tmp_path / "compiled", *shared, "--torch_compile")
    assert len(found) == 2
    check(found, expected)
