"""Gradient clipping by the global norm, in every layout without DeepSpeed.

DeepSpeed clips within its own step, by `gradient_clipping` in its JSON, which `config/deepspeed_config.py` makes the
same as the flag.
"""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor


def clip(accelerator: Accelerator, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Clip the gradients in place, 0: not at all. Returns their norm before that, a scalar on the device."""
    norm = accelerator.clip_grad_norm_(parameters, max_norm or float("inf"))
    assert norm is not None
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2
