"""Documents that nobody would write and every crawl has: none crashes, each is counted, all equal tiktoken's."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.preparations import prepare, refused, write_compressed, write_lines, write_parquet
from train.data.tokenizer import END_OF_TEXT, gpt2_encoding

TOKENIZERS = ("tiktoken", "gigatoken")
MILLION = 1_000_000

ODD = [
    "",
    "x" * MILLION,
    " " * MILLION,
    "\n" * MILLION,
    "7" * 100_000,
    "!" * 100_000,
    "ab" * 50_000 + " " + "é" * 50_000,
    "\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}" * 50_000,
    "<|endoftext|>",
    "a <|endoftext|> b<|endoftext|><|endoftext|>",
    "\0",
    "a\0b" * 100,
    "a\r\nb\nc\rd\n\r\r\n\r",
    "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e|",  # line ends to Unicode, not to a file
    "\ufeffa byte order mark",
    "\ufffd",
    "e\u0301\u0301\u0301 \u202eright to left\u202c \u200d\u200b",
    "\U0010ffff\U00010000\ue000\uffff\ufdd0",
    " leading and trailing \t ",
    "I'll we've it's 'S don't'd",
    "٣٤ Ⅷ ½ ²",
    "日本語" * 20_000,
    '"\\"\\\\/\b\f\t',
    "null",
    "{}",
    '{"text": "a"}',
]
LONE_SURROGATES = [
    "a\ud800b",
    "\udfff",
    "\udc4d\ud83d",
    "\ud83d\udc4d",
    "\ud83d",
    "x\ud83d\ud83d\udc4d",
    "\udfff" * 99,
]

ALPHABET = [
    *" \n\t\r\0'.!",
    "  ",
    "\n\n",
    "s",
    "'s",
    "é",
    "日",
    "٣",
    "½",
    "\u0301",
    "\u200d",
    "\u2028",
    "\x85",
    "\ufeff",
]
ALPHABET += [
    "<|endoftext|>",
    "<|",
    "|>",
    "\N{THUMBS UP SIGN}",
    "\U0010ffff",
    "A",
    "9",
    "-",
    "_",
    "\u3000",
    "\xa0",
    "ß",
]


def nasty(number: int, seed: int, alphabet: list[str]) -> list[str]:
    rng = random.Random(seed)
    drawn = []
    for _ in range(number):
        few = rng.choices(alphabet, k=rng.randrange(1, 6))
        drawn.append("".join(rng.choices(few, k=rng.choice((0, 1, 2, 7, 60, 400, 3000)))))
    return drawn


def prepared(folder: Path, *words: object) -> tuple[list[list[int]], dict[str, dict[str, Any]]]:
    """The ids of every document in the source's order, and the sidecars: the split is undone.

    By --split nanogpt validation has the first entries of the permutation, in its order, and training the rest of the
    rows in theirs. `<|endoftext|>` is only where a document ends, or these are not the documents.
    """
    out = folder / "out"
    prepare(*words, "--split=nanogpt", "--val_fraction=0.3", "--num_proc=2", f"--out_dir={out}", cwd=folder)
    sidecars = {name: json.loads((out / f"{name}.json").read_text()) for name in ("train", "val")}
    parts = {}
    for name, sidecar in sidecars.items():
        ids = np.fromfile(out / f"{name}.bin", dtype=np.uint16)
        assert ids[-1] == END_OF_TEXT
        parts[name] = [part.tolist() for part in np.split(ids, np.flatnonzero(ids == END_OF_TEXT) + 1)[:-1]]
        assert len(parts[name]) == sidecar["documents"]
    rows = sum(len(part) for part in parts.values())
    permutation = np.random.default_rng(2357).permutation(rows)
    places = [*permutation[: len(parts["val"])].tolist(), *sorted(permutation[len(parts["val"]) :].tolist())]
    documents: list[list[int]] = [[]] * rows
    for row, ids_of_row in zip(places, [*parts["val"], *parts["train"]], strict=True):
        documents[row] = ids_of_row
    assert all(sidecar["rows"] == rows for sidecar in sidecars.values())
    return documents, sidecars


def as_tiktoken(text: str) -> list[int]:
    return [*gpt2_encoding().encode_ordinary(text), END_OF_TEXT]


def replaced(text: str) -> str:
    """Surrogate pairs become their character, lone surrogates U+FFFD, as in tiktoken."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def check(documents: list[list[int]], sidecars: dict[str, dict[str, Any]], texts: list[str]) -> None:
    wrong = [row for row, text in enumerate(texts) if documents[row] != as_tiktoken(text)]
    assert not wrong, f"row {wrong[0]} and {len(wrong) - 1} more: {texts[wrong[0]][:60]!r} of {len(texts[wrong[0]])}"
    assert len(documents) == len(texts)

    def total(key: str) -> int:
        return sum(sidecar[key] for sidecar in sidecars.values())

    clean = [replaced(text) for text in texts]
    assert total("documents") == len(texts)
    assert total("tokens") == sum(map(len, documents))
    assert total("empty_documents") == sum(not text for text in texts)
    assert total("documents_with_replacement_character") == sum("\ufffd" in text for text in clean)
    assert total("text_bytes") == sum(len(text.encode()) for text in clean)


@pytest.mark.parametrize(
    ("tokenizer", "suffix"),
    [
        ("tiktoken", ".zst"),
        ("gigatoken", ".gz"),
        pytest.param("tiktoken", "", marks=pytest.mark.slow),
        pytest.param("gigatoken", "", marks=pytest.mark.slow),
    ],
)
def test_json_lines(tmp_path: Path, tokenizer: str, suffix: str) -> None:
    texts = [*ODD, *LONE_SURROGATES, *nasty(300, 1, [*ALPHABET, "\ud800", "\udc4d", "\ud83d"])]
    write_lines(tmp_path / f"a.jsonl{suffix}", texts)
    check(*prepared(tmp_path, "--dataset=json", "--data_files=a.jsonl*", f"--tokenizer={tokenizer}"), texts)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_json_lines_that_are_not_escaped(tmp_path: Path, tokenizer: str) -> None:
    """UTF-8 as it is, characters that some take for line ends among it, and several chunks of 10 MiB."""
    texts = [*ODD, *nasty(300, 2, ALPHABET)]
    texts += ["".join(random.Random(i).choices("\N{THUMBS UP SIGN}é日a ", k=60_000)) for i in range(60)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = "".join(line + "\n" for line in lines).encode()
    assert len(content) > 10 << 20
    (tmp_path / "a.jsonl").write_bytes(content)
    check(*prepared(tmp_path, "--dataset=json", "--data_files=a.jsonl", f"--tokenizer={tokenizer}"), texts)


def test_blank_lines_nulls_and_line_ends(tmp_path: Path) -> None:
    content = b'\n\n{"text": "a"}\r\n\r\n{"n": 1, "text": null}\n  \n\t\r\n{"text": "\\r\\n b"}\r\n{"text": ""}\n\n'
    content += b'{"text": "c"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    write_compressed(tmp_path / "b.jsonl.gz", b"\n\n")
    write_compressed(tmp_path / "c.jsonl.gz", content)
    texts = ["a", "", "\r\n b", "", "c"] * 2
    check(*prepared(tmp_path, "--dataset=json", "--data_files=*.jsonl*"), texts)


def test_two_gzip_members_are_one_file(tmp_path: Path) -> None:
    members = [gzip.compress(f'{{"text": "{word}"}}\n'.encode()) for word in ("one", "two", "three")]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(members))
    check(*prepared(tmp_path, "--dataset=json", "--data_files=a.jsonl.gz"), ["one", "two", "three"])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_parquet(tmp_path: Path, tokenizer: str) -> None:
    texts = [*ODD, *nasty(300, 3, ALPHABET)]
    write_parquet(tmp_path / "a.parquet", [*texts, None, "end", None], row_group_size=50)
    words = ["--dataset=parquet", "--data_files=a.parquet", f"--tokenizer={tokenizer}"]
    check(*prepared(tmp_path, *words), [*texts, "", "end", ""])


BROKEN = [
    b"a\xed\xa0\x80b",  # a surrogate as some write it
    b"\xff\xfe",
    b"caf\xe9 au lait",
    b"cut \xf0\x9f\x91",
    b"\xf0\x9f\x91\xf0\x9f\x91\x8d",
    b"\xc0\x80 \xf5\x80\x80\x80 \x80",
    b"ends well \xf0\x9f\x91\x8d",
]


def strings_as_they_are(contents: list[bytes], kind: pa.DataType, offset: str) -> pa.Array:
    ends = np.cumsum([0, *map(len, contents)], dtype=offset)
    buffers = [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(contents))]
    return pa.Array.from_buffers(kind, len(contents), buffers)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(("kind", "offset"), [(pa.string(), "<i4"), (pa.large_string(), "<i8")])
def test_parquet_that_is_not_utf_8(tmp_path: Path, tokenizer: str, kind: pa.DataType, offset: str) -> None:
    rng = random.Random(5)
    bytes_of = [*BROKEN, *(rng.randbytes(rng.randrange(300)) for _ in range(200))]
    column = strings_as_they_are(bytes_of, kind, offset)
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    texts = [content.decode("utf-8", "replace") for content in bytes_of]
    check(*prepared(tmp_path, "--dataset=parquet", "--data_files=a.parquet", f"--tokenizer={tokenizer}"), texts)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_text_that_is_not_utf_8(tmp_path: Path, tokenizer: str) -> None:
    rng = random.Random(6)
    long = (
        "\N{THUMBS UP SIGN} é".encode() * 500_000
    )  # 4 MB, cut somewhere within a character by whoever reads in parts
    bytes_of = [*BROKEN, b"", b"a\0b\r\nc\rd\n\re", long, *(rng.randbytes(rng.randrange(300)) for _ in range(50))]
    for number, content in enumerate(bytes_of):
        (tmp_path / f"{number:03}.txt").write_bytes(content)
    texts = [content.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n") for content in bytes_of]
    check(*prepared(tmp_path, "--dataset=text", "--data_files=*.txt", f"--tokenizer={tokenizer}"), texts)


@pytest.mark.slow  # tests/test_encoders.py has them without a whole preparation
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_million_blanks_before_a_word(tmp_path: Path, tokenizer: str) -> None:
    """tiktoken itself gives up ("Max stack size exceeded"). By GPT-2's rule the last blank of a run is left to what is
    behind it: a space becomes part of the word, any other is a piece of its own."""
    documents_in_pieces = [["plain"]]
    for blank in (" ", "\n", "\t \r\n", "\u3000"):
        blanks = blank * (MILLION // len(blank))
        documents_in_pieces += [[blanks, " word"], [f"begins {blanks}", " word"], [blanks, "\n", "word"]]
    texts = ["".join(pieces) for pieces in documents_in_pieces]
    write_lines(tmp_path / "a.jsonl", texts)
    documents, sidecars = prepared(tmp_path, "--dataset=json", "--data_files=a.jsonl", f"--tokenizer={tokenizer}")
    for row, pieces in enumerate(documents_in_pieces):
        expected = [token for piece in pieces for token in gpt2_encoding().encode_ordinary(piece)]
        assert documents[row] == [*expected, END_OF_TEXT], row
    assert len(documents) == len(texts)
    assert sum(sidecar["text_bytes"] for sidecar in sidecars.values()) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "a.jsonl"),
        (b'{"text": "a"}\n["text"]\n', '["text"]'),
        (b'{"text": "a"}\n{"text": 5}\n', "column text"),
        (b'{"text": "a"}\n{"texts": "b"}\n', "texts"),
        (b"\x1f\x8b\x08 no gzip", "a.jsonl"),
    ],
)
def test_lines_that_are_no_documents(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert named in refused("--dataset=json", "--data_files=a.jsonl", "--out_dir=out", cwd=tmp_path)
