"""FLOPs and bytes of an operator, from the shapes that its trace event recorded.

A product of (m, k) and (k, n) is 2·m·k·n FLOPs. Attention is counted as its products, two forward and (the scores are
computed again) five backward, without the causal mask's halving, as in `train.metrics.flops`. Bytes are each input
read once and each output written once: what the operator cannot do without, not what caches and kernels made of it.
"""

import math
from typing import Any

ITEM_BYTES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4, "bool": 1,
    "unsigned char": 1, "signed char": 1, "short": 2,
}  # fmt: skip

# Where the two factors of a product stand among an operator's inputs.
PRODUCTS = {
    "aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1,
    "aten::_addmm_activation": 1,
}  # fmt: skip

# Where queries, keys and values stand, how many products are made of them, and which dimension is the sequence.
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": (0, 2, 2),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (1, 5, 2),
    "aten::_scaled_dot_product_flash_attention": (0, 2, 2),
    "aten::_scaled_dot_product_flash_attention_backward": (1, 5, 2),
    "aten::_scaled_dot_product_efficient_attention": (0, 2, 2),
    "aten::_scaled_dot_product_efficient_attention_backward": (1, 5, 2),
    "aten::_scaled_dot_product_cudnn_attention": (0, 2, 2),
    "aten::_scaled_dot_product_cudnn_attention_backward": (1, 5, 2),
    "flash_attn::_flash_attn_forward": (0, 2, 1),
    "flash_attn::_flash_attn_backward": (1, 5, 1),
}

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


def flops(name: str, args: dict[str, Any]) -> int | None:
    """FLOPs of an operator; None where its name or its shapes do not tell."""
    dims = args.get("Input Dims") or []
    if name in PRODUCTS:
        left, right = dims[PRODUCTS[name] : PRODUCTS[name] + 2] or ([], [])
        if len(left) < 2 or len(left) != len(right):
            return None
        return 2 * math.prod(left) * right[-1]
    if name in ATTENTION:
        first, products, sequence = ATTENTION[name]
        if len(dims) < first + 2 or any(len(shape) != 4 for shape in dims[first : first + 2]):
            return None
        return 2 * products * math.prod(dims[first]) * dims[first + 1][sequence]
    return None


def moved_bytes(name: str, args: dict[str, Any]) -> int | None:
    """Bytes that an operator reads and writes at least; None where its name or its shapes do not tell."""
    dims, types = args.get("Input Dims") or [], args.get("Input type") or []
    strides = args.get("Input Strides") or [[1] * len(shape) for shape in dims]
    sizes = [
        # A dimension of stride 0 was expanded: the same numbers again.
        math.prod(length for length, step in zip(shape, steps, strict=True) if step) * ITEM_BYTES[kind]
        for shape, steps, kind in zip(dims, strides, types, strict=False)
        if kind in ITEM_BYTES and len(steps) == len(shape) and all(isinstance(length, int) for length in shape)
    ]
    if not sizes:
        return None
    if name in PRODUCTS:
        first = PRODUCTS[name]
        left, right = dims[first : first + 2]
        if len(left) < 2 or len(left) != len(right) or types[first] not in ITEM_BYTES:
            return None
        item = ITEM_BYTES[types[first]]
        read = math.prod(left) + math.prod(right) + (math.prod(dims[0]) if first else 0)
        return item * (read + math.prod(left[:-1]) * right[-1])
    if name in ATTENTION:  # what the forward pass gives is as large as the queries; backward, as all that is read
        first, products, _ = ATTENTION[name]
        return sum(sizes) + (sizes[first] if products == 2 else sum(sizes[first : first + 3]))
    if name in ELEMENTWISE:
        return sum(sizes) + max(sizes)
    if name in IN_PLACE:
        return sum(sizes) + (sizes[0] if name != "aten::copy_" else 0)  # a copy's target is not read
    if name in REDUCTIONS:
        return sum(sizes)
    return None
