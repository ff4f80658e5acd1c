"""GPT-2's tokenizer without a network, and the files of token ids that training reads.

A token file is nanoGPT's: token ids one after another, little-endian `uint16` (`uint32` when the vocabulary needs
it), no header. Beside `train.bin` lies `train.json`, the sidecar, which says what the ids are and where they came
from; a file without one is read as bare `uint16`, so whatever nanoGPT prepared opens here, and the other way round.
"""

import binascii
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # GPT-2's rule for cutting text into words

from train.utils.errors import UserError
from train.utils.files import atomic_write, write_json

if TYPE_CHECKING:
    from transformers import GPT2Tokenizer

END_OF_TEXT = 50256
VOCABULARY_SIZE = 50257
END_OF_TEXT_STRING = "<|endoftext|>"
TOKENIZER_NAME = "gpt2"
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

SCAN_CHUNK = 1 << 24  # ids read at once when a bare file is scanned: 32 MiB of uint16


@cache
def gpt2_ranks() -> dict[bytes, int]:
    """The packaged ranks, token bytes to id, their SHA-256 checked (tiktoken's reader would leave a copy in /tmp)."""
    resource = files("train") / "data" / "gpt2.tiktoken"
    try:
        content = resource.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read GPT-2's vocabulary {resource}: {error.strerror}; reinstall gpt2flash") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != RANKS_SHA256:
        raise UserError(
            f"GPT-2's vocabulary {resource} has SHA-256 {digest}, not {RANKS_SHA256}: the file was changed; "
            "reinstall gpt2flash"
        )
    pairs = (line.split() for line in content.splitlines())
    return {binascii.a2b_base64(token): int(rank) for token, rank in pairs}


@cache
def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding, equal to `tiktoken.get_encoding("gpt2")`, which needs the network."""
    return tiktoken.Encoding(
        TOKENIZER_NAME,
        explicit_n_vocab=VOCABULARY_SIZE,
        pat_str=r50k_pat_str,
        mergeable_ranks=gpt2_ranks(),
        special_tokens={END_OF_TEXT_STRING: END_OF_TEXT},
    )


def merge_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made `token`: apply to its bytes every merge that is older than it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], VOCABULARY_SIZE))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    left, right = parts
    return left, right


@cache
def gpt2_vocab_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """OpenAI's `encoder.json` and `vocab.bpe`, rebuilt from the ranks.

    transformers' `TikTokenConverter` lists every way to split a token as a merge; these are the 50,000 that exist.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = gpt2_ranks()
    alphabet = bytes_to_unicode()

    def printable(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocab = {printable(token): rank for token, rank in ranks.items()} | {END_OF_TEXT_STRING: END_OF_TEXT}
    pairs = (merge_pair(token, ranks) for token in ranks if len(token) > 1)
    return vocab, [(printable(left), printable(right)) for left, right in pairs]


def gpt2_tokenizer(model_max_length: int = 1024) -> "GPT2Tokenizer":
    """transformers' GPT-2 tokenizer, built without the network; `<|endoftext|>` also pads, as GPT-2 has no pad token.

    Its ids equal `gpt2_encoding().encode_ordinary` with two exceptions. The literal text `<|endoftext|>` becomes
    the one id 50256 (transformers' default; `split_special_tokens=True` in the call makes it ordinary text, as it
    is to `encode_ordinary`). And a lone surrogate, which tiktoken reads as U+FFFD, is a TypeError.

    Every call gives a new object, for tokenizers are mutable; what is slow to compute is kept.
    """
    from transformers import GPT2Tokenizer

    vocab, merges = gpt2_vocab_and_merges()
    return GPT2Tokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]  # annotated as strings; what it hands on to wants pairs
        pad_token=END_OF_TEXT_STRING,
        model_max_length=model_max_length,
    )


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """Little-endian `uint16` for as long as every id fits, as nanoGPT's; else `uint32`."""
    return np.dtype("<u2") if vocabulary_size <= 65_535 else np.dtype("<u4")


def sidecar_path(path: Path) -> Path:
    return path.with_suffix(".json")


class TokenAppender:
    """Appends to one token file and keeps account of what is in it.

    Args:
        path: the file; it is made, or with `done` taken up where that account ends: what is behind it is cut off.
        vocabulary_size: ids must be below it.
        done: the `account()` of an earlier appender on this file.

    Raises:
        UserError: the file is not what `done` says.
    """

    def __init__(self, path: Path, vocabulary_size: int, done: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.vocabulary_size = vocabulary_size
        self.dtype = token_dtype(vocabulary_size)
        self.tokens = self.documents = 0
        self.max_token_id = -1
        self._sha256 = hashlib.sha256()
        if done is not None:
            self.tokens, self.documents, self.max_token_id = done["tokens"], done["documents"], done["max_token_id"]
            self._take_up(done["sha256"])
        self._file = path.open("ab" if done else "wb")

    def _take_up(self, sha256: str) -> None:
        size = self.tokens * self.dtype.itemsize
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < size:
            raise UserError(f"{self.path} has {found} bytes, and {size} were written: start anew with --overwrite")
        os.truncate(self.path, size)
        with self.path.open("rb") as file:
            self._sha256 = hashlib.file_digest(file, "sha256")
        if self._sha256.hexdigest() != sha256:
            raise UserError(f"{self.path} was changed since it was written: start anew with --overwrite")

    def __enter__(self) -> "TokenAppender":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # flushes, and so fails on a full disk
        except OSError:
            if error is None:
                raise

    def write(self, ids: np.ndarray, documents: int) -> None:
        """Append `ids` (one-dimensional), which close `documents` documents."""
        if ids.size:
            low, high = 0 if ids.dtype.kind == "u" else int(ids.min()), int(ids.max())
            if low < 0 or high >= self.vocabulary_size:
                raise ValueError(f"token ids {low}…{high} are not all in a vocabulary of {self.vocabulary_size}")
            self.max_token_id = max(self.max_token_id, high)
        content = np.ascontiguousarray(ids, dtype=self.dtype).data
        self._file.write(content)
        self._sha256.update(content)
        self.tokens += ids.size
        self.documents += documents

    def sync(self) -> None:
        """Bring all that was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def account(self) -> dict[str, Any]:
        """What is in the file, in the words of its sidecar."""
        return {
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "max_token_id": self.max_token_id,
            "vocabulary_size": self.vocabulary_size,
            "sha256": self._sha256.hexdigest(),
        }


def write_token_file(
    path: Path, pieces: Iterable[tuple[np.ndarray, int]], vocabulary_size: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a token file whole, with its sidecar, or leave nothing; return what the sidecar says.

    A `.bin` is never beside a wrong sidecar: an older `.bin` goes first, then the sidecar is written, then the new
    `.bin` gets its name. A crash between these steps leaves a sidecar without a file, which `open_tokens` calls
    missing.

    Args:
        path: where it goes.
        pieces: ids (one-dimensional) and how many documents they close, one after another.
        vocabulary_size: ids must be below it.
        extra: what the sidecar says besides the account of the file.
    """
    with atomic_write(path) as temporary:
        with TokenAppender(temporary, vocabulary_size) as appender:
            for ids, documents in pieces:
                appender.write(ids, documents)
            appender.sync()
        path.unlink(missing_ok=True)
        sidecar = {**appender.account(), **extra}
        write_json(sidecar_path(path), sidecar)
    return sidecar


@dataclass(frozen=True)
class TokenFile:
    """Token ids on disk, mapped and not read; `sidecar` is None for a bare file."""

    path: Path
    ids: np.memmap
    sidecar: dict[str, Any] | None

    def __len__(self) -> int:
        return len(self.ids)

    def will_need(self, offsets: np.ndarray, count: int) -> None:
        """Have the system fetch the `count` ids at each offset, side by side; reading would miss them one by one."""
        mapped = self.ids.base
        if not isinstance(mapped, mmap.mmap) or not hasattr(mmap, "MADV_WILLNEED"):
            return
        for first in (offsets * self.ids.itemsize).tolist():
            page = first // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_WILLNEED, page, first - page + count * self.ids.itemsize)


def open_tokens(path: str | Path, vocab_size: int) -> TokenFile:
    """Map a token file and make sure that a model with `vocab_size` tokens can read it.

    The sidecar's greatest id is believed when its size fits the file; a bare file is scanned, once, in pieces. The
    sidecar's SHA-256 is not recomputed: OpenWebText's 18 GB would take a minute at every start.
    """
    path = Path(path)
    size = file_size(path)
    sidecar = read_sidecar(path)
    dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[sidecar["dtype"]] if sidecar else "<u2")
    if size % dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, which is no multiple of {dtype.itemsize} ({dtype.name}): "
            "it was cut short or is no token file; prepare it again with python -m train.preprocess_data"
        )
    if sidecar and sidecar["tokens"] * dtype.itemsize != size:
        raise UserError(
            f"{path} has {size // dtype.itemsize} tokens, but its sidecar {sidecar_path(path)} says "
            f"{sidecar['tokens']}: one of them is from another preparation or was cut short; prepare both again with "
            "python -m train.preprocess_data"
        )
    ids = np.memmap(path, dtype=dtype, mode="r")
    check_vocabulary(path, sidecar["max_token_id"] if sidecar else scan_max_token_id(ids), vocab_size)
    return TokenFile(path, ids, sidecar)


def check_vocabulary(path: Path, max_token_id: int, vocab_size: int) -> None:
    """Refuse ids that a model with `vocab_size` tokens has no embedding for."""
    if max_token_id >= vocab_size:
        raise UserError(
            f"{path} holds token id {max_token_id}, but the model's vocab_size is {vocab_size}: "
            f"set vocab_size to {max_token_id + 1} or more, or prepare the text with the model's own tokenizer"
        )


def file_size(path: Path) -> int:
    """The size of what must be a readable, non-empty file."""
    prepare = "prepare one with python -m train.preprocess_data"
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a token file: give the file in it, such as {path / 'train.bin'}")
        size = path.stat().st_size
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise UserError(f"no token file at {path}: {prepare}") from error
    except OSError as error:
        raise UserError(f"cannot read the token file {path}: {error.strerror}") from error
    if path.suffix == ".json":
        raise UserError(f"{path} is no token file: give the .bin beside it")
    if not size:
        raise UserError(f"the token file {path} is empty: {prepare}")
    return size


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """The checked sidecar of a token file; None where there is none."""
    sidecar = sidecar_path(path)
    try:
        value = json.loads(sidecar.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the sidecar {sidecar} ({error}): prepare the data again, or move it away to have {path} "
            "read as bare uint16"
        ) from error
    wrong = sidecar_fault(value)
    if wrong:
        raise UserError(
            f"{sidecar} is not the sidecar of a token file ({wrong}): prepare the data again, or move it away to have "
            f"{path} read as bare uint16"
        )
    return value


def is_sidecar(path: Path) -> bool:
    """Whether a JSON file is one of ours, and so may be replaced together with its tokens."""
    try:
        return sidecar_fault(json.loads(path.read_text(encoding="utf-8"))) is None
    except (OSError, ValueError):
        return False


def sidecar_fault(value: Any) -> str | None:
    """What is wrong with a sidecar's content; None when nothing is."""
    if not isinstance(value, dict):
        return "it is no JSON object"
    if value.get("dtype") not in ("uint16", "uint32"):
        return f"dtype is {value.get('dtype')!r}, not 'uint16' or 'uint32'"
    for key in ("tokens", "max_token_id"):
        if type(value.get(key)) is not int or value[key] < 0:
            return f"{key} is {value.get(key)!r}, not a count"
    return None


def scan_max_token_id(ids: np.ndarray) -> int:
    return max(int(ids[start : start + SCAN_CHUNK].max()) for start in range(0, len(ids), SCAN_CHUNK))
