"""Gradient clipping by the global norm, `--max_grad_norm`.

A single process, DDP and FSDP2 clip here. DeepSpeed, with ZeRO or in a pipeline, clips within its own step, at the
`gradient_clipping` of its JSON, which is the flag (`config/deepspeed_config.py`); here it only reports the norm.
"""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor


def clip_gradients(
    accelerator: Accelerator, parameters: Iterable[torch.Tensor], max_norm: float | None
) -> torch.Tensor:
    """Clip the gradients of one update, or with `max_norm` 0 or None only compute their norm, which is returned."""
    return accelerator.clip_grad_norm_(parameters, max_norm or float("inf"))


def as_number(norm: torch.Tensor | float | None) -> float | None:
    """The norm of all shards before clipping; None where DeepSpeed does not report it. All processes call this."""
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return None if norm is None else float(norm)
