"""Texts → GPT-2's ids, by tiktoken, which is the reference, or by gigatoken, which is many times faster."""

import re
import threading
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from train.errors import UserError
from train.tokens import gpt2_encoding, gpt2_ranks

ENCODERS = ("auto", "tiktoken", "gigatoken")
SPOT_CHECK_CHARACTERS = 2000  # at most, of a document that both encode while the work goes on: it costs 1%

# What Rust's regular expressions call \s; Python's has four control characters more.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN_OF_BLANKS = re.compile(f"[{BLANKS}]{{1000,}}(?=[^{BLANKS}])")


class Encoded(NamedTuple):
    ids: np.ndarray  # (tokens,) uint32: of all texts, one after another
    lengths: np.ndarray  # (texts,) int64: tokens of each


Encoder = Callable[[Sequence[str]], Encoded]


def encode_with_tiktoken(texts: Sequence[str]) -> Encoded:
    """`Encoding.encode_ordinary` of each text, without lists of Python integers; the interpreter is free meanwhile."""
    ids = [_ids(text) for text in texts]
    return Encoded(np.concatenate(ids), np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)))


def _ids(text: str) -> np.ndarray:
    encoding = gpt2_encoding()
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError:  # its regular expression runs out of stack in a hundred thousand blanks before a word
        # GPT-2's rule leaves the last blank of such a run to the word, so the text may be cut before it.
        cuts = [0, *(run.end() - 1 for run in LONG_RUN_OF_BLANKS.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(cuts)]
        return np.concatenate([encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])


class GigatokenEncoder:
    """gigatoken's ids, one tokenizer a thread; one short document of each call is compared with tiktoken's."""

    def __init__(self) -> None:
        gpt2_ranks()  # checks the file
        self._of_thread = threading.local()

    def __call__(self, texts: Sequence[str]) -> Encoded:
        encoded = self.encode(texts)
        first = texts[0]
        if len(first) <= SPOT_CHECK_CHARACTERS and not np.array_equal(encoded.ids[: encoded.lengths[0]], _ids(first)):
            raise UserError(
                f"--tokenizer gigatoken: its ids of a document that begins {first[:40]!r} are not tiktoken's; "
                "start anew with --tokenizer tiktoken --overwrite"
            )
        return encoded

    def encode(self, texts: Sequence[str]) -> Encoded:
        import awkward

        ids = self._tokenizer().encode_batch(list(texts), parallel=False)
        return Encoded(awkward.to_numpy(awkward.flatten(ids)), awkward.to_numpy(awkward.num(ids)))

    def _tokenizer(self) -> Any:
        if not hasattr(self._of_thread, "tokenizer"):
            import gigatoken

            with as_file(files("train") / "data" / "gpt2.tiktoken") as path:
                # Without special tokens: the text <|endoftext|> is text.
                self._of_thread.tokenizer = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="r50k")
        return self._of_thread.tokenizer


def choose_encoder(name: str, sample: Sequence[str]) -> tuple[Encoder, str]:
    """The encoder to use, and why, in a sentence.

    Args:
        name: one of `ENCODERS`; "auto" takes gigatoken where it is installed and its ids of `sample` are tiktoken's.
        sample: some of the documents.
    """
    if name == "tiktoken":
        return encode_with_tiktoken, "tiktoken, as asked for"
    if find_spec("gigatoken") is None:
        if name == "gigatoken":
            raise UserError("--tokenizer gigatoken: it is not installed; pip install 'gpt2flash[fast]'")
        return encode_with_tiktoken, "tiktoken (gigatoken, many times faster, comes with gpt2flash[fast])"
    fast = GigatokenEncoder()
    if all(map(np.array_equal, fast.encode(sample), encode_with_tiktoken(sample))):
        return fast, f"gigatoken, whose ids of the first {len(sample):,} documents are tiktoken's"
    if name == "gigatoken":
        raise UserError(
            "--tokenizer gigatoken: its ids of the first documents are not tiktoken's; use --tokenizer tiktoken"
        )
    return encode_with_tiktoken, "tiktoken, as gigatoken's ids of the first documents are others"
