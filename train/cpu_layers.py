"""A copy of a GPT-2 for writing text on a CPU: the same weights, in layouts that CPUs multiply quickly.

At a handful of rows a matrix product is bound by the reading of its weights, and how they lie in memory decides how
well cores read them. The weights of a checkpoint stay as they are; here each Conv1D and the head give way, in a copy
of the model, to a module that holds the same numbers in oneDNN's blocks, or in int8.

Shapes: B batch, T positions, I numbers in, O numbers out.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from train.errors import UserError

PACKED_ROWS = 8  # oneDNN blocks weights for a number of rows; what it takes for 8 was good for 1 to 32 as well


class PackedLinear(nn.Module):
    """`nn.Linear` on weights that oneDNN has laid out for itself: fp32, on CPUs, without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` (O, I), `bias` (O,)."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, I) -> (B, T, O)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class TransposedLinear(nn.Module):
    """`nn.Linear` on weights that lie as Conv1D's do, one input after the other."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` (O, I), `bias` (O,)."""
        super().__init__()
        self.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, I) -> (B, T, O)."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


def laid_out(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """A copy of an fp32 model on a CPU that computes the same, sooner, for `rows` sequences; it cannot be saved.

    One row on one thread is read quickest one input after the other, which is how Conv1D's weights lie already and
    the head's do not. More rows, or more threads (MKL gives a single row to one), are oneDNN's.
    """
    if rows == 1 and torch.get_num_threads() == 1:
        return _copy_with(model, {nn.Linear: TransposedLinear})
    return _copy_with(model, {Conv1D: PackedLinear, nn.Linear: PackedLinear})


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that multiplies in int8: weights rounded now, a scale for each output, activations at each call.

    The activations of a call share one scale, so what a sequence gets depends a little on the others in its batch.

    Raises:
        UserError: when this machine's torch has no int8 kernels.
    """
    if not {"x86", "fbgemm", "qnnpack", "onednn"} & set(torch.backends.quantized.supported_engines):
        raise UserError("--quantize int8: this build of torch has no int8 kernels for this CPU; leave it out")
    with warnings.catch_warnings():
        # Deprecated in favour of torchao, whose int8 is quick on a CPU only when compiled, for minutes.
        warnings.filterwarnings("ignore", message=r"torch\..* deprecated")
        return _copy_with(model, {Conv1D: _int8, nn.Linear: _int8})


def _int8(weight: Tensor, bias: Tensor | None) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    how = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), how, inplace=True)[0]


def _copy_with(
    model: PreTrainedModel, makers: dict[type[nn.Module], Callable[[Tensor, Tensor | None], nn.Module]]
) -> PreTrainedModel:
    """A copy with `make(weight (O, I), bias (O,))` in place of each module of these kinds; other tensors are shared.

    GPT-2's activation, eight steps of torch, becomes the one that does the same in one.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D) and Conv1D in makers:
            twin.set_submodule(name, makers[Conv1D](module.weight.detach().t().contiguous(), module.bias.detach()))
        elif isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.detach()
            twin.set_submodule(name, makers[nn.Linear](module.weight.detach(), bias))
        elif isinstance(module, NewGELUActivation):
            twin.set_submodule(name, nn.GELU(approximate="tanh"))
    return twin
