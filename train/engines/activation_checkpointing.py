"""What the backward pass computes again instead of keeping it, and what it is spared."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

# Operations of torch whose outputs are attention's: a small part of a block's activations, and at long sequences most
# of its time. sdpa's kernels on CPUs and on GPUs, and FlashAttention 2's. Versions 3 and 4 are not among them: what
# they are to torch differs from release to release.
ATTENTION_OPERATIONS = frozenset({
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
})  # fmt: skip
PRODUCTS = frozenset({"aten::mm", "aten::addmm"})  # the linear layers'
KEPT = {"attention": ATTENTION_OPERATIONS, "products": ATTENTION_OPERATIONS | PRODUCTS}
KERNELS_THAT_CAN_BE_KEPT = ("sdpa", "flash_attention_2")


def checkpoint_arguments(keeps: str) -> dict[str, Any]:
    """How to call `torch.utils.checkpoint.checkpoint`; `keeps` is "nothing" or one of `KEPT`."""
    how: dict[str, Any] = {"use_reentrant": False}
    if keeps in KEPT:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keep, KEPT[keeps]))
    return how


def _keep(kept: frozenset[str], context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Where a compiler decides, what is kept is what is needed of these.
    return CheckpointPolicy.PREFER_SAVE if operation.name() in kept else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_blocks(model: PreTrainedModel, how: dict[str, Any]) -> None:
    """Recompute each block of a model in its backward pass, by `checkpoint` with the arguments `how`."""
    # transformers 5.23 calls it otherwise, and warns of the name that 5.17 has.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(how)
