"""The split into training and validation documents, and nanoGPT's order of both."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from train.data.tokenizer import END_OF_TEXT

# (number of the first row, its text and those of the next rows) → (rows,) bool: which are for validation
SplitRule = Callable[[int, pa.LargeStringArray], np.ndarray]

READ_TOKENS = 1 << 22  # at once, of a file that is reordered


def hash_rule(val_fraction: float, seed: int) -> SplitRule:
    """By the document's content: blake2b, keyed with the seed, of its UTF-8 bytes is below val_fraction · 2^64."""
    key = seed.to_bytes(8, "little")
    threshold = int(val_fraction * 2**64)

    def is_validation(content: bytes) -> bool:
        return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "little") < threshold

    def rule(row: int, texts: pa.LargeStringArray) -> np.ndarray:
        contents = texts.cast(pa.large_binary()).to_pylist()
        return np.fromiter(map(is_validation, contents), dtype=bool, count=len(contents))

    return rule


def nanogpt_rule(val_fraction: float, seed: int, rows: int) -> SplitRule:
    """By the row's number, with the validation rows of `nanogpt_rows`."""
    validation = np.zeros(rows, dtype=bool)  # 8 MB for OpenWebText
    validation[nanogpt_rows(val_fraction, seed, rows)[1]] = True
    return lambda row, texts: validation[row : row + len(texts)]


def nanogpt_rows(val_fraction: float, seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows for training and for validation, both int64, in the order in which nanoGPT writes them.

    This is `Dataset.train_test_split(test_size=val_fraction, seed=seed, shuffle=True)` of `datasets`, which nanoGPT's
    data/openwebtext/prepare.py calls with 0.0005 and 2357: a permutation, whose first ⌈rows · val_fraction⌉ entries
    are for validation.
    """
    permutation = np.random.default_rng(seed).permutation(rows)
    validation = math.ceil(rows * val_fraction)
    return permutation[validation:], permutation[:validation]


def document_ends(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """(documents,) int64: where each document of a token file ends, after its <|endoftext|>."""
    ends = []
    start = 0
    with path.open("rb") as file:
        while (ids := np.fromfile(file, dtype=dtype, count=READ_TOKENS)).size:
            ends.append(np.flatnonzero(ids == END_OF_TEXT) + start + 1)
            start += ids.size
    return np.concatenate(ends)


def in_order(path: Path, dtype: np.dtype[Any], rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """The documents of a token file in the order of `rows`, in pieces: ids, and how many documents end in them.

    The file has the documents of the same rows in ascending order.
    """
    ends = document_ends(path, dtype)
    if len(ends) != len(rows):
        raise ValueError(f"{path} has {len(ends)} documents, and the order is of {len(rows)}")
    documents = np.empty(len(rows), dtype=np.int64)
    documents[np.argsort(rows)] = np.arange(len(rows))  # (row order) → document of the file
    total = int(ends[-1])
    progress = tqdm(total=total, unit=" tokens", unit_scale=True, desc=f"reordering {path.stem}", leave=False)
    with path.open("rb") as file, progress:
        for some in np.array_split(documents, math.ceil(total / READ_TOKENS)):
            starts = np.where(some > 0, ends[some - 1], 0)
            spans = zip((starts * dtype.itemsize).tolist(), (ends[some] * dtype.itemsize).tolist(), strict=True)
            ids = np.frombuffer(b"".join(os.pread(file.fileno(), end - start, start) for start, end in spans), dtype)
            yield ids, len(some)
            progress.update(ids.size)
