"""Muon for the matrices of the blocks and AdamW for the rest, as one optimizer for Accelerate and the engines.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) is momentum whose update is made nearly orthogonal by
five Newton-Schulz iterations in bf16, so that it moves all directions of a matrix equally. An orthogonal update of
m x n has a root mean square of 1/√max(m, n); times 0.2 · √max(m, n) (Moonlight, arXiv:2502.16982, section 2.2) it is
0.2, about AdamW's, so that one learning rate and one weight decay serve both. The update of a transposed
matrix is the transposed update, so GPT-2's layout (in, out) needs no conversion.

c_attn, which holds queries, keys and values side by side, is orthogonalized as one matrix. Orthogonalized as three
matrices, as elsewhere, four layers of width 64 learned the same in 200 steps (validation 2.289 nats as one against
2.293 as three, 2.200 against 2.195, 2.108 against 2.113 at rates of 4e-3, 8e-3, 1.6e-2).
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate


class Muon(torch.optim.Muon):
    """PyTorch's Muon; on FSDP2's shards it gathers one full matrix after the other, with bit-identical results.

    PyTorch 2.13's own step on shards sums partial products in bf16: three steps on two processes deviate by 0.007 to
    0.016 of their norm. The momentum of shards must exist before the first step (`engines.state.create_moments`).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        if not any(isinstance(gradient, DTensor) for gradient in gradients.values()):
            super().step()
            return
        for parameter in gradients:
            parameter.grad = None  # `step` skips parameters without a gradient
        for parameter, gradient in gradients.items():
            momentum = self.state[parameter]["momentum_buffer"]
            self.state[parameter]["momentum_buffer"] = _gathered(momentum)
            parameter.grad = _gathered(gradient)
            super().step()
            parameter.grad = None
            gathered = self.state[parameter]["momentum_buffer"]
            self.state[parameter]["momentum_buffer"] = gathered.redistribute(placements=momentum.placements)


def _gathered(tensor: DTensor) -> DTensor:
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that share one list of parameter groups, Muon's first, and one state."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called at the end of `load_state_dict`, with new groups and state, and when Accelerate prepares one."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        matrices = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:matrices], self.param_groups[matrices:]
        self.muon.state = self.adamw.state = self.state

    @property
    def matrices(self) -> list[torch.Tensor]:
        """The parameters that Muon updates."""
        return [p for group in self.muon.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        assert closure is None
        self.muon.step()
        self.adamw.step()
