"""The language-modeling loss, computed in chunks of rows.

GPT-2's vocabulary makes the logits the largest tensor of a training step: batch 64 x 1024 positions x 50,257 tokens
x 4 bytes = 13.2 GB. They are never needed all at once: the loss of a row and its gradients depend only on that row's
logits. So the logits, the loss and its gradients are computed for a few hundred rows at a time, in the same memory.

Shapes: B batch, T positions, N = B * T rows, C rows of a chunk, P rows of a piece of it, D hidden width, V vocabulary,
W vocabulary padded for the matmuls.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CPU_PIECE_ROWS = 32  # x 50,257 x 4 bytes = 6.4 MB
# Rows of the weight gradient that are accumulated at a time: torch first makes an fp32 copy of bf16 rows.
CPU_SUM_ROWS = 1024  # x 768 x 4 bytes = 3.1 MB
# GPT-2's odd vocabulary of 50,257 is padded to a multiple of this for the matmuls: W = 50,304. A GPU's matrix units
# need rows that start at multiples of 16 bytes, and work in tiles of 128. On a CPU the fp32 weight is used without a
# copy.
VOCABULARY_MULTIPLES = {"cpu": 1}
ALIGNMENT = 128


def causal_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    chunk_size: int,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against the next token, as transformers defines it.

    Args:
        hidden: (B, T, D), the final hidden states.
        weight: (V, D), the vocabulary projection.
        labels: (B, T), aligned with the input; shifted here. Unused when `shift_labels` is given.
        shift_labels: (B, T), already shifted: position t holds the token that t should predict.
        num_items_in_batch: divisor of the summed loss, e.g. the number of predicted tokens in all accumulated
            micro-batches. None for the mean over this call's rows that are not ignored.
        ignore_index: the label of rows that are ignored.
        chunk_size: rows of logits that are in memory at a time; 0 for all.

    Returns:
        A scalar: fp32, or fp64 for fp64 input.
    """
    if chunk_size < 0:
        raise ValueError(f"chunk_size is {chunk_size}; pass the rows of a chunk, or 0 for all rows at once.")
    if shift_labels is None:
        if labels is None:
            raise ValueError("The loss needs labels, or shift_labels if they are already shifted.")
        shift_labels = shift_left(labels, ignore_index)
    if shift_labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"The labels' shape {tuple(shift_labels.shape)} is not that of the hidden states without their last "
            f"dimension, {tuple(hidden.shape[:-1])}."
        )
    rows_ND = hidden.reshape(-1, hidden.shape[-1])
    targets_N = shift_labels.reshape(-1).to(hidden.device)

    if chunk_size == 0:
        summed = _summed_loss(F.linear(rows_ND, weight), targets_N, ignore_index)
    else:
        summed = _chunked_sum(rows_ND, weight, targets_N, ignore_index, chunk_size)

    if num_items_in_batch is None:
        return summed / (targets_N != ignore_index).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(summed.device)
    return summed / num_items_in_batch


def shift_left(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """(B, T) -> (B, T): each position gets the label of the next one, the last position `ignore_index`."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def _chunked_sum(rows_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int, chunk_size: int) -> Tensor:
    # The custom function casts explicitly, with autocast disabled: autocast's cache would keep the weight's copy
    # alive, and it does not apply to in-place matmuls.
    device_type = rows_ND.device.type
    if torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
    else:
        compute_dtype = torch.promote_types(rows_ND.dtype, weight_VD.dtype)
    needs_grad = torch.is_grad_enabled()
    grad_rows = needs_grad and rows_ND.requires_grad
    grad_weight = needs_grad and weight_VD.requires_grad
    return _ChunkedLoss.apply(
        rows_ND, weight_VD, targets_N, ignore_index, chunk_size, compute_dtype, grad_rows, grad_weight
    )


def _summed_loss(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """(C, V), (C,) -> (): in at least fp32, whatever the dtype of the logits."""
    return F.cross_entropy(_at_least_fp32(logits), targets, ignore_index=ignore_index, reduction="sum")


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _score(logits_PV: Tensor, targets_P: Tensor, ignore_index: int, needs_grad: bool) -> Tensor:
    """(P, V), (P,) -> (): the summed loss. Overwrites the logits, with their gradient if `needs_grad`."""
    counted_P1 = (targets_P != ignore_index)[:, None]
    targets_P1 = targets_P[:, None].masked_fill(~counted_P1, 0)
    logits_PV -= logits_PV.amax(dim=-1, keepdim=True)
    target_logits_P1 = logits_PV.gather(-1, targets_P1)
    exp_sums_P1 = logits_PV.exp_().sum(dim=-1, keepdim=True)
    if needs_grad:  # softmax - one-hot, and 0 in ignored rows
        counted = counted_P1.to(logits_PV.dtype)
        logits_PV *= counted / exp_sums_P1
        logits_PV.scatter_add_(-1, targets_P1, -counted)
    return (exp_sums_P1.log() - target_logits_P1).masked_fill(~counted_P1, 0).sum()


def _padded(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, D) -> (W, D) in a dtype: zero rows are appended, for a size that suits the device's matmuls."""
    vocabulary, width = weight_VD.shape
    multiple = VOCABULARY_MULTIPLES.get(weight_VD.device.type, ALIGNMENT)
    missing = -vocabulary % multiple
    if not missing:
        return weight_VD.to(dtype)
    weight_WD = weight_VD.new_empty((vocabulary + missing, width), dtype=dtype)
    weight_WD[:vocabulary] = weight_VD
    weight_WD[vocabulary:] = 0
    return weight_WD


def _accumulate(total_WD: Tensor, chunk_WD: Tensor, first: bool) -> None:
    """Add a chunk's gradient to the total; the first chunk overwrites it."""
    if first:
        total_WD.copy_(chunk_WD)
        return
    rows = CPU_SUM_ROWS if total_WD.device.type == "cpu" else len(total_WD)
    for total_PD, chunk_PD in zip(total_WD.split(rows), chunk_WD.split(rows), strict=True):
        total_PD += chunk_PD


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss, whose gradients are computed in the forward pass.

    The backward pass would need a chunk's logits again: stored (which we avoid), computed twice (a third more FLOPs),
    or differentiated while they are in memory. The last costs nothing because the loss is a scalar: the backward pass
    only multiplies by the incoming gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        ignore_index: int,
        chunk_size: int,
        compute_dtype: torch.dtype,
        grad_rows: bool,
        grad_weight: bool,
    ) -> Tensor:
        with torch.autocast(rows_ND.device.type, enabled=False):
            vocabulary = weight_VD.shape[0]
            weight_WD = _padded(weight_VD, compute_dtype)
            # Sums over rows and chunks are fp32: in bf16 the contribution of a chunk would be lost to rounding.
            sum_dtype = torch.promote_types(compute_dtype, torch.float32)
            total = rows_ND.new_zeros((), dtype=sum_dtype)
            d_rows = torch.empty_like(rows_ND) if grad_rows else None
            d_weight_WD = torch.empty_like(weight_WD, dtype=sum_dtype) if grad_weight else None
            if d_weight_WD is not None and not rows_ND.shape[0]:
                d_weight_WD.zero_()  # otherwise the first chunk overwrites it
            # All chunks share one buffer for their logits: new pages for every chunk would cost a third more time.
            most_rows = min(chunk_size, rows_ND.shape[0])
            # Its rows start at multiples of 128 elements even if the vocabulary is odd, which makes a CPU's fp32
            # matmul 1.4 to 1.7 times as fast. A compiled graph cannot write to such rows.
            gap = 0 if torch.compiler.is_compiling() else -weight_WD.shape[0] % ALIGNMENT
            logits_CW = rows_ND.new_empty((most_rows, weight_WD.shape[0] + gap), dtype=compute_dtype)
            if gap:
                logits_CW = logits_CW[:, :-gap]
            # A matmul needs many rows; on a CPU, the passes over its result need few, so that these stay in the cache.
            piece_rows = min(CPU_PIECE_ROWS, most_rows) if rows_ND.device.type == "cpu" else most_rows
            rounded = compute_dtype != sum_dtype
            wide = logits_CW.new_empty((piece_rows, vocabulary), dtype=sum_dtype) if rounded else None
            d_weight_chunk_WD = torch.empty_like(weight_WD) if d_weight_WD is not None and rounded else None

            for start in range(0, rows_ND.shape[0], chunk_size):
                rows_CD = rows_ND[start : start + chunk_size].to(compute_dtype)
                targets_C = targets_N[start : start + chunk_size]
                # The padding is zero and no pass changes it, which is also its correct gradient.
                chunk_CW = torch.mm(rows_CD, weight_WD.T, out=logits_CW[: len(rows_CD)])
                pieces = chunk_CW[:, :vocabulary].split(piece_rows)
                for piece_PV, targets_P in zip(pieces, targets_C.split(piece_rows), strict=True):
                    wide_PV = piece_PV if wide is None else wide[: len(piece_PV)].copy_(piece_PV)
                    total += _score(wide_PV, targets_P, ignore_index, grad_rows or grad_weight)
                    if wide is not None:
                        piece_PV.copy_(wide_PV)
                if d_rows is not None:
                    d_rows[start : start + chunk_size] = chunk_CW @ weight_WD
                if d_weight_WD is not None and d_weight_chunk_WD is not None:
                    _accumulate(d_weight_WD, torch.mm(chunk_CW.T, rows_CD, out=d_weight_chunk_WD), first=start == 0)
                elif d_weight_WD is not None:
                    d_weight_WD.addmm_(chunk_CW.T, rows_CD, beta=min(start, 1))

        d_weight = None if d_weight_WD is None else d_weight_WD.to(weight_VD.dtype)
        # Sliced only if it is padded: autograd adds the embedding's gradient in place to a tensor, but not to a view.
        if d_weight is not None and len(d_weight) > vocabulary:
            d_weight = d_weight[:vocabulary]
        ctx.save_for_backward(d_rows, d_weight)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        # The weight's gradient is the largest tensor here, so it is scaled in place, not copied, unless the graph is
        # retained for a second backward pass.
        if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
            d_rows, d_weight = (None if d is None else d * d_total.to(d.dtype) for d in ctx.saved_tensors)
        else:
            d_rows, d_weight = (None if d is None else d.mul_(d_total.to(d.dtype)) for d in ctx.saved_tensors)
        return d_rows, d_weight, None, None, None, None, None, None
