"""FLOPs by formula against torch's counter over the real model, and the peaks of devices."""

from typing import Any

import pytest
import torch
from torch.utils import flop_counter

from tests.tiny_gpt2 import make_ours, tokens
from train.engines.transforms import checkpoint_arguments, checkpoint_blocks
from train.metrics.flops import count_flops, peak_bandwidth, peak_flops, utilization

aten = torch.ops.aten
SIZES = {"n_layer": 3, "n_embd": 48, "n_head": 3, "vocab_size": 101, "n_positions": 64}


def test_gpt2_124m_written_out() -> None:
    blocks = 12 * (768 * 2304 + 768 * 768 + 768 * 3072 + 3072 * 768)
    assert blocks == 84_934_656
    head = 768 * 50257
    assert head == 38_597_376
    attention = 12 * 12 * 768 * 1024
    assert 6 * (blocks + head) + attention == 854_438_400
    for inner in (3072, None):
        flops = count_flops(12, 768, inner, 50257, 1024)
        assert flops.model == flops.hardware == 854_438_400
        assert (flops.blocks, flops.head, flops.attention) == (6 * blocks, 6 * head, attention)
        assert flops.recomputed == 0


def test_what_124m_recomputes() -> None:
    forward = 2 * 84_934_656 + 4 * 12 * 768 * 1024 - 2 * 12 * 3072 * 768
    assert count_flops(12, 768, None, 50257, 1024, activation_checkpointing="full").recomputed == forward
    assert count_flops(12, 768, None, 50257, 1024, fused_attention=True).recomputed == 2 * 12 * 768 * 1024
    grouped = {"activation_checkpointing": "full", "activation_checkpointing_interval": 3}
    three = count_flops(12, 768, None, 50257, 1024, **grouped).recomputed
    assert three == forward + 2 * 8 * 3072 * 768, "four groups, each without its last matmul"


def counted(run: Any) -> int:
    """FLOPs by torch's counter, taught the operators of a CPU that it does not know."""
    known = {
        aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(
            q, k, v
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            flop_counter.sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize(
    ("attention", "mode"),
    [("eager", "none"), ("eager", "full"), ("sdpa", "none"), ("sdpa", "full"), ("sdpa", "selective")],
)
def test_formula_and_counter_agree(attention: str, mode: str, chunk: int, accumulation: int) -> None:
    model = make_ours(**SIZES, loss_chunk_size=chunk).train()
    model.set_attn_implementation(attention)
    if mode != "none":
        checkpoint_blocks(model, checkpoint_arguments(mode))
    ids = tokens(2, 64)

    def step() -> None:
        for _ in range(accumulation):
            model(ids, shift_labels=ids, skip_logits=True).loss.backward()

    flops = count_flops(
        *(3, 48, None, 101, 64),
        activation_checkpointing=mode,
        fused_attention=attention != "eager",
    )
    assert counted(step) == pytest.approx(flops.hardware * ids.numel() * accumulation, rel=0.01)
    model_flops = flops.hardware - flops.recomputed
    assert model_flops == count_flops(3, 48, None, 101, 64).model, "the same for every kernel"


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("Tesla V100-PCIE-32GB", "fp32", 14),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H200", "fp16", 989.5),
        ("NVIDIA H200 NVL", "fp16", 835.5),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA L40", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("AMD EPYC", "fp32", None),
    ],
)
def test_peak_flops_knows_the_device_or_says_none(name: str, dtype: str, tflops: float | None) -> None:
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peak_flops(name, dtype) == expected


def test_mfu_reproduces_a_published_figure() -> None:
    """nanoGPT's 124M: about 107,000 tokens/s on an A100, 854 MFLOP each: 91.4 of 312 TFLOP/s."""
    mfu = utilization(8 * 107_000, 854_438_400, peak_flops("A100-SXM4-40GB", "bf16"), 8)
    assert mfu == pytest.approx(91.4249088 / 312)
    assert utilization(1.0, 1.0, None, 1) is None
    assert utilization(None, 1.0, 1.0, 1) is None


def test_hfu_counts_what_is_recomputed() -> None:
    flops = count_flops(12, 768, None, 50257, 1024, activation_checkpointing="full")
    mfu, hfu = (utilization(100_000, figure, 312e12, 2) for figure in (flops.model, flops.hardware))
    assert mfu is not None
    assert hfu == pytest.approx(mfu * flops.hardware / 854_438_400)
    assert hfu > mfu


def test_peak_bandwidth_knows_the_device_or_says_none() -> None:
    assert peak_bandwidth("NVIDIA A100-SXM4-80GB") == 2039e9
    assert peak_bandwidth("NVIDIA H200") == 4800e9
    assert peak_bandwidth("NVIDIA H200 MIG 1g.18gb") is None
    assert peak_bandwidth("cpu") is None
