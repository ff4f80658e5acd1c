"""The products with a matrix in GPT-2's blocks, under the names and in the layout that its checkpoints have."""

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D


def is_quantized(weight: Tensor) -> bool:
    """Whether it has to be unpacked before it is multiplied with: its class, torchao's for one, says how itself."""
    return type(weight).dequantize is not Tensor.dequantize


class Projection(Conv1D):
    """transformers' Conv1D, x @ weight + bias, with a weight (I, O) that may be quantized.

    torchao's tensors know the product of `nn.Linear`, whose weight is (O, I), and no other. So here one is unpacked,
    for the time of its product: the weight at rest is what quantizing makes small.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        weight = self.weight.dequantize() if is_quantized(self.weight) else self.weight
        return torch.addmm(self.bias, x.view(-1, self.nx), weight).view(*x.shape[:-1], self.nf)


class ResidualProjection(Projection):
    """The end of a residual branch, under a name that `_init_weights` can tell from other projections.

    Asking for the attention or MLP around it would not do: in code outside its own package transformers initialises
    no module that has no parameters of its own.
    """


__all__ = ["Projection", "ResidualProjection", "is_quantized"]
