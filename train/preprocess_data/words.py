"""GPT-2's ids of many texts at once: where its rule cuts them into words, and the ids of each distinct word.

tiktoken goes through a text word by word: one search by its rule for the next cut, and one look into the vocabulary,
if need be with merges behind it. A word that has just been there costs all of that again. So here

1. each character is classified by the kinds that the rule knows (blank, letter, number, other), and the texts are cut
   where the rule cuts, which is where the kind changes but for two refinements (`word_starts`);
2. Arrow numbers the distinct words, and tiktoken gives the ids of each;
3. the ids are put together again in the texts' order.

What a letter is, tiktoken's own engine says (`kinds`), so there is no second opinion on Unicode. All of it are array
operations, which leave the interpreter to other threads.
"""

from collections.abc import Sequence
from functools import cache
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tiktoken

from train.data.token_file import END_OF_TEXT, END_OF_TEXT_STRING, VOCABULARY_SIZE, gpt2_ranks

PLANE = 1 << 16
SURROGATES = slice(0xD800, 0xE000)
# The kinds of characters, ordered so that those of words are the ones between BLANK and END.
HALF, BLANK, LETTER, NUMBER, OTHER, END = range(6)
RULES = {BLANK: r"\s", LETTER: r"\p{L}", NUMBER: r"\p{N}"}
LINE_FEED = "\n".encode("utf-16-le")
SPACE, APOSTROPHE = map(ord, " '")
ENDINGS = ("s", "d", "m", "t", "ll", "ve", "re")

# A character that Unicode keeps from all texts, so that it can stand between words; the one token of its own piece.
SEPARATOR = "\uffff"
SEPARATOR_ID = VOCABULARY_SIZE
SPECIAL = {END_OF_TEXT_STRING: END_OF_TEXT}  # without one, tiktoken looks for the empty text, everywhere


class Encoded(NamedTuple):
    ids: np.ndarray  # (tokens,) uint32: of all texts, one after another
    lengths: np.ndarray  # (texts,) int64: tokens of each


@cache
def kinds(plane: int) -> np.ndarray:
    """(65536,) uint8: the kind of each character of one of Unicode's planes; `HALF` is half of one beyond plane 0.

    An encoding whose words are the characters of one kind leaves all others out, so what it gives back is their list.
    """
    table = np.full(PLANE, OTHER, dtype=np.uint8)
    characters = np.arange(plane * PLANE, (plane + 1) * PLANE, dtype="<u4")
    if plane == 0:
        table[SURROGATES] = HALF
        characters = np.delete(characters, SURROGATES)
    text = characters.tobytes().decode("utf-32-le")
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    for kind, rule in RULES.items():
        encoding = tiktoken.Encoding("kind", pat_str=rule, mergeable_ranks=single_bytes, special_tokens=SPECIAL)
        of_this_kind = bytes(encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint8))
        table[np.frombuffer(of_this_kind.decode().encode("utf-32-le"), dtype="<u4") - plane * PLANE] = kind
    return table


def kinds_of(codes: np.ndarray) -> np.ndarray:
    """(n,) UTF-16 → (n,) the kind of the character that each is, or is half of."""
    kind = kinds(0)[codes]
    halves = np.flatnonzero(kind == HALF)
    if halves.size:
        first, second = codes[halves].astype(np.uint32).reshape(-1, 2).T
        characters = 0x10000 + ((first & 0x3FF) << 10 | second & 0x3FF)
        for plane in np.unique(characters // PLANE):
            here = characters // PLANE == plane
            kind[halves[np.repeat(here, 2)]] = np.repeat(kinds(int(plane))[characters[here] % PLANE], 2)
    return kind


def word_starts(codes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Where GPT-2's words begin.

    Its rule is `'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s`: a word is a run of
    one kind. (1) Of the blanks before a word the last one is cut from the others, and a space goes with the word.
    (2) An apostrophe that begins a word, with no space before it, and one of the endings behind it are a word.

    Args:
        codes: (n,) UTF-16 of all texts, behind each of which there is one more line feed.
        ends: the places of these line feeds; each counts as a word.

    Returns:
        The places in `codes`, in order.
    """
    kind = kinds_of(codes)
    kind[ends] = END
    starts = np.empty(codes.size, dtype=bool)
    np.not_equal(kind[1:], kind[:-1], out=starts[1:])
    starts[0] = True
    starts[ends] = True  # those of empty texts are no change

    behind_blanks = 1 + np.flatnonzero((kind[:-1] == BLANK) & (kind[1:] > BLANK) & (kind[1:] < END))
    starts[behind_blanks - 1] = True
    starts[behind_blanks] = codes[behind_blanks - 1] != SPACE

    apostrophes = np.flatnonzero(codes == APOSTROPHE)
    apostrophes = apostrophes[starts[apostrophes]]
    following = codes[apostrophes + 1], codes.take(apostrophes + 2, mode="clip")
    for ending in ENDINGS:
        matches = np.logical_and.reduce([code == ord(letter) for code, letter in zip(following, ending, strict=False)])
        starts[apostrophes[matches] + 1] = False
        starts[apostrophes[matches] + 1 + len(ending)] = True
    return np.flatnonzero(starts)


@cache
def words_encoding() -> tiktoken.Encoding:
    """GPT-2's for words that are cut already and have a `SEPARATOR` between them."""
    return tiktoken.Encoding(
        "gpt2_words",
        pat_str=f"[^{SEPARATOR}]+|{SEPARATOR}",
        mergeable_ranks=gpt2_ranks() | {SEPARATOR.encode(): SEPARATOR_ID},
        special_tokens=SPECIAL,
    )


def encode_by_words(texts: Sequence[str]) -> Encoded:
    """GPT-2's ids of texts in none of which there is a `SEPARATOR`."""
    contents = [text.encode("utf-16-le") for text in texts]
    content = b"".join(chain.from_iterable(zip(contents, repeat(LINE_FEED))))
    ends = np.cumsum(np.fromiter(map(len, contents), dtype=np.int64, count=len(contents)) // 2 + 1) - 1
    starts = word_starts(np.frombuffer(content, dtype="<u2"), ends)
    offsets = np.append(2 * starts, len(content)).astype(np.int32)
    words = pa.Array.from_buffers(pa.binary(), starts.size, [None, pa.py_buffer(offsets), pa.py_buffer(content)])
    numbered = words.dictionary_encode()
    number = numbered.indices.to_numpy()

    distinct = pa.ListArray.from_arrays(pa.array([0, len(numbered.dictionary)], pa.int32()), numbered.dictionary)
    separated = pc.binary_join(distinct, SEPARATOR.encode("utf-16-le"))[0].as_py().decode("utf-16-le") + SEPARATOR
    ids = words_encoding().encode_to_numpy(separated, disallowed_special=())
    behind = np.flatnonzero(ids == SEPARATOR_ID).astype(np.int32)
    first = np.append(np.int32(0), behind[:-1] + 1)

    lengths = (behind - first)[number]
    end_words = np.searchsorted(starts, ends)
    lengths[end_words] = 0
    written = np.cumsum(lengths, dtype=np.int32)
    places = np.repeat(first[number] - (written - lengths), lengths)
    places += np.arange(places.size, dtype=np.int32)
    return Encoded(ids[places], np.diff(written[end_words], prepend=0).astype(np.int64))
