"""Texts → GPT-2's ids, by tiktoken, which is the reference, or by gigatoken, which is many times faster."""

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.resources import as_file, files
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import tiktoken

from train.errors import UserError
from train.tokens import END_OF_TEXT, END_OF_TEXT_STRING, gpt2_encoding, gpt2_ranks

ENCODERS = ("auto", "tiktoken", "gigatoken")
SPOT_CHECK_CHARACTERS = 2000  # at most, of a document that is encoded a second time while the work goes on: 1% to 4%

# tiktoken's rule for GPT-2 as a rule of the same language that its engine runs 1.6 times faster: the words, which are
# most of a text, come first and in one alternative without look-around and without possessive repetition, which that
# engine hands to a plain automaton as a whole. The possessive repetitions stood at the end of an alternative, where
# nothing can make them give back; the three kinds of words begin with different characters, none of them blank. Blanks
# at the end of a text, which have an alternative of their own in tiktoken's rule, are matched by the next one as well.
SAME_RULE = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"

# Blanks before a word take that engine a step of its stack each, of which it has a million.
LONG_TEXT = 100_000
# What Rust's regular expressions call \s; Python's has four control characters more.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN_OF_BLANKS = re.compile(f"[{BLANKS}]{{1000,}}+")


class Encoded(NamedTuple):
    ids: np.ndarray  # (tokens,) uint32: of all texts, one after another
    lengths: np.ndarray  # (texts,) int64: tokens of each


Encoder = Callable[[Sequence[str]], Encoded]


@cache
def fast_encoding() -> tiktoken.Encoding:
    """`gpt2_encoding()` with the faster rule."""
    special_tokens = {END_OF_TEXT_STRING: END_OF_TEXT}  # without one, tiktoken looks for the empty text, everywhere
    return tiktoken.Encoding(
        "gpt2_same_rule", pat_str=SAME_RULE, mergeable_ranks=gpt2_ranks(), special_tokens=special_tokens
    )


def ids_of(text: str, encoding: tiktoken.Encoding) -> np.ndarray:
    """`encode_ordinary` as (tokens,) uint32, without a list of Python integers; the interpreter is free meanwhile."""
    if len(text) < LONG_TEXT:
        return encoding.encode_to_numpy(text, disallowed_special=())
    ids = []
    start = 0
    for run in LONG_RUN_OF_BLANKS.finditer(text):
        # GPT-2's rule leaves the last blank of a run to the word behind it and makes the others a piece, which by
        # itself tiktoken's own rule takes in one step.
        end = run.end() if run.end() == len(text) else run.end() - 1
        ids.append(encoding.encode_to_numpy(text[start : run.start()], disallowed_special=()))
        ids.append(gpt2_encoding().encode_to_numpy(text[run.start() : end]))
        start = end
    ids.append(encoding.encode_to_numpy(text[start:], disallowed_special=()))
    return np.concatenate(ids)


def encode_plainly(texts: Sequence[str], encoding: tiktoken.Encoding) -> Encoded:
    ids = [ids_of(text, encoding) for text in texts]
    return Encoded(np.concatenate(ids), np.fromiter(map(len, ids), dtype=np.int64, count=len(ids)))


def encode_with_tiktoken(texts: Sequence[str]) -> Encoded:
    return encode_plainly(texts, fast_encoding())


class GigatokenEncoder:
    def __init__(self) -> None:
        import gigatoken

        gpt2_ranks()  # checks the file
        with as_file(files("train") / "data" / "gpt2.tiktoken") as path:
            # Without special tokens: the text <|endoftext|> is text.
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="r50k")

    def __call__(self, texts: Sequence[str]) -> Encoded:
        import awkward

        ids = self._tokenizer.encode_batch(list(texts), parallel=False)
        return Encoded(awkward.to_numpy(awkward.flatten(ids)), awkward.to_numpy(awkward.num(ids)))


def spot_checked(encode: Encoder, name: str) -> Encoder:
    """`encode`, whose first document of each call is compared with the reference's where it is short."""

    def checked(texts: Sequence[str]) -> Encoded:
        encoded = encode(texts)
        first = texts[0]
        if len(first) <= SPOT_CHECK_CHARACTERS:
            reference = ids_of(first, gpt2_encoding())
            if not np.array_equal(encoded.ids[: encoded.lengths[0]], reference):
                raise UserError(
                    f"--tokenizer {name}: its ids of a document that begins {first[:40]!r} are not the reference's; "
                    "start anew with another, and --overwrite"
                )
        return encoded

    return checked


def choose_encoder(name: str, sample: Sequence[str]) -> tuple[Encoder, str]:
    """The encoder to use, and why, in a sentence.

    Args:
        name: one of `ENCODERS`; "auto" takes gigatoken where it is installed.
        sample: some of the documents, on which an encoder must agree with tiktoken's own GPT-2 encoding.
    """
    reference = encode_plainly(sample, gpt2_encoding())
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
        return partial(encode_plainly, encoding=gpt2_encoding()), "tiktoken"
    return spot_checked(encode_with_tiktoken, "tiktoken"), f"tiktoken with a faster rule, {agrees}"
