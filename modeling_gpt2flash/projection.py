"""The linear layers of GPT-2's blocks, with the names and the weight layout of its checkpoints."""

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D


def is_quantized(weight: Tensor) -> bool:
    """Whether `weight` must be dequantized before a matmul, as its class (one of torchao's, for instance) defines."""
    return type(weight).dequantize is not Tensor.dequantize


class Projection(Conv1D):
    """transformers' Conv1D, x @ weight + bias, with a weight (I, O) that may be quantized.

    torchao's tensors support only the matmul of `nn.Linear`, whose weight is (O, I). Here the weight is dequantized
    for the duration of its matmul; what quantization saves is the memory of the weight at rest.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        weight = self.weight.dequantize() if is_quantized(self.weight) else self.weight
        return torch.addmm(self.bias, x.view(-1, self.nx), weight).view(*x.shape[:-1], self.nf)


class ResidualProjection(Projection):
    """The last layer of a residual branch, which `_init_weights` initializes differently.

    `_init_weights` could not recognize it by the attention or MLP around it: for code outside of its own package,
    transformers does not initialize modules that have no parameters of their own.
    """
