"""FLOPs of a training step, by formula, and the peak rates of devices.

Tests hold the formulas to within 1 % of torch's counter over a real forward and backward pass.
"""

import re
from dataclasses import dataclass

# Memory bandwidth in GB/s, and dense peaks in TFLOP/s, accumulating in fp32. Datasheets from Ampere on print
# tensor-core numbers "with sparsity": half of those is what a dense matmul can reach. The pattern must match the full
# name that torch gives, so that a laptop part, a "Ti", a MIG slice or a GH200 is unknown instead of wrong.
PEAKS: tuple[tuple[str, int, dict[str, float]], ...] = (
    # NVIDIA Tesla V100 datasheet (2017): no bf16 and no tf32 on Volta.
    (r"(Tesla )?V100-SXM\d?-\d+GB(-LS)?", 900, {"fp16": 125.0, "fp32": 15.7}),
    (r"(Tesla )?V100-PCIE-\d+GB", 900, {"fp16": 112.0, "fp32": 14.0}),
    # NVIDIA A100 datasheet (2020): 624 / 2 = 312, 312 / 2 = 156; the same for SXM4 and PCIe, 40 and 80 GB.
    (r"A100-(SXM4|PCIE)-40GB", 1555, {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"A100-SXM4-80GB", 2039, {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"A100 80GB PCIe|A100-PCIE-80GB", 1935, {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    # NVIDIA H100 datasheet (2023), SXM: 1,979 / 2 = 989.5, 989 / 2 = 494.5; PCIe: 1,513 / 2 = 756.5, 756 / 2 = 378.
    (r"H100 80GB HBM3", 3350, {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67.0}),
    (r"H100 PCIe", 2000, {"bf16": 756.5, "fp16": 756.5, "tf32": 378.0, "fp32": 51.0}),
    # NVIDIA H200 datasheet (2024), SXM: the H100's compute, 1,979 / 2; NVL: 1,671 / 2 = 835.5, 835 / 2 = 417.5.
    (r"H200", 4800, {"bf16": 989.5, "fp16": 989.5, "tf32": 494.5, "fp32": 67.0}),
    (r"H200 NVL", 4800, {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0}),
    # NVIDIA L4 datasheet (2023): 242 / 2 = 121, 120 / 2 = 60.
    (r"L4", 300, {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    # NVIDIA L40S datasheet (2023): 733 / 2 ≈ 362 and 366 / 2 = 183, printed there in both forms.
    (r"L40S", 864, {"bf16": 362.0, "fp16": 362.0, "tf32": 183.0, "fp32": 91.6}),
    # NVIDIA GA102 whitepaper (2021), fp16 with fp32 accumulation: half of the 142 that fp16 accumulation reaches.
    (r"(GeForce )?RTX 3090", 936, {"bf16": 71.0, "fp16": 71.0, "tf32": 35.6, "fp32": 35.6}),
    # NVIDIA Ada whitepaper (2022), fp16 with fp32 accumulation.
    (r"(GeForce )?RTX 4090", 1008, {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the forward pass for one token: a multiply and an add for each element of a weight in a matmul."""

    block_matmuls: int  # c_attn and attn.c_proj 2 · (3 + 1) · E², c_fc and mlp.c_proj 2 · 2 · E · I
    mlp_projection: int  # mlp.c_proj alone, 2 · E · I: the last matmul of a block
    attention: int  # of one block: scores and weighted values, 2 · E · T each, without the causal mask's halving
    head: int  # 2 · V · E


def forward_flops(n_embd: int, n_inner: int | None, vocab_size: int, block_size: int) -> ForwardFlops:
    """Forward FLOPs per token in a sequence of `block_size` tokens; `n_inner=None` is GPT-2's default, 4 · E.

    Left out are embedding tables, which are gathered from, and biases, norms and activation functions.
    """
    inner = 4 * n_embd if n_inner is None else n_inner
    return ForwardFlops(
        block_matmuls=8 * n_embd**2 + 4 * n_embd * inner,
        mlp_projection=2 * n_embd * inner,
        attention=4 * n_embd * block_size,
        head=2 * n_embd * vocab_size,
    )


@dataclass(frozen=True)
class Flops:
    """Training FLOPs per token, forward and backward, by what they are spent on."""

    blocks: int
    head: int
    attention: int
    recomputed: int  # what activation checkpointing and fused attention kernels compute a second time

    @property
    def model(self) -> int:
        """What the model needs, the same for every kernel and every run: the FLOPs of MFU."""
        return self.blocks + self.head + self.attention

    @property
    def hardware(self) -> int:
        """What the run executes: the FLOPs of HFU."""
        return self.model + self.recomputed


def count_flops(
    n_layer: int,
    n_embd: int,
    n_inner: int | None,
    vocab_size: int,
    block_size: int,
    *,
    activation_checkpointing: str = "none",
    activation_checkpointing_interval: int = 1,
    fused_attention: bool = False,
) -> Flops:
    """Training FLOPs per token: 6·N + 12·L·E·T, as in PaLM's appendix B, and what is recomputed.

    N counts the parameters that take part in matmuls: the blocks and the tied head. The backward pass has two matmuls
    for each one of `forward_flops`, so training costs three times the forward pass. By the convention the causal
    mask's halving is *not* applied.

    GPT-2 124M at 1024: blocks 12 · (4 · 768² + 2 · 768 · 3072) = 84,934,656; head 768 · 50257 = 38,597,376;
    6 · 123,532,032 = 741,192,192; attention 12 · 12 · 768 · 1024 = 113,246,208; together 854,438,400.

    `recomputed` is, with `activation_checkpointing="full"`, a second forward pass of every block, but for the last
    matmul of each group of `activation_checkpointing_interval` blocks: recomputation ends with the last activation
    that the backward pass needs, which is the input of that matmul. "selective" recomputes no matmul. With
    `fused_attention` (sdpa, FlashAttention), which keeps no scores, the backward pass computes them once more.
    """
    forward = forward_flops(n_embd, n_inner, vocab_size, block_size)
    recomputed = n_layer * forward.attention // 2 if fused_attention else 0
    if activation_checkpointing == "full":
        groups = n_layer // activation_checkpointing_interval
        recomputed += n_layer * (forward.block_matmuls + forward.attention) - groups * forward.mlp_projection
    return Flops(
        blocks=3 * n_layer * forward.block_matmuls,
        head=3 * forward.head,
        attention=3 * n_layer * forward.attention,
        recomputed=recomputed,
    )


def _peaks(device_name: str) -> tuple[int | None, dict[str, float]]:
    """GB/s and TFLOP/s of a device; None and nothing for a CPU or an unknown device."""
    name = device_name.removeprefix("NVIDIA ").strip()
    return next(((moved, rates) for pattern, moved, rates in PEAKS if re.fullmatch(pattern, name)), (None, {}))


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak in FLOP/s of one device (`devices.device_name`) for "bf16", "fp16", "tf32" or "fp32", if known."""
    rate = _peaks(device_name)[1].get(dtype)
    return None if rate is None else rate * 1e12


def peak_bandwidth(device_name: str) -> float | None:
    """Bytes/s that one device's memory gives by its datasheet, if known."""
    rate = _peaks(device_name)[0]
    return None if rate is None else rate * 1e9


def utilization(
    tokens_per_second: float | None, flops_per_token: float, peak: float | None, devices: int
) -> float | None:
    """A fraction of 1: FLOP/s achieved over `devices` times the `peak` of one (PaLM, appendix B).

    MFU with `Flops.model`, HFU with `Flops.hardware`. `tokens_per_second` is that of all devices together. None where
    the throughput or the peak is unknown.
    """
    if tokens_per_second is None or peak is None:
        return None
    return tokens_per_second * flops_per_token / (peak * devices)
