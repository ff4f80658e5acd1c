"""Where documents begin in sequences that hold several: GPT-2's `<|endoftext|>` closes each, and belongs to it."""

import numpy as np
import torch

from train.tokens import END_OF_TEXT


def document_positions(input_ids: np.ndarray) -> np.ndarray:
    """(B, T) token ids -> (B, T) int64 positions that count from 0 in each row, and again behind each end of text.

    To the model, positions that restart mark documents that do not see each other. The prediction made at an
    `<|endoftext|>`, of the next document's first token, is the document's that it closes.
    """
    columns = np.arange(input_ids.shape[1], dtype=np.int64)
    starts = np.zeros(input_ids.shape, dtype=np.int64)
    starts[:, 1:] = np.where(input_ids[:, :-1] == END_OF_TEXT, columns[1:], 0)
    return columns - np.maximum.accumulate(starts, axis=1)


def document_bounds(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(B, T) positions -> (cu_seqlens, longest), what kernels for sequences of many lengths ask for.

    Of the rows laid end to end, document d is tokens cu_seqlens[d] ... cu_seqlens[d + 1] - 1; cu_seqlens is int32, on
    the positions' device, and longest is the length of the longest document.
    """
    starts = (position_ids.flatten() == 0).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([position_ids.numel()])])
    return bounds.int(), int(bounds.diff().max())
