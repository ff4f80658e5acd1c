"""Gradient clipping by the global norm, in every layout without a pipeline.

DeepSpeed clips within its own step, by `gradient_clipping` in its JSON, which `config/deepspeed_config.py` makes the
same as the flag. A pipeline is always DeepSpeed's.
"""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor


def clip(accelerator: Accelerator, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor | None:
    """Clip the gradients in place, 0: not at all. Returns their global norm before that, which waits for no device.

    With DeepSpeed, called after its step, this only reports the norm, or None where DeepSpeed has none.
    """
    norm = accelerator.clip_grad_norm_(parameters, max_norm or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2
