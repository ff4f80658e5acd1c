"""FlashAttention's packages with dense attention where the kernels would be, for machines without a GPU.

    python -m tests.flash_stubs flash_attention_2 <flags of train>

trains with that kernel to be had, and says at the end how often it ran with the bounds of documents and without.
"""

import functools
import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils as flash_utils

from modeling_gpt2flash import GPT2FlashForCausalLM, attention
from tests.tiny_gpt2 import make_ours

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


class Call(NamedTuple):
    """One call of a kernel: its name, and of the one for many lengths the bounds and the longest."""

    name: str
    bounds: list[int] | None = None
    longest: int | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    """(B, T, H, K) in and out, causality aligned to the last key."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, scale: float | None, causal: bool
) -> Tensor:
    """Sequences laid end to end, (tokens, H, K)."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    ends_q, ends_k = bounds_q.tolist(), bounds_k.tolist()
    parts = [
        attend(q[None, a:b], k[None, c:d], v[None, c:d], scale, causal)[0]
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    ]
    return torch.cat(parts)


# The signatures, as far as transformers reads them.


def two(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
    return attend(q, k, v, softmax_scale, causal)


def two_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), deterministic=False,
):  # fmt: skip
    return attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def three(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    return attend(q, k, v, softmax_scale, causal)


def three_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
    deterministic=False,
):  # fmt: skip
    return attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def four(q, k, v, softmax_scale=None, causal=False, deterministic=False):
    return attend(q, k, v, softmax_scale, causal), None


def four_varlen(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
    causal=False, deterministic=False,
):  # fmt: skip
    return attend_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), None


def install(
    patch: pytest.MonkeyPatch, two: Callable = two, two_varlen: Callable = two_varlen, recording: bool = True
) -> list[Call]:
    """Put the three packages in place; the list fills with the calls of their kernels, if `recording`."""
    calls: list[Call] = []

    def recorded(function: Callable) -> Callable:
        @functools.wraps(function)  # transformers reads the signature
        def call(*args: Any, **kwargs: Any) -> Any:
            bounds = kwargs.get("cu_seqlens_q")
            longest = kwargs.get("max_seqlen_q")
            calls.append(Call(function.__name__, None if bounds is None else bounds.tolist(), longest))
            return function(*args, **kwargs)

        return call if recording else function

    for package, plain, varlen in (
        ("flash_attn", two, two_varlen),
        ("flash_attn_interface", three, three_varlen),
        ("flash_attn.cute", four, four_varlen),
    ):
        module = types.ModuleType(package)
        module.flash_attn_func, module.flash_attn_varlen_func = recorded(plain), recorded(varlen)
        module.flash_attn_with_kvcache = None
        patch.setitem(sys.modules, package, module)
    padding = types.ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = flash_utils._pad_input, flash_utils._unpad_input
    patch.setitem(sys.modules, padding.__name__, padding)
    patch.setattr(flash_utils, "is_flash_attn_2_available", lambda **_: True)
    patch.setattr(flash_utils, "_loaded_implementation", None)
    return calls


def make_flash(implementation: str, **fields: Any) -> GPT2FlashForCausalLM:
    """`make_ours` on the code path of a flash kernel; `install` comes first."""
    ours = make_ours(**fields)
    ours.config._attn_implementation = implementation
    return ours


def main(implementation: str, *flags: str) -> None:
    from train.config.run_config import parse
    from train.run.loop import train
    from train.run.setup import resolve

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        calls = install(patch)
        obstacle = attention._obstacle

        def nothing_but_the_device(name: str, device_type: str, dtype: torch.dtype, *how: Any) -> str | None:
            to_be_had = name == implementation and dtype in attention.HALF_PRECISION
            return None if to_be_had else obstacle(name, device_type, dtype, *how)

        patch.setattr(attention, "_obstacle", nothing_but_the_device)
        patch.setattr(GPT2FlashForCausalLM, "_flash_attn_can_dispatch", lambda *_, **__: True)
        for version in flash_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX.values():
            patch.setitem(version, "general_availability_check", lambda **_: True)
        train(resolve(parse(list(flags))))
    kinds = Counter("bounds of documents" if call.bounds else "no bounds" for call in calls)
    print("".join(f"\n{implementation}: {count} calls with {kind}" for kind, count in kinds.items()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
