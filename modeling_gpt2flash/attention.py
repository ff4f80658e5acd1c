"""The choice of the attention kernel, and eager attention.

Shapes: B batch, H heads, T query positions, S key positions, K head dimension.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import import_utils
from transformers.utils.generic import TransformersKwargs


class FlashKernel(NamedTuple):
    """Requirements of a release of FlashAttention."""

    package: str  # on the package index
    min_capability: tuple[int, int]  # compute capability of the GPU
    max_capability: tuple[int, int]
    max_head_dim: int
    has_dropout: bool


# Newest first: the order in which "auto" tries them.
FLASH_KERNELS = {
    "flash_attention_4": FlashKernel("flash-attn-4", (9, 0), (99, 0), 128, has_dropout=False),
    "flash_attention_3": FlashKernel("flash-attn-3", (9, 0), (9, 0), 256, has_dropout=False),
    "flash_attention_2": FlashKernel("flash-attn", (8, 0), (99, 0), 256, has_dropout=True),
}
ATTENTION_NAMES = ("auto", *FLASH_KERNELS, "sdpa", "eager")
HALF_PRECISION = (torch.float16, torch.bfloat16)
# What transformers passes on to the model: for the kernels, continuous batching, and generate()'s own tokenizers.
KNOWN_ARGUMENTS = frozenset({
    *TransformersKwargs.__annotations__, "return_dict", "block_table", "read_index", "write_index", "logits_indices",
    "logits_processor_args", "tokenizer", "assistant_tokenizer",
})  # fmt: skip


def choose_attention(
    requested: str, device_type: str, dtype: torch.dtype, head_dim: int, *, dropout: float = 0.0
) -> tuple[str, str]:
    """The attention implementation to request from transformers, and the reason as a sentence for the log.

    Args:
        requested: one of `ATTENTION_NAMES`. "auto" selects the newest FlashAttention that would run, otherwise
            sdpa. Any other name is either used or an error; it never falls back to a slower kernel.
        device_type: of the device that the model will run on, e.g. "cuda".
        dtype: of the attention's inputs: the weights' dtype, or autocast's.
        head_dim: dimension of a head.
        dropout: attention dropout while training; FlashAttention 3 and 4 do not support it.

    Raises:
        ValueError: if `requested` is unknown or cannot run.
    """
    check_attention_name(requested)
    if requested in FLASH_KERNELS:
        obstacle = _obstacle(requested, device_type, dtype, head_dim, dropout)
        if obstacle is not None:
            raise ValueError(f"{requested} was requested, but {obstacle} Or request auto, sdpa or eager.")
        return requested, f"{requested}, as requested."
    if requested != "auto":
        return requested, f"{requested}, as requested."

    obstacles = []
    for name in FLASH_KERNELS:
        obstacle = _obstacle(name, device_type, dtype, head_dim, dropout)
        if obstacle is None:
            return name, f"{name}: the newest FlashAttention that is installed and supports the device and the model."
        obstacles.append(f"not {name} since {obstacle}")
    if device_type != "cuda" or dtype not in HALF_PRECISION:
        why = f"FlashAttention is for fp16 and bf16 on CUDA, not {_dtype_name(dtype)} on {device_type}."
    else:
        why = " ".join(obstacles)
    return "sdpa", f"sdpa, PyTorch's own kernels: {why}"


def check_attention_name(name: str) -> None:
    """Raise unless `name` is a kernel that is known here, or that this process has registered with transformers.

    A name may come from a configuration on the Hub, and transformers downloads and runs code for names that look
    like a repository.
    """
    # transformers replaces the flash names by these fallbacks if the `kernels` package is installed.
    fallbacks = getattr(flash_utils, "FLASH_ATTN_KERNEL_FALLBACK", {}).values()
    registered = {key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "/" not in key} - {"flex_attention"}
    if name.removeprefix("paged|") not in {*ATTENTION_NAMES, *fallbacks, *registered}:
        raise ValueError(
            f'Specified `attn_implementation="{name}"` is not supported. Choose one of {", ".join(ATTENTION_NAMES)}, '
            "or register it with transformers' AttentionInterface.register before the model is created."
        )


def check_attention_arguments(implementation: str, arguments: dict[str, Any]) -> None:
    """Raise a `TypeError` for an unknown argument; kernels that the reader's process has registered may take any."""
    if implementation.removeprefix("paged|") not in ATTENTION_NAMES:
        return
    unknown = [name for name in arguments if name not in KNOWN_ARGUMENTS]
    if unknown:
        raise TypeError(f"GPT2Flash's forward() got an unexpected keyword argument {unknown[0]!r}")


def check_flash_dtype(query: Tensor) -> None:
    """Raise if a flash kernel would be called with full precision outside of autocast."""
    if query.dtype not in HALF_PRECISION and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(
            f"FlashAttention computes in fp16 or bf16 and got {_dtype_name(query.dtype)}: load the model with "
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
    """Attention in plain PyTorch operations: returns the attention weights, and is the reference of all kernels.

    Args:
        module: the attention layer; dropout is applied if it is in training mode.
        query: (B, H, T, K).
        key: (B, H, S, K).
        value: (B, H, S, K).
        attention_mask: (B or 1, 1, T, S), added to the scores; it makes attention causal, too.
        scaling: factor of the scores.
        dropout: probability of dropping an attention weight.

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
    """Why a flash kernel cannot run and what to do about it, as a clause; None if it can."""
    kernel = FLASH_KERNELS[name]
    if device_type != "cuda":
        return f"it runs on CUDA devices and this is {device_type}: run on a GPU."
    if dtype not in HALF_PRECISION:
        return f"it computes in fp16 or bf16 and not in {_dtype_name(dtype)}: train with bf16 mixed precision."
    capability = _cuda_capability()
    lowest, highest = kernel.min_capability, kernel.max_capability
    if not lowest <= capability <= highest:
        later = " or later" if highest > lowest else " only"
        return (
            f"it needs a GPU of compute capability {lowest[0]}.{lowest[1]}{later}, and "
            f"this one has {capability[0]}.{capability[1]}: choose another kernel."
        )
    if head_dim > kernel.max_head_dim or head_dim % 8 != 0:
        return f"its heads are multiples of 8 up to {kernel.max_head_dim} wide, not {head_dim}: change n_head."
    if dropout > 0 and not kernel.has_dropout:
        return f"it has no attention dropout and attn_pdrop is {dropout}: set attn_pdrop to 0."
    if not _installed(name):
        return f"the package {kernel.package} is not installed: pip install {kernel.package}."
    return None


def expected_device_type() -> str:
    """Type of the device that a model without weights will probably run on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def _cuda_capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def _installed(name: str) -> bool:
    check = getattr(import_utils, f"is_flash_attn_{name[-1]}_available", None)
    return check is not None and bool(check())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
