"""What is done to a model before it is wrapped: one GELU kernel, activation checkpointing, torch.compile.

And to the process that trains it on a CPU: the allocator keeps freed memory.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from modeling_gpt2flash import GPT2FlashForCausalLM
from train.utils.devices import SDPA_OPERATORS
from train.utils.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h

# Operators of torch whose outputs are attention's: a small part of a block's activations, and at long sequences most
# of its time. FlashAttention 3 and 4 are missing: what they are to torch differs from release to release.
FLASH_ATTENTION_OPERATORS = ("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward")
ATTENTION_OPERATORS = frozenset(SDPA_OPERATORS + FLASH_ATTENTION_OPERATORS)
SAVED_OPERATORS = ATTENTION_OPERATORS | {"aten::mm", "aten::addmm"}  # attention, and the matmuls of linear layers
SELECTIVE_ATTENTION = ("sdpa", "flash_attention_2")
"""The implementations of attention whose output selective activation checkpointing can save."""


def fuse_gelu(model: nn.Module) -> None:
    """Replace "gelu_new" (arXiv:1606.08415, section 2), eight operators of torch, by torch's own kernel.

    It computes the same up to rounding, several times as fast, and saves one tensor for the backward pass, not four.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            model.set_submodule(name, nn.GELU(approximate="tanh"))


# Activation checkpointing


def checkpoint_arguments(mode: str) -> dict[str, Any]:
    """The keyword arguments of `torch.utils.checkpoint.checkpoint` in the mode "full" or "selective"."""
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return arguments


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # "Prefer" leaves the decision to a compiler, which saves what the backward pass needs of these.
    return CheckpointPolicy.PREFER_SAVE if operator.name() in SAVED_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_blocks(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Recompute each block in the backward pass, through `checkpoint` with these keyword arguments."""
    # transformers 5.23 has a new name, and warns of the one that 5.17 has.
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")(arguments)


# torch.compile


def compile_blocks(model: GPT2FlashForCausalLM, checkpointing: dict[str, Any] | None = None, **options: Any) -> None:
    """Compile each block by itself; `options` are those of `torch.compile`. All blocks share one compilation.

    With `checkpointing`, the keyword arguments of `checkpoint`, recomputation is part of the compiled graph: the
    compiler fuses what is recomputed with what needs it, and saves no more than the backward pass needs.
    """
    # It would split the graph of a large block where one of DDP's gradient buckets is full. Without it a bucket is
    # sent after the block that fills it.
    torch._dynamo.config.optimize_ddp = False
    for block in model.transformer.h:
        # Not `block.compile`, whose graph would contain the hooks with which ZeRO-3 and FSDP2 gather parameters.
        forward = block.forward if checkpointing is None else _checkpointed(block.forward, checkpointing)
        block.forward = torch.compile(forward, **options)


def _checkpointed(forward: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
    def checkpointed(*inputs: Any, **more: Any) -> Any:
        # Arguments of `checkpoint` would be inputs of the graph, used or not: the number of documents in a batch
        # would be part of it, and each other number a new compilation.
        return checkpoint(partial(forward, **more), *inputs, **arguments)

    return checkpointed


def check_cpp_compiler(flag: str) -> None:
    """Raise a `UserError` that names `flag` if torch.compile would find no C++ compiler, which it needs on a CPU.

    The rule is `torch._inductor.config.cpp.cxx`, without the seconds that importing Inductor takes.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{flag}: needs a C++ compiler on the CPU, and {compiler} was not found; install it, name another in the "
            "environment variable CXX, or drop the flag"
        )


# The process


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next tensors instead of returning it to the system.

    Each step allocates the same tensors as the one before. glibc returns the large ones, and what is free at the top
    of its heap, at once, so the next step gets new pages, each of which the system clears and maps at its first use:
    for 124M parameters in bf16, 1 x 1024 tokens, 230,000 pages of 4 KB a step. The price is the memory that is free
    between tensors, 0.05 to 0.12 GiB for `tiny` (benchmarks/README.md). Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
