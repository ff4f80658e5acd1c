"""GPT-2's words, found without tiktoken's rule, are the rule's."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from train.data.token_file import gpt2_encoding
from train.preprocess_data import words
from train.preprocess_data.words import encode_by_words

LENGTH = 5
# A character of each part that the rule tells apart: the blank that goes with a word and one that does not, the
# apostrophe, two letters of its endings, a number, something else.
ALPHABET = " \n'st1!"
PLANES = (0, 1, 2, 14)  # 3 is as 2, and beyond 14 are characters for private use


def assert_reference(texts: Sequence[str]) -> None:
    encoded = encode_by_words(texts)
    assert encoded.ids.size == encoded.lengths.sum()
    found = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
    expected = gpt2_encoding().encode_ordinary_batch(list(texts), num_threads=1)
    wrong = [text for text, ids, wanted in zip(texts, found, expected, strict=True) if ids.tolist() != wanted]
    assert not wrong, wrong[:10]


def test_every_short_text() -> None:
    assert_reference(["".join(letters) for size in range(LENGTH + 1) for letters in product(ALPHABET, repeat=size)])


def test_endings_of_english_words() -> None:
    endings = ["s", "d", "m", "t", "ll", "ve", "re", "l", "v", "r", "el", "S", "LL"]
    before, behind = ["", "x", "1", "!", "'", " ", "x ", "\n", "'s"], ["", *"sthlyer1!' \n", "'s"]
    assert_reference([f"{first}'{ending}{last}" for first, ending, last in product(before, endings, behind)])


@pytest.mark.parametrize("plane", PLANES)
def test_every_kind_of_character(plane: int) -> None:
    """Every 23rd character beside a letter, a number, a blank, something else, an apostrophe and itself."""
    characters = [chr(code) for code in range(plane << 16, (plane + 1) << 16, 23) if not 0xD800 <= code < 0xE000]
    assert_reference([f"a{one}1{one}.{one}\n {one}{one} '{one}  {one}" for one in characters])


def test_ends_of_documents_end_words() -> None:
    assert_reference(["a", "b", "", "", "'", "s", " ", " ", "x  ", "\n", "\n", "\nend'", "ll"])
    assert_reference([""])


def test_a_kind_comes_from_tiktokens_engine() -> None:
    table = words.kinds(0)
    assert [int(table[ord(one)]) for one in "\u3000\x1cé٣½'_"] == [
        words.BLANK, words.OTHER, words.LETTER, words.NUMBER, words.NUMBER, words.OTHER, words.OTHER,
    ]  # fmt: skip
    assert words.kinds(1)[ord("\N{MATHEMATICAL BOLD CAPITAL A}") - 0x10000] == words.LETTER
