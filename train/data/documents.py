"""Where documents begin in sequences that hold several: GPT-2's `<|endoftext|>` closes each, and belongs to it."""

import numpy as np

from train.data.token_file import END_OF_TEXT


def document_positions(input_ids: np.ndarray) -> np.ndarray:
    """(B, T) token ids -> (B, T) int64 positions that count from 0 in each row, and again behind each end of text.

    To the model, positions that restart mark documents that do not see each other. The prediction made at an
    `<|endoftext|>`, of the next document's first token, is the document's that it closes.
    """
    columns = np.arange(input_ids.shape[1], dtype=np.int64)
    starts = np.zeros(input_ids.shape, dtype=np.int64)
    starts[:, 1:] = np.where(input_ids[:, :-1] == END_OF_TEXT, columns[1:], 0)
    return columns - np.maximum.accumulate(starts, axis=1)
