import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from train.data import token_file as tokens
from train.data import tokenizer
from train.data.batches import TrainBatches
from train.data.token_file import TokenFile, TokenWriter, open_tokens, sidecar_path, write_token_file
from train.data.tokenizer import (
    END_OF_TEXT,
    VOCABULARY_SIZE,
    gpt2_encoding,
    gpt2_ranks,
    gpt2_tokenizer,
    gpt2_vocab_and_merges,
)
from train.utils.errors import UserError

NASTY = [
    "",
    " ",
    "\x00",
    "a\x00\x00b",
    "one\r\ntwo\rthree\n\nfour\n",
    "\n" * 999,
    " " * 1000 + "x",
    "\t \t x\u00a0\u2003y\u200b",
    "👩‍👩‍👧‍👦🏳️‍🌈 naïve café ﬁ ǅ",
    "日本語のテキスト العربية हिन्दी",
    "I'll we've they're she'd I'm don't 'S'T it's' ''s",
    "١٢٣ ½ Ⅷ 1234567890 3.14e-10",
    "\ufeff\ufffd\U0010ffff\ue000",
    "a" * 5000,
    "=" * 5000,
    "e\u0301\u0301\u0301",
]


def random_strings(count: int) -> list[str]:
    rng = random.Random(0)
    alphabets = [
        "abcdefghij ETAOIN'\"",
        " \t\n\r\x0b\x0c\u00a0\u2028",
        "".join(NASTY),
        "".join(map(chr, range(0x20, 0x250))),
        "".join(chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000),
        "".join(map(chr, range(0x1F300, 0x1FA00))),
    ]
    return ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(60))) for _ in range(count)]


def write_tokens(path: Path, ids: list[int], vocabulary_size: int = VOCABULARY_SIZE) -> Path:
    write_token_file(path, [(np.array(ids), 1)], vocabulary_size, {})
    return path


def test_the_vocabulary_is_openais_byte_for_byte() -> None:
    # The digests that tiktoken demands of OpenAI's two files.
    vocab, merges = gpt2_vocab_and_merges()
    encoder_json = json.dumps(vocab).encode()
    vocab_bpe = ("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges)).encode()
    assert len(merges) == 50_000
    assert (
        hashlib.sha256(encoder_json).hexdigest() == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    )
    assert hashlib.sha256(vocab_bpe).hexdigest() == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def test_encoding_is_gpt2s() -> None:
    encoding = gpt2_encoding()
    assert encoding is gpt2_encoding()
    assert encoding.n_vocab == VOCABULARY_SIZE
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding.eot_token == END_OF_TEXT
    assert END_OF_TEXT not in encoding.encode_ordinary("<|endoftext|>")


def test_a_changed_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gpt2.tiktoken").write_bytes(b"IQ== 0\n")
    monkeypatch.setattr(tokenizer, "files", lambda package: tmp_path)
    gpt2_ranks.cache_clear()
    with pytest.raises(UserError) as error:
        gpt2_ranks()
    assert str(tmp_path / "data" / "gpt2.tiktoken") in str(error.value)
    assert tokenizer.RANKS_SHA256 in str(error.value)
    assert hashlib.sha256(b"IQ== 0\n").hexdigest() in str(error.value)


def test_importing_is_light() -> None:
    check = "import sys, train.data.token_file; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_end_of_text_inside_a_text() -> None:
    text = "a<|endoftext|>b"
    ordinary = gpt2_encoding().encode_ordinary(text)
    assert gpt2_tokenizer()(text)["input_ids"] == [64, END_OF_TEXT, 65]
    assert gpt2_tokenizer()(text, split_special_tokens=True)["input_ids"] == ordinary


def test_a_lone_surrogate() -> None:
    assert gpt2_encoding().encode_ordinary("a\ud800") == gpt2_encoding().encode_ordinary("a\ufffd")
    with pytest.raises(TypeError):
        gpt2_tokenizer()("a\ud800")


def test_the_saved_tokenizer_equals_tiktoken(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    gpt2_tokenizer(model_max_length=256).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert (len(loaded), loaded.model_max_length) == (VOCABULARY_SIZE, 256)
    assert loaded.pad_token_id == loaded.eos_token_id == loaded.bos_token_id == END_OF_TEXT
    padded = loaded(["Hello world", "Hello"], padding=True)
    assert padded["input_ids"] == [[15496, 995], [15496, END_OF_TEXT]]
    assert padded["attention_mask"] == [[1, 1], [1, 0]]
    texts = NASTY + random_strings(20_000)
    expected = [gpt2_encoding().encode_ordinary(text) for text in texts]
    # Longer than a model's context on purpose, and no warning about it.
    assert loaded(texts, verbose=False)["input_ids"] == expected
    assert loaded.batch_decode(expected) == texts


def test_tokenizers_are_not_shared() -> None:
    gpt2_tokenizer().model_max_length = 7
    assert gpt2_tokenizer().model_max_length == 1024


def test_write_token_file(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"

    def pieces() -> Iterator[tuple[np.ndarray, int]]:
        yield np.array([1, 2, END_OF_TEXT]), 1
        yield np.array([], dtype=np.uint16), 0
        yield np.array([END_OF_TEXT, 258, END_OF_TEXT], dtype=np.uint16), 2
        assert not path.exists()

    sidecar = write_token_file(path, pieces(), VOCABULARY_SIZE, {"split": "hash"}).to_json()
    assert path.read_bytes() == b"\1\0\2\0\x50\xc4\x50\xc4\2\1\x50\xc4"
    assert json.loads((tmp_path / "train.json").read_text()) == sidecar
    assert sidecar == {
        "dtype": "uint16",
        "tokens": 6,
        "documents": 3,
        "max_token_id": END_OF_TEXT,
        "vocabulary_size": VOCABULARY_SIZE,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "samples_sha256": tokens.digest_of_samples(path),
        "split": "hash",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "train.json"}


def test_a_writer_resumes_after_its_statistics(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    with TokenWriter(path, VOCABULARY_SIZE) as writer:
        writer.write(np.array([1, 2, END_OF_TEXT]), documents=1)
        statistics = writer.statistics
        writer.write(np.array([3]))  # on the disk, and in no statistics
    with TokenWriter(path, VOCABULARY_SIZE, statistics) as writer:
        assert writer.statistics == statistics
        writer.write(np.array([7, END_OF_TEXT]), documents=1)
        last = writer.statistics
    assert np.fromfile(path, dtype="<u2").tolist() == [1, 2, END_OF_TEXT, 7, END_OF_TEXT]
    assert (last.tokens, last.documents) == (5, 2)
    assert last.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"\0\0" + path.read_bytes()[2:])
    with pytest.raises(UserError, match=r"train\.bin was changed since it was written"):
        TokenWriter(path, VOCABULARY_SIZE, last)
    path.write_bytes(b"\0\0")
    with pytest.raises(UserError, match=r"train\.bin has 2 bytes, and 10 were written"):
        TokenWriter(path, VOCABULARY_SIZE, last)


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "train.bin", [0, 70_000, 65_535], vocabulary_size=100_000)
    assert path.stat().st_size == 12
    tokens_on_disk = open_tokens(path, 100_000)
    assert tokens_on_disk.read(0, 9).tolist() == [0, 70_000, 65_535]


def test_a_failed_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="50257"):
        write_tokens(tmp_path / "train.bin", [1, VOCABULARY_SIZE])
    assert not list(tmp_path.iterdir())

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError("full")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="full"):
        write_tokens(tmp_path / "train.bin", [1])
    assert not list(tmp_path.iterdir())


def test_a_crash_never_leaves_a_file_with_another_files_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tokens(tmp_path / "train.bin", [1, 2, 3])
    seen = []
    real_write_json = tokens.write_json

    def spy(target: Path, value: object) -> None:
        seen.append(path.exists())
        real_write_json(target, value)
        seen.append(path.exists())

    monkeypatch.setattr(tokens, "write_json", spy)
    write_tokens(path, [4, 5])
    assert seen == [False, False]
    assert open_tokens(path, VOCABULARY_SIZE).read(0, 9).tolist() == [4, 5]


def test_a_bare_file_is_nanogpts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.bin"
    np.array([5, 50_000, 7], dtype=np.uint16).tofile(path)
    monkeypatch.setattr(tokens, "SCAN_CHUNK", 2)
    opened = open_tokens(str(path), vocab_size=50_001)
    assert (opened.path, opened.sidecar, len(opened), opened.read(0, 9).tolist()) == (path, None, 3, [5, 50_000, 7])
    with pytest.raises(UserError, match=r"train\.bin holds token id 50000.*vocab_size is 50000.*50001"):
        open_tokens(path, vocab_size=50_000)


def test_the_sidecar_spares_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tokens(tmp_path / "train.bin", [5, 900])
    monkeypatch.delattr(tokens, "scan_max_token_id")
    opened = open_tokens(path, VOCABULARY_SIZE)
    assert opened.sidecar is not None
    assert opened.sidecar.tokens == len(opened) == 2
    with pytest.raises(UserError, match="token id 900"):
        open_tokens(path, 900)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no token file at .*missing\.bin.*preprocess_data"):
        open_tokens(tmp_path / "missing.bin", VOCABULARY_SIZE)
    with pytest.raises(UserError, match="is a folder"):
        open_tokens(tmp_path, VOCABULARY_SIZE)
    (tmp_path / "empty.bin").touch()
    with pytest.raises(UserError, match=r"empty\.bin is empty"):
        open_tokens(tmp_path / "empty.bin", VOCABULARY_SIZE)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"odd\.bin has 3 bytes, which is not a multiple of 2"):
        open_tokens(tmp_path / "odd.bin", VOCABULARY_SIZE)
    path = write_tokens(tmp_path / "train.bin", [1, 2])
    with pytest.raises(UserError, match=r"train\.json is not a token file: give the \.bin"):
        open_tokens(sidecar_path(path), VOCABULARY_SIZE)
    with path.open("ab") as file:
        file.write(b"\1\0")
    with pytest.raises(UserError, match=r"has 3 tokens, but its sidecar .*train\.json says 2"):
        open_tokens(path, VOCABULARY_SIZE)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "Expecting"),
        ("[]", r"its content is \[\], not an object"),
        ("{}", '"dtype" is missing'),
        ('{"dtype": "float32"}', "\"dtype\" is 'float32'"),
        ('{"dtype": "uint16", "tokens": true}', '"tokens" is True'),
        ('{"dtype": "uint16", "tokens": 1, "max_token_id": "9"}', "\"max_token_id\" is '9'"),
    ],
)
def test_a_corrupt_sidecar(tmp_path: Path, content: str, fault: str) -> None:
    path = write_tokens(tmp_path / "train.bin", [1])
    sidecar_path(path).write_text(content)
    with pytest.raises(UserError, match=rf"train\.json.*{fault}.*move the file away"):
        open_tokens(path, VOCABULARY_SIZE)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("offset", [0, 1_048_575, 5_000_000 * 2 * 7 // 65, -1_048_576, -1])
def test_a_file_is_sampled_at_every_start(tmp_path: Path, offset: int) -> None:
    path = write_tokens(tmp_path / "train.bin", [7] * 5_000_000)
    open_tokens(path, VOCABULARY_SIZE)
    flip(path, offset)
    with pytest.raises(UserError, match=r"train\.bin is not the file that its sidecar .*train\.json.*--overwrite"):
        open_tokens(path, VOCABULARY_SIZE)


def test_a_sidecar_of_an_older_version_stays_readable(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "train.bin", [1, 2, 3])
    sidecar = json.loads(sidecar_path(path).read_text())
    del sidecar["samples_sha256"]
    sidecar_path(path).write_text(json.dumps(sidecar))
    assert open_tokens(path, VOCABULARY_SIZE).read(0, 9).tolist() == [1, 2, 3]


def test_a_bare_file_is_known_by_its_content(tmp_path: Path) -> None:
    path, other = tmp_path / "train.bin", tmp_path / "other.bin"
    np.arange(3_000_000, dtype=np.uint16).tofile(path)
    other.write_bytes(path.read_bytes())
    identity = open_tokens(path, 65_536).identity
    assert identity == open_tokens(other, 65_536).identity
    flip(other, 3)
    assert identity != open_tokens(other, 65_536).identity
    assert identity["sha256"] is None


def test_a_file_that_is_cut_while_it_is_read_is_a_sentence(tmp_path: Path) -> None:
    """A mapped file would end the process by SIGBUS."""
    path = tmp_path / "train.bin"
    np.arange(20_000, dtype=np.uint16).tofile(path)
    tokens = open_tokens(path, VOCABULARY_SIZE)
    batches = TrainBatches(tokens, 1000, 1, seed=0)
    os.truncate(path, 5000)
    assert tokens.read(0, 2500).tolist() == list(range(2500))
    beyond = next(step for step in range(19) if batches.block_indices(step)[0] == 5)
    with pytest.raises(UserError, match=r"train\.bin was truncated while it was read: it had 20,000 tokens and ends"):
        batches.micro_batch(beyond, 0, 0, 1, 1)


def test_a_disk_that_fails_is_a_sentence() -> None:
    """This file cannot be read at its beginning, where no process has memory: EIO."""
    tokens = TokenFile(Path("train.bin"), os.open("/proc/self/mem", os.O_RDONLY), np.dtype("<u2"), 10, None, "")
    with pytest.raises(UserError, match=r"^train\.bin cannot be read: Input/output error$"):
        tokens.read(0, 10)
    os.close(tokens.descriptor)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a pipe or a device, not a token file"):
        open_tokens(path, VOCABULARY_SIZE)
