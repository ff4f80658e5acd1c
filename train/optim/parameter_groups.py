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


def build_optimizer(
    model: nn.Module,
    optimizer: str,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    fused: bool,
) -> torch.optim.AdamW | MuonAndAdamW:
    """AdamW (arXiv:1711.05101); with "muon", Muon for the matrices of the blocks instead.

    Tensors of two or more dimensions decay, vectors do not (GPT-3, arXiv:2005.14165). Tied parameters are listed once.
    `fused` selects PyTorch's fused AdamW.
    """
    matrices, decaying, vectors = [], [], []
    for name, parameter in model.named_parameters():
        # `ds_shape` is the full shape of a ZeRO-3 parameter, whose `shape` is that of an empty placeholder.
        if len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
            vectors.append(parameter)
        elif optimizer == "muon" and is_hidden_matrix(name):
            matrices.append(parameter)
        else:
            decaying.append(parameter)
    groups = [(decaying, weight_decay), (vectors, 0.0)]
    adamw = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters],
        lr=learning_rate,
        betas=betas,
        eps=1e-8,
        fused=fused or None,
    )
    if not matrices:
        return adamw
    muon = Muon(matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonAndAdamW(muon, adamw)
