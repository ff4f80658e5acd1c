"""AdamW, or Muon for the matrices of the blocks and AdamW for the rest; which parameters have weight decay."""

import torch
from torch import nn

from train.optim.muon import Muon, MuonAndAdamW

# The state that an optimizer keeps for each parameter, under torch.optim's names.
ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


def is_hidden_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of a block: of attention or of the MLP, not an embedding or the head."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def moments_of(optimizer: str, name: str) -> tuple[str, ...]:
    """The moments that `optimizer` ("adamw" or "muon") keeps for the parameter `name`, each of its shape."""
    return MUON_MOMENTS if optimizer == "muon" and is_hidden_matrix(name) else ADAMW_MOMENTS


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: tensors of two or more dimensions decay, vectors do not (GPT-3, arXiv:2005.14165).

    Tied parameters are listed once, under their first name.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        # `ds_shape` is the full shape of a ZeRO-3 parameter, whose `shape` is that of an empty placeholder.
        {"params": [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    optimizer: str,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool,
) -> torch.optim.AdamW | MuonAndAdamW:
    """AdamW (arXiv:1711.05101) over `parameter_groups`; with "muon", Muon for the matrices of the blocks instead.

    `fused` selects PyTorch's fused AdamW.
    """
    groups = parameter_groups(model, weight_decay)
    hidden = [p for name, p in model.named_parameters() if p.requires_grad and is_hidden_matrix(name)]
    matrices = hidden if optimizer == "muon" else []
    for group in groups:
        group["params"] = [p for p in group["params"] if not any(p is matrix for matrix in matrices)]
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused or None)
    if not matrices:
        return adamw
    muon = Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonAndAdamW(muon, adamw)
