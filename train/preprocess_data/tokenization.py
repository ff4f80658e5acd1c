"""Texts → GPT-2's token ids, by tiktoken (the reference) or by gigatoken, which is many times as fast."""

import re
from collections.abc import Callable
from importlib.resources import as_file, files
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from train.data.tokenizer import gpt2_encoding, gpt2_ranks
from train.utils.errors import UserError

ENCODERS = ("auto", "tiktoken", "gigatoken")
SPOT_CHECK_CHARACTERS = 2000  # of a document that is encoded a second time, at most: 1% to 4% of the time

# What Rust's regular expressions call \s; Python's has four control characters more.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN_OF_BLANKS = re.compile(f"[{BLANKS}]{{1000,}}+")


class Encoded(NamedTuple):
    ids: np.ndarray  # (tokens,) uint32: of all texts, one after another
    lengths: np.ndarray  # (texts,) int64: tokens of each


Encoder = Callable[[pa.LargeStringArray], Encoded]


def ids_of(text: str) -> np.ndarray:
    """tiktoken's `encode_ordinary` as (tokens,) uint32, without holding the interpreter's lock.

    Each blank before a word takes one step of the stack of tiktoken's engine, which has a million.
    """
    parts = []
    start = 0
    for run in LONG_RUN_OF_BLANKS.finditer(text):
        # GPT-2's pattern leaves the last blank of a run to the next word, and matches the others as one piece, which
        # alone takes one step.
        end = run.end() if run.end() == len(text) else run.end() - 1
        parts += [text[start : run.start()], text[run.start() : end]]
        start = end
    parts.append(text[start:])
    return np.concatenate([gpt2_encoding().encode_to_numpy(part, disallowed_special=()) for part in parts])


def encode_with_tiktoken(texts: pa.LargeStringArray) -> Encoded:
    """The reference implementation."""
    ids = [ids_of(text) for text in texts.to_pylist()]
    return Encoded(np.concatenate(ids), np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)))


class GigatokenEncoder:
    """gigatoken with GPT-2's vocabulary; where the first document of a call is short, it is checked by tiktoken."""

    def __init__(self) -> None:
        import gigatoken

        gpt2_ranks()  # checks the file
        with as_file(files("train") / "data" / "gpt2.tiktoken") as path:
            # Without special tokens, so that <|endoftext|> in a document is text.
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="r50k")

    def encode(self, texts: pa.LargeStringArray) -> Encoded:
        import awkward

        # Passes Arrow's memory: creating and freeing Python strings would hold the interpreter's lock.
        ids = self._tokenizer.encode_batch(awkward.from_arrow(texts), parallel=False)
        return Encoded(awkward.to_numpy(awkward.flatten(ids)), awkward.to_numpy(awkward.num(ids)))

    def __call__(self, texts: pa.LargeStringArray) -> Encoded:
        encoded = self.encode(texts)
        first = texts[0].as_py()
        is_short = len(first) <= SPOT_CHECK_CHARACTERS
        if is_short and not np.array_equal(encoded.ids[: encoded.lengths[0]], ids_of(first)):
            raise UserError(
                f"--tokenizer gigatoken: its ids of a document that begins {first[:40]!r} are not the reference's; "
                "start again with --tokenizer tiktoken --overwrite"
            )
        return encoded


def choose_encoder(name: str, sample: pa.LargeStringArray) -> tuple[Encoder, str]:
    """The encoder of a name in `ENCODERS`, and the reason in a sentence; gigatoken must agree on the sample."""
    if name == "tiktoken":
        return encode_with_tiktoken, "tiktoken"
    fault = "it is not installed; pip install 'gpt2flash[fast]'"
    if find_spec("gigatoken"):
        gigatoken = GigatokenEncoder()
        if all(map(np.array_equal, gigatoken.encode(sample), encode_with_tiktoken(sample))):
            return gigatoken, f"gigatoken, whose ids of the first {len(sample):,} documents are the reference's"
        fault = "its ids of the first documents are not tiktoken's; use --tokenizer tiktoken"
    if name == "gigatoken":
        raise UserError(f"--tokenizer gigatoken: {fault}")
    return encode_with_tiktoken, "tiktoken"
