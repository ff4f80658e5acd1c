"""AdamW over GPT-2's parameters: decay on matrices and embeddings, none on biases and norms."""

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: tensors of two or more dimensions decay, vectors do not (GPT-3, arXiv:2005.14165).

    Tied parameters are listed once, under their first name.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        # `ds_shape` is a ZeRO-3 parameter's whole shape; its own is that of an empty placeholder.
        {"params": [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], fused: bool
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over `parameter_groups`; `fused` takes PyTorch's one-kernel step."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused or None)
