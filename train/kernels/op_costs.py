"""FLOPs and bytes of an operator, from the shapes that its trace event recorded.

FLOPs are those of torch's own formulas (`torch.utils.flop_counter`): 2·m·k·n of a matmul of (m, k) and (k, n);
attention as its matmuls, two in the forward pass and (the scores are computed again) five in the backward pass,
without the causal mask's halving, as in `train.metrics.flops`. Bytes are each input read once and each output written
once: what the operator needs at least, whatever its kernels and the caches make of it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from train.utils.devices import SDPA_OPERATORS

aten = torch.ops.aten

LONGEST = 2**48
ITEM_BYTES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4, "bool": 1,
    "unsigned char": 1, "signed char": 1, "short": 2,
}  # fmt: skip


class Formula(NamedTuple):
    """FLOPs of an operator from the shapes of its first `inputs` inputs."""

    flops: Callable[..., int]
    inputs: int


def _batch_first(count: Callable[..., int]) -> Callable[..., int]:
    """flash-attn has (batch, tokens, heads, width) where torch has (batch, heads, tokens, width)."""
    return lambda *shapes: count(*([batch, heads, tokens, width] for batch, tokens, heads, width in shapes))


# The last two inputs are the factors. The in-place and fused variants are not in torch's registry.
MATMULS = {
    "aten::mm": Formula(flop_registry[aten.mm], 2),
    "aten::bmm": Formula(flop_registry[aten.bmm], 2),
    **dict.fromkeys(("aten::addmm", "aten::addmm_", "aten::_addmm_activation"), Formula(flop_registry[aten.addmm], 3)),
    **dict.fromkeys(("aten::baddbmm", "aten::baddbmm_"), Formula(flop_registry[aten.baddbmm], 3)),
}
# The last three inputs are queries, keys and values.
ATTENTION = {
    "flash_attn::_flash_attn_forward": Formula(_batch_first(sdpa_flop_count), 3),
    "flash_attn::_flash_attn_backward": Formula(_batch_first(sdpa_backward_flop_count), 4),
}
for _operator in SDPA_OPERATORS:
    ATTENTION[_operator] = Formula(sdpa_flop_count, 3)
    ATTENTION[f"{_operator}_backward"] = Formula(sdpa_backward_flop_count, 4)
FORMULAS = MATMULS | ATTENTION

# One pass over the inputs, one output as large as the largest of them.
ELEMENTWISE = {
    "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::pow", "aten::tanh", "aten::tanh_backward", "aten::exp",
    "aten::gelu", "aten::gelu_backward", "aten::_softmax", "aten::_softmax_backward_data", "aten::_log_softmax",
    "aten::_log_softmax_backward_data", "aten::native_layer_norm", "aten::native_layer_norm_backward",
    "aten::native_dropout", "aten::native_dropout_backward", "aten::where", "aten::masked_fill",
}  # fmt: skip
IN_PLACE = {
    "aten::add_", "aten::sub_", "aten::mul_", "aten::div_", "aten::exp_", "aten::copy_", "aten::lerp_",
    "aten::addcmul_", "aten::addcdiv_", "aten::sqrt_", "aten::masked_fill_",
}  # fmt: skip
REDUCTIONS = {"aten::sum", "aten::amax", "aten::linalg_vector_norm"}


def _shapes(args: dict[str, Any]) -> list[Any]:
    """The shapes of the inputs; none where a length is more than any tensor has, whose products would overflow."""
    dims = args.get("Input Dims") or []
    lengths = (length for shape in dims if isinstance(shape, list) for length in shape if isinstance(length, int))
    return dims if all(0 <= length < LONGEST for length in lengths) else []


def flops(name: str, args: dict[str, Any]) -> int | None:
    """Return the FLOPs of an operator, or None where its name or its shapes do not determine them."""
    dims = _shapes(args)
    formula = FORMULAS.get(name)
    if formula is None or len(dims) < formula.inputs:
        return None
    try:
        return formula.flops(*dims[: formula.inputs])
    except (AssertionError, TypeError, ValueError):  # shapes of another layout, as of nested tensors
        return None


def moved_bytes(name: str, args: dict[str, Any]) -> int | None:
    """Return the bytes that an operator reads and writes at least, or None where its name or shapes do not tell."""
    dims, types = _shapes(args), args.get("Input type") or []
    strides = args.get("Input Strides") or [[1] * len(shape) for shape in dims]
    sizes = [
        # A dimension of stride 0 is expanded: the same elements again.
        math.prod(length for length, stride in zip(shape, steps, strict=True) if stride) * ITEM_BYTES[kind]
        for shape, steps, kind in zip(dims, strides, types, strict=False)
        if kind in ITEM_BYTES and len(steps) == len(shape) and all(isinstance(length, int) for length in shape)
    ]
    if not sizes:
        return None
    if name in MATMULS:
        first = MATMULS[name].inputs - 2
        left, right = dims[first : first + 2]
        if len(left) < 2 or len(left) != len(right) or types[first] not in ITEM_BYTES:
            return None
        read = math.prod(left) + math.prod(right) + (math.prod(dims[0]) if first else 0)
        return ITEM_BYTES[types[first]] * (read + math.prod(left[:-1]) * right[-1])
    if name in ATTENTION:  # forward writes as much as the queries have; backward, as queries, keys and values have
        first = ATTENTION[name].inputs - 3
        return sum(sizes) + (sum(sizes[first : first + 3]) if first else sizes[0])
    if name in ELEMENTWISE:
        return sum(sizes) + max(sizes)
    if name in IN_PLACE:
        return sum(sizes) + (sizes[0] if name != "aten::copy_" else 0)  # a copy's target is not read
    if name in REDUCTIONS:
        return sum(sizes)
    return None
