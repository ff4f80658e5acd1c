"""Which attention kernel runs, and the one that needs none.

Shapes: B batch, H heads, T query positions, S key positions, K width of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.utils import import_utils


class FlashKernel(NamedTuple):
    """What a release of FlashAttention asks for."""

    package: str  # its name on the package index
    oldest: tuple[int, int]  # compute capability of the oldest GPU that it runs on
    newest: tuple[int, int]  # … and of the newest
    widest_head: int
    has_dropout: bool


# Newest first: the order in which "auto" asks for them.
FLASH_KERNELS = {
    "flash_attention_4": FlashKernel("flash-attn-4", (9, 0), (99, 0), 128, has_dropout=False),
    "flash_attention_3": FlashKernel("flash-attn-3", (9, 0), (9, 0), 256, has_dropout=False),
    "flash_attention_2": FlashKernel("flash-attn", (8, 0), (99, 0), 256, has_dropout=True),
}
ATTENTION_NAMES = ("auto", *FLASH_KERNELS, "sdpa", "eager")
HALF_PRECISION = (torch.float16, torch.bfloat16)


def choose_attention(
    requested: str, device_type: str, dtype: torch.dtype, head_dim: int, *, dropout: float = 0.0
) -> tuple[str, str]:
    """The attention implementation to ask transformers for, and why, in a sentence for the log.

    Args:
        requested: one of `ATTENTION_NAMES`. "auto" takes the newest FlashAttention that would run, else sdpa; any
            other name is an order, and an order that cannot be carried out is an error, never a slower kernel.
        device_type: where the model will run, e.g. "cuda".
        dtype: what attention will see: the weights' dtype, or autocast's.
        head_dim: width of a head.
        dropout: attention dropout while training; FlashAttention 3 and 4 have none.
    """
    check_attention_name(requested)
    if requested in FLASH_KERNELS:
        obstacle = _obstacle(requested, device_type, dtype, head_dim, dropout)
        if obstacle is not None:
            raise ValueError(f"{requested} was asked for, but {obstacle} Or ask for auto, sdpa or eager.")
        return requested, f"{requested}, as asked for."
    if requested != "auto":
        return requested, f"{requested}, as asked for."

    obstacles = []
    for name in FLASH_KERNELS:
        obstacle = _obstacle(name, device_type, dtype, head_dim, dropout)
        if obstacle is None:
            return name, f"{name}: the newest FlashAttention that is installed and fits the device and the model."
        obstacles.append(f"not {name} since {obstacle}")
    if device_type != "cuda" or dtype not in HALF_PRECISION:
        why = f"FlashAttention is for fp16 and bf16 on CUDA, not {_what(dtype)} on {device_type}."
    else:
        why = " ".join(obstacles)
    return "sdpa", f"sdpa, PyTorch's own kernels: {why}"


def check_attention_name(name: str) -> None:
    """Raise unless transformers, given this name, stays with kernels that are known here.

    A name may come from a configuration on the Hub, and transformers downloads and runs code for names that look
    like a repository. So a name is looked up, never followed.
    """
    # The fallbacks are what transformers itself makes of the flash names where the `kernels` package is installed.
    fallbacks = getattr(flash_utils, "FLASH_ATTN_KERNEL_FALLBACK", {}).values()
    if name.removeprefix("paged|") not in (*ATTENTION_NAMES, *fallbacks):
        raise ValueError(f"Unknown attention implementation {name!r}; choose one of {', '.join(ATTENTION_NAMES)}.")


def check_flash_dtype(query: Tensor) -> None:
    """Raise if a flash kernel is about to get full precision and nothing says what to round it to."""
    if query.dtype not in HALF_PRECISION and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(
            f"FlashAttention computes in fp16 or bf16 and got {_what(query.dtype)}: load the model with "
            "dtype=torch.bfloat16, run it under torch.autocast, or choose attn_implementation='sdpa'."
        )


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for the weights themselves and as the reference of all others.

    Args:
        module: the attention layer; its training flag decides about dropout.
        query: (B, H, T, K).
        key: (B, H, S, K).
        value: (B, H, S, K).
        attention_mask: (B or 1, 1, T, S), added to the scores; it carries causality too.
        scaling: factor of the scores.
        dropout: share of the weights that is dropped.

    Returns:
        The output, (B, T, H, K), and the weights, (B, H, T, S).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def _obstacle(name: str, device_type: str, dtype: torch.dtype, head_dim: int, dropout: float) -> str | None:
    """What keeps a flash kernel from running and how to remove it, as a clause; None if nothing does."""
    kernel = FLASH_KERNELS[name]
    if device_type != "cuda":
        return f"it runs on CUDA devices and this is {device_type}: run on a GPU."
    if dtype not in HALF_PRECISION:
        return f"it computes in fp16 or bf16 and not in {_what(dtype)}: train with bf16 mixed precision."
    capability = _cuda_capability()
    if not kernel.oldest <= capability <= kernel.newest:
        newer = "" if kernel.newest > kernel.oldest else " only"
        return (
            f"it needs a GPU of compute capability {kernel.oldest[0]}.{kernel.oldest[1]}{newer or ' or later'}, and "
            f"this one has {capability[0]}.{capability[1]}: choose another kernel."
        )
    if head_dim > kernel.widest_head or head_dim % 8 != 0:
        return f"its heads are multiples of 8 up to {kernel.widest_head} wide, not {head_dim}: change n_head."
    if dropout > 0 and not kernel.has_dropout:
        return f"it has no attention dropout and attn_pdrop is {dropout}: set attn_pdrop to 0."
    if not _installed(name):
        return f"the package {kernel.package} is not installed: pip install {kernel.package}."
    return None


def expected_device_type() -> str:
    """Where a model that has no weights yet will probably run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cuda_capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def _installed(name: str) -> bool:
    check = getattr(import_utils, f"is_flash_attn_{name[-1]}_available", None)
    return check is not None and bool(check())


def _what(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = [
    "ATTENTION_NAMES",
    "check_attention_name",
    "check_flash_dtype",
    "choose_attention",
    "eager_attention_forward",
    "expected_device_type",
]
