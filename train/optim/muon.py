"""Muon for the blocks' matrices and AdamW for all the rest, as the one optimizer that Accelerate and the engines see.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) is momentum of which every step is made nearly
orthogonal, so that it moves all directions of a matrix alike, by five Newton-Schulz iterations in bf16. An orthogonal
step of m x n has a root mean square of 1/√max(m, n); times 0.2 · √max(m, n) (Moonlight, arXiv:2502.16982, section 2.2)
it is 0.2, about AdamW's, so that one learning rate and one weight decay serve both. Neither knows a matrix from its
transpose, and GPT-2's layout (in, out) needs nothing done.

c_attn, in which queries, keys and values stand side by side, is made orthogonal as a whole, as PyTorch sees it. In
thirds, as others have it, four layers of width 64 learned the same in 200 steps (validation 2.289 nats whole against
2.293 in thirds, 2.200 against 2.195, 2.108 against 2.113 at rates of 4e-3, 8e-3, 1.6e-2).
"""

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate


class Muon(torch.optim.Muon):
    """PyTorch's Muon, and where FSDP2 keeps shards, whole matrix by whole matrix, bit for bit the same.

    PyTorch 2.13's own step on shards adds up parts in bf16: three of them on two processes end 0.007 to 0.016 of their
    length away. The momentum of shards must be there before the first step (`engines.state.create_moments`).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
        if not any(isinstance(gradient, DTensor) for gradient in gradients.values()):
            super().step()
            return
        for parameter in gradients:
            parameter.grad = None  # a step passes over what has no gradient
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
    """Two optimizers with one list of groups, Muon's first, and one state."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], defaults={})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Where `load_state_dict` ends, with new groups and a new state; Accelerate calls it on taking one in."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        matrices = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:matrices], self.param_groups[matrices:]
        self.muon.state = self.adamw.state = self.state

    @property
    def matrices(self) -> list[torch.Tensor]:
        """What is Muon's."""
        return [p for group in self.muon.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        assert closure is None
        self.muon.step()
        self.adamw.step()
