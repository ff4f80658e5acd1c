from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.test_tokens import NASTY, random_strings
from train.data.tokenizer import gpt2_encoding
from train.preprocess_data import tokenization
from train.preprocess_data.sources import stdlib_modules
from train.preprocess_data.tokenization import Encoded, GigatokenEncoder, choose_encoder, encode_with_tiktoken
from train.utils.errors import UserError

BLANKS_BEFORE_WORDS = [
    " " * 300_000 + "word",
    "a" + "\n" * 150_000 + "\t\u2003 b " + " " * 120_000 + "\u3000c" + "\r\n" * 200_000,
    " " * 1_200_000 + "x",  # tiktoken's own engine gives up on this one
    "\x1c" * 150_000 + "x",  # blank to Python, not to Rust
    "x" * 300_000,
]


def reference(texts: Sequence[str]) -> list[list[int]]:
    return [gpt2_encoding().encode_ordinary(text) for text in texts]


def arrow(texts: Sequence[str]) -> pa.LargeStringArray:
    return pa.array(texts, pa.large_string())


def split(encoded: Encoded) -> list[list[int]]:
    assert encoded.ids.size == encoded.lengths.sum()
    return [ids.tolist() for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]


@pytest.fixture(scope="module")
def gigatoken() -> GigatokenEncoder:
    return GigatokenEncoder()


def test_both_encoders_give_the_references_ids(gigatoken: GigatokenEncoder) -> None:
    modules = [Path(path).read_text("utf-8", errors="replace") for path in stdlib_modules()[::7]]
    texts = [*NASTY, *random_strings(20_000), "<|endoftext|>", *modules]
    expected = reference(texts)
    assert split(encode_with_tiktoken(arrow(texts))) == expected
    assert split(gigatoken(arrow(texts))) == expected
    assert split(gigatoken(arrow(texts)[40:99])) == expected[40:99], "a part of Arrow's memory"


@pytest.mark.parametrize("text", BLANKS_BEFORE_WORDS, ids=range(len(BLANKS_BEFORE_WORDS)))
def test_long_runs(text: str, gigatoken: GigatokenEncoder) -> None:
    ids = split(encode_with_tiktoken(arrow(["a", text])))[1]
    assert split(gigatoken(arrow([text]))) == [ids]
    if len(text) < 1_000_000:
        assert [ids] == reference([text])


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = arrow(["Hello world", "", "naïve\n\n  café"])
    for name, expected in (("auto", "gigatoken"), ("gigatoken", "gigatoken"), ("tiktoken", "tiktoken")):
        encode, why = choose_encoder(name, sample)
        assert why.startswith(expected)
        assert split(encode(sample)) == reference(sample.to_pylist())
    monkeypatch.setattr(tokenization, "find_spec", lambda name: None)
    assert choose_encoder("auto", sample)[1].startswith("tiktoken")
    with pytest.raises(UserError, match=r"gigatoken: it is not installed; pip install 'gpt2flash\[fast\]'"):
        choose_encoder("gigatoken", sample)


def test_an_encoder_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: GigatokenEncoder, texts: pa.LargeStringArray) -> Encoded:
        ids, lengths = encode_with_tiktoken(texts)
        return Encoded(ids + (ids == 995), lengths)

    monkeypatch.setattr(GigatokenEncoder, "encode", wrong)
    sample = arrow(["Hello world"])
    encode, why = choose_encoder("auto", sample)
    assert (split(encode(sample)), why[:8]) == (reference(sample.to_pylist()), "tiktoken")
    with pytest.raises(UserError, match="its ids of the first documents are not tiktoken's"):
        choose_encoder("gigatoken", sample)
    # It agrees on the sample, and fails later.
    encode, why = choose_encoder("auto", arrow(["Hello"]))
    assert why.startswith("gigatoken")
    assert split(encode(arrow(["Hello", " world"]))) == [[15496], [996]], "only the first of each call is checked"
    with pytest.raises(UserError, match=r"a document that begins ' world' are not the reference's.*--overwrite"):
        encode(arrow([" world", "Hello"]))
