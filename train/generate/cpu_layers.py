"""A copy of a GPT-2 for text generation on a CPU: the same weights, in layouts that CPUs multiply fast.

With a handful of rows a matmul is limited by reading its weights, and their memory layout decides how fast the cores
read them. The model itself is not changed: in a copy of it, each Conv1D and the head are replaced by a module that
holds the same weights packed for oneDNN, or in int8.

Shapes: B batch, T positions, I input features, O output features.
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

PACKED_ROWS = 8  # oneDNN packs weights for a number of rows; its layout for 8 was good for 1 to 32 as well
LARGE_PAGE = 2 << 20
MAX_THREADS_SINGLE_ROW = 2  # up to this many threads, one of them reads the weights of a single row as fast as all


class PackedLinear(nn.Module):
    """`nn.Linear` with weights packed by oneDNN: fp32, on CPUs, without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` (O, I), `bias` (O,)."""
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, I) -> (B, T, O)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def in_large_pages(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and, if it is large, in pages of 2 MB where Linux has them: fewer TLB misses.

    torch's own allocator uses such pages only if `THP_MEM_ALLOC_ENABLE` was set before its first tensor.
    """
    if tensor.nbytes < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor.contiguous()
    memory = mmap.mmap(-1, tensor.nbytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    first = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % LARGE_PAGE
    aligned = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=first)
    return aligned.view(tensor.shape).copy_(tensor)


def pack_weights(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """A copy of an fp32 model on a CPU that computes the same result faster for `rows` sequences; it cannot be saved.

    A single row is bound by memory: it is multiplied fastest by weights that are contiguous along their longer side
    (Conv1D's are, except for the MLP's second; the head's are not), in large pages. MKL runs it on one thread; oneDNN
    distributes it, which with two threads costs more than it gains. Several rows use oneDNN.
    """
    alone = rows == 1 and torch.get_num_threads() <= MAX_THREADS_SINGLE_ROW
    return _copy_with(model, _along_longer_side if alone or not torch.backends.mkldnn.is_available() else PackedLinear)


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that multiplies in int8: weights quantized now, with a scale for each output; activations at each call.

    The activations of a call share one scale, so a sequence's result depends slightly on the others in its batch.

    Raises:
        UserError: if this machine's torch has no int8 kernels.
    """
    if not {"x86", "fbgemm", "qnnpack", "onednn"} & set(torch.backends.quantized.supported_engines):
        raise UserError("--quantize int8: this build of torch has no int8 kernels for this CPU; leave it out")
    with warnings.catch_warnings():
        # Deprecated in favour of torchao, which is another package; torch itself has no other int8 of this speed.
        warnings.filterwarnings("ignore", message=r"torch\..* deprecated")
        return _copy_with(model, _int8_linear)


def _along_longer_side(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    is_tall = weight.shape[0] >= weight.shape[1]
    return _linear(in_large_pages(weight.t()).t() if is_tall else in_large_pages(weight), bias)


def _int8_linear(weight: Tensor, bias: Tensor | None) -> nn.Module:
    spec = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(_linear(weight, bias)), spec, inplace=True)[0]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _copy_with(model: PreTrainedModel, make: Callable[[Tensor, Tensor | None], nn.Module]) -> PreTrainedModel:
    """A copy with `make(weight (O, I), bias (O,))` in place of each Conv1D and the head; it shares other tensors."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    replaced = copy.deepcopy(model, shared)
    for name, module in list(replaced.named_modules()):
        if isinstance(module, Conv1D):
            replaced.set_submodule(name, make(module.weight.detach().t().contiguous(), module.bias.detach()))
        elif isinstance(module, nn.Linear):
            bias = None if module.bias is None else module.bias.detach()
            replaced.set_submodule(name, make(module.weight.detach(), bias))
    fuse_gelu(replaced)
    return replaced
