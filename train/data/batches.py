"""(seed, epoch, index) → batch: the order of the data is a function, so there is no sampler state to save.

1. A file of N tokens is split into n = (N - 1) // T blocks; block i is ids[i·T : i·T + T + 1], T inputs and the T
   tokens that follow them. Adjacent blocks share one token, so every token but the first is predicted once (the last
   (N - 1) mod T tokens are left out in training; evaluation pads and takes them too).
2. Sample g, counted from the beginning of training, is entry g mod n of the permutation of (seed, epoch g // n). So
   each epoch predicts each token once, in its own order, and nothing repeats within an epoch.
3. Optimizer step s takes the samples s·G … s·G + G - 1. When n is not a multiple of the global batch size G, a batch
   takes the rest of one epoch and the beginning of the next.
4. Micro-step j of data-parallel rank r takes entries (j·D + r)·B … + B - 1 of the global batch, where D is the number
   of data-parallel ranks (the stages of a pipeline share one). The number of ranks and of accumulation steps decides
   who computes a sample, and never which samples a step sees.

With `document_mask` a batch also has `position_ids`, (B, T) int64, which restart in each document and so keep
attention within it, and `cu_seq_lens`, (documents + 1,) int32, the same for flash kernels: computed here, on the CPU
and ahead of time, they need no synchronization with the device. The labels are the same: every token but the first is
predicted, whatever the mask.
"""

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from modeling_gpt2flash.documents import document_bounds
from train.data.token_file import TokenFile
from train.data.tokenizer import END_OF_TEXT
from train.utils.errors import UserError

IGNORED_LABEL = -100  # what transformers' losses and torch's cross_entropy leave out


@lru_cache(maxsize=2)  # a batch between two epochs needs both; each takes 8 bytes per block
def epoch_order(seed: int, epoch: int, blocks: int) -> np.ndarray:
    """(blocks,) int64: the order of one epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(blocks)
    order.flags.writeable = False  # callers share the cached array
    return order


class TrainBatches:
    """Training data by optimizer step, in the order that the module's docstring defines."""

    def __init__(
        self, tokens: TokenFile, block_size: int, global_batch_size: int, seed: int, document_mask: bool = False
    ) -> None:
        if len(tokens) - 1 < block_size:
            raise UserError(
                f"{tokens.path} has {len(tokens)} tokens, too few for one block of {block_size} tokens and the one "
                "that follows: prepare more text, or make the block size smaller"
            )
        self.tokens = tokens
        self.block_size = block_size
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.document_mask = document_mask

    @property
    def blocks(self) -> int:
        return (len(self.tokens) - 1) // self.block_size

    @property
    def steps_per_epoch(self) -> float:
        return self.blocks / self.global_batch_size

    def updates(self, epochs: float) -> int:
        """Optimizer steps that cover `epochs`: ⌈epochs · n / G⌉; the last one may take samples of the next epoch."""
        # Exact decimals: in floats, 0.1 · 30 blocks could round up to one step too many.
        return math.ceil(Fraction(str(epochs)) * self.blocks / self.global_batch_size)

    def block_indices(self, step: int) -> np.ndarray:
        """(G,) int64: the blocks of the global batch at optimizer step `step`, counted from 0."""
        samples = step * self.global_batch_size + np.arange(self.global_batch_size)
        epochs, entries = np.divmod(samples, self.blocks)
        orders = ((epoch, epoch_order(self.seed, epoch, self.blocks)) for epoch in np.unique(epochs).tolist())
        return np.concatenate([order[entries[epochs == epoch]] for epoch, order in orders])

    def micro_batch(
        self, step: int, micro_step: int, rank: int, world_size: int, micro_batch_size: int
    ) -> dict[str, torch.Tensor]:
        """`input_ids` and `shift_labels`, both (B, T) int64: shift_labels[b, t] is the token after input_ids[b, t]."""
        start = (micro_step * world_size + rank) * micro_batch_size
        assert start + micro_batch_size <= self.global_batch_size, "micro-step, rank and size exceed the global batch"
        offsets = self.block_indices(step)[start : start + micro_batch_size] * self.block_size
        self.tokens.will_need(offsets, self.block_size + 1)
        rows = np.stack([self.tokens.read(offset, self.block_size + 1) for offset in offsets.tolist()])
        return as_tensors(rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64), self.document_mask)


class EvalBatches:
    """A complete file in its own order: every token but the first is predicted exactly once, in any layout.

    The last block may be shorter and is padded: labels with -100, inputs with the file's last token, which is in
    the vocabulary (`<|endoftext|>` in files of `preprocess_data`). All ranks take the same number of steps, because
    every rank must reach each collective: a rank without a block gets labels of -100 only, whose mean loss is NaN, so
    sum the losses and divide by the number of labels.
    """

    def __init__(self, tokens: TokenFile, block_size: int, document_mask: bool = False) -> None:
        if len(tokens) < 2:
            raise UserError(f"{tokens.path} has {len(tokens)} token, none of which follows another: prepare more text")
        self.tokens = tokens
        self.block_size = block_size
        self.document_mask = document_mask
        self.blocks = math.ceil((len(tokens) - 1) / block_size)
        self.padding = tokens.read(len(tokens) - 1, 1)[0]

    def steps(self, world_size: int, micro_batch_size: int) -> int:
        """Steps of each rank."""
        return math.ceil(self.blocks / (world_size * micro_batch_size))

    def micro_batch(self, step: int, rank: int, world_size: int, micro_batch_size: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `shift_labels`, both (B, T) int64; labels are -100 beyond the end of the file."""
        input_ids = np.full((micro_batch_size, self.block_size), self.padding, dtype=np.int64)
        shift_labels = np.full((micro_batch_size, self.block_size), IGNORED_LABEL, dtype=np.int64)
        first = (step * world_size + rank) * micro_batch_size
        for row, block in enumerate(range(first, min(first + micro_batch_size, self.blocks))):
            offset = block * self.block_size
            ids = self.tokens.read(offset, self.block_size + 1)
            input_ids[row, : len(ids) - 1] = ids[:-1]
            shift_labels[row, : len(ids) - 1] = ids[1:]
        return as_tensors(input_ids, shift_labels, self.document_mask)


def as_tensors(input_ids: np.ndarray, shift_labels: np.ndarray, document_mask: bool) -> dict[str, torch.Tensor]:
    batch = {"input_ids": torch.from_numpy(input_ids), "shift_labels": torch.from_numpy(shift_labels)}
    if document_mask:
        position_ids = torch.from_numpy(document_positions(input_ids))
        batch |= {"position_ids": position_ids, "cu_seq_lens": document_bounds(position_ids == 0)}
    return batch


def document_positions(input_ids: np.ndarray) -> np.ndarray:
    """(B, T) token ids → (B, T) int64 positions, from 0 in each row and again after each `<|endoftext|>`.

    To the model, positions that restart separate documents that do not attend to each other. An `<|endoftext|>`
    belongs to the document that it ends, and so does its prediction of the next document's first token.
    """
    columns = np.arange(input_ids.shape[1], dtype=np.int64)
    starts = np.zeros(input_ids.shape, dtype=np.int64)
    starts[:, 1:] = np.where(input_ids[:, :-1] == END_OF_TEXT, columns[1:], 0)
    return columns - np.maximum.accumulate(starts, axis=1)
