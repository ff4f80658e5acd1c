"""Texts → GPT-2's ids, by tiktoken, which is the reference, or by gigatoken, which is many times faster."""

import re
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from importlib.util import find_spec

import numpy as np
import pyarrow as pa

from train.data.token_file import gpt2_encoding, gpt2_ranks
from train.preprocess_data.words import SEPARATOR, Encoded, encode_by_words
from train.utils.errors import UserError

ENCODERS = ("auto", "tiktoken", "gigatoken")
SPOT_CHECK_CHARACTERS = 2000  # at most, of a document that is encoded a second time while the work goes on: 1% to 4%

# To find the words of a text (train/words.py) takes some 30 bytes a character.
LONGEST_BY_WORDS = 1 << 20
# What Rust's regular expressions call \s; Python's has four control characters more.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN_OF_BLANKS = re.compile(f"[{BLANKS}]{{1000,}}+")

Encoder = Callable[[pa.LargeStringArray], Encoded]


def ids_of(text: str) -> np.ndarray:
    """tiktoken's `encode_ordinary` as (tokens,) uint32; the interpreter is free meanwhile.

    Blanks before a word take tiktoken's engine a step of its stack each, of which it has a million.
    """
    parts = []
    start = 0
    for run in LONG_RUN_OF_BLANKS.finditer(text):
        # GPT-2's rule leaves the last blank of a run to the word behind it and makes the others a piece, which by
        # itself takes one step.
        end = run.end() if run.end() == len(text) else run.end() - 1
        parts += [text[start : run.start()], text[run.start() : end]]
        start = end
    parts.append(text[start:])
    return np.concatenate([gpt2_encoding().encode_to_numpy(part, disallowed_special=()) for part in parts])


def joined(ids: Sequence[np.ndarray]) -> Encoded:
    return Encoded(np.concatenate(ids), np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)))


def encode_plainly(texts: pa.LargeStringArray) -> Encoded:
    """The reference."""
    return joined([ids_of(text) for text in texts.to_pylist()])


def encode_with_tiktoken(texts: pa.LargeStringArray) -> Encoded:
    """Word by word; as a whole where a text is too long for that, or holds what is to separate words."""
    ordinary = texts.to_pylist()
    odd = {row: ids_of(text) for row, text in enumerate(ordinary) if len(text) > LONGEST_BY_WORDS or SEPARATOR in text}
    for row in odd:
        ordinary[row] = ""
    encoded = encode_by_words(ordinary)
    if not odd:
        return encoded
    ids = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
    for row, its_ids in odd.items():
        ids[row] = its_ids
    return joined(ids)


class GigatokenEncoder:
    def __init__(self) -> None:
        import gigatoken

        gpt2_ranks()  # checks the file
        with as_file(files("train") / "data" / "gpt2.tiktoken") as path:
            # Without special tokens: the text <|endoftext|> is text.
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="r50k")

    def __call__(self, texts: pa.LargeStringArray) -> Encoded:
        import awkward

        # Arrow's memory as it is: strings of Python would be made, and let go, while no other thread runs.
        ids = self._tokenizer.encode_batch(awkward.from_arrow(texts), parallel=False)
        return Encoded(awkward.to_numpy(awkward.flatten(ids)), awkward.to_numpy(awkward.num(ids)))


def spot_checked(encode: Encoder, name: str) -> Encoder:
    """`encode`, whose first document of each call is compared with the reference's where it is short."""

    def checked(texts: pa.LargeStringArray) -> Encoded:
        encoded = encode(texts)
        first = texts[0].as_py()
        if len(first) <= SPOT_CHECK_CHARACTERS:
            reference = ids_of(first)
            if not np.array_equal(encoded.ids[: encoded.lengths[0]], reference):
                raise UserError(
                    f"--tokenizer {name}: its ids of a document that begins {first[:40]!r} are not the reference's; "
                    "start anew with another, and --overwrite"
                )
        return encoded

    return checked


def choose_encoder(name: str, sample: pa.LargeStringArray) -> tuple[Encoder, str]:
    """The encoder to use, and why, in a sentence.

    Args:
        name: one of `ENCODERS`; "auto" takes gigatoken where it is installed.
        sample: some of the documents, on which an encoder must agree with tiktoken's own GPT-2 encoding.
    """
    reference = encode_plainly(sample)
    agrees = f"whose ids of the first {len(sample):,} documents are the reference's"
    if name != "tiktoken" and find_spec("gigatoken") is not None:
        gigatoken = GigatokenEncoder()
        if all(map(np.array_equal, gigatoken(sample), reference)):
            return spot_checked(gigatoken, "gigatoken"), f"gigatoken, {agrees}"
        if name == "gigatoken":
            raise UserError(
                "--tokenizer gigatoken: its ids of the first documents are not tiktoken's; use --tokenizer tiktoken"
            )
    elif name == "gigatoken":
        raise UserError("--tokenizer gigatoken: it is not installed; pip install 'gpt2flash[fast]'")
    if not all(map(np.array_equal, encode_with_tiktoken(sample), reference)):
        return encode_plainly, "tiktoken"
    return spot_checked(encode_with_tiktoken, "tiktoken"), f"tiktoken by distinct words, {agrees}"
