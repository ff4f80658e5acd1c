"""A copy of a GPT-2 for writing text on a CPU: the same weights, in layouts that CPUs multiply quickly.

At a handful of rows a matrix product is bound by the reading of its weights, and how they lie in memory decides how
well cores read them. The weights of a checkpoint stay as they are; here each Conv1D and the head give way, in a copy
of the model, to a module that holds the same numbers in oneDNN's blocks, or in int8.

Shapes: B batch, T positions, I numbers in, O numbers out.
"""

import copy
import mmap
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train.engines.transforms import fuse_gelu
from train.utils.errors import UserError

PACKED_ROWS = 8  # oneDNN blocks weights for a number of rows; what it takes for 8 was good for 1 to 32 as well
LARGE_PAGE = 2 << 20
MOST_THREADS_ALONE = 2  # up to so many, one row is read as quickly by one of them


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
        self.weight = nn.Parameter(in_large_pages(weight.t()), requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, I) -> (B, T, O)."""
        rows = x.reshape(-1, x.shape[-1])
        product = rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return product.view(*x.shape[:-1], -1)


def in_large_pages(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, and if it is large in pages of 2 MB where Linux gives them: fewer addresses to look up.

    torch's own allocator asks for such pages only if `THP_MEM_ALLOC_ENABLE` was set before its first tensor.
    """
    if tensor.nbytes < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor.contiguous()
    memory = mmap.mmap(-1, tensor.nbytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE
    aligned = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=first)
    return aligned.view(tensor.shape).copy_(tensor)


def laid_out(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """A copy of an fp32 model on a CPU that computes the same, sooner, for `rows` sequences; it cannot be saved.

    One row is multiplied quickest by weights that lie along their longer side: Conv1D's do, but for the MLP's second,
    and the head's do not; in large pages, as it is memory that it waits for. MKL gives it to one thread; oneDNN shares
    it out, which two threads do not make up for. More rows are oneDNN's.
    """
    alone = rows == 1 and torch.get_num_threads() <= MOST_THREADS_ALONE
    return _copy_with(model, _along_longer_side if alone or not torch.backends.mkldnn.is_available() else PackedLinear)


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that multiplies in int8: weights rounded now, a scale for each output, activations at each call.

    The activations of a call share one scale, so what a sequence gets depends a little on the others in its batch.

    Raises:
        UserError: when this machine's torch has no int8 kernels.
    """
    if not {"x86", "fbgemm", "qnnpack", "onednn"} & set(torch.backends.quantized.supported_engines):
        raise UserError("--quantize int8: this build of torch has no int8 kernels for this CPU; leave it out")
    with warnings.catch_warnings():
        # Deprecated in favour of torchao, a package more; torch itself has no other int8 of this speed.
        warnings.filterwarnings("ignore", message=r"torch\..* deprecated")
        return _copy_with(model, _int8)


def _along_longer_side(weight: Tensor, bias: Tensor | None) -> nn.Module:
    if weight.shape[0] >= weight.shape[1]:
        return TransposedLinear(weight, bias)
    return _linear(in_large_pages(weight), bias)


def _int8(weight: Tensor, bias: Tensor | None) -> nn.Module:
    how = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(_linear(weight, bias)), how, inplace=True)[0]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _copy_with(model: PreTrainedModel, make: Callable[[Tensor, Tensor | None], nn.Module]) -> PreTrainedModel:
    """A copy with `make(weight (O, I), bias (O,))` in place of each Conv1D and the head; other tensors are shared."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Conv1D):
            twin.set_submodule(name, make(module.weight.detach().t().contiguous(), module.bias.detach()))
        elif isinstance(module, nn.Linear):
            twin.set_submodule(
                name, make(module.weight.detach(), None if module.bias is None else module.bias.detach())
            )
    fuse_gelu(twin)
    return twin
