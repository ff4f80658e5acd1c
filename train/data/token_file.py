"""The files of token ids that training reads.

A token file is nanoGPT's: token ids one after another, little-endian `uint16` (`uint32` when the vocabulary needs
it), no header. Beside `train.bin` lies `train.json`, its sidecar, which describes the ids and where they came from. A
file without a sidecar is read as bare `uint16`, so files that nanoGPT prepared open here, and the other way round.
"""

import dataclasses
import hashlib
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from train.utils.errors import UserError
from train.utils.files import atomic_write, from_json, read_json, write_json

SCAN_CHUNK = 1 << 24  # ids read at once when a bare file is scanned: 32 MiB of uint16
# What is read of a file at every start: its first and its last mebibyte, and pages spread evenly over it.
END_BYTES = 1 << 20
PAGES, PAGE_BYTES = 64, 1 << 12


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The JSON file beside a token file. Fields that are None are not written, and other fields are not read."""

    dtype: Literal["uint16", "uint32"]
    tokens: Annotated[int, Field(ge=0)]
    documents: int | None = None
    max_token_id: Annotated[int, Field(ge=-1)]  # -1: no tokens
    vocabulary_size: int | None = None
    sha256: str | None = None
    samples_sha256: str | None = None  # of `digest_of_samples`; None in files of older versions
    # What preprocess_data adds: about the documents in this file, and about its command.
    empty_documents: int | None = None
    documents_with_replacement_character: int | None = None
    text_bytes: int | None = None
    tokenizer: str | None = None
    tokenizer_sha256: str | None = None
    source: dict[str, Any] | None = None
    split: str | None = None
    order: str | None = None
    val_fraction: float | None = None
    seed: int | None = None
    num_rows: int | None = None
    max_documents: int | None = None
    rows: int | None = None
    request: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """Little-endian `uint16` where every id fits, as in nanoGPT; else `uint32`."""
    return np.dtype("<u2") if vocabulary_size <= 65_535 else np.dtype("<u4")


def sidecar_path(path: Path) -> Path:
    return path.with_suffix(".json")


class TokenWriter:
    """Appends to a token file and keeps the statistics of its content.

    Given the `statistics` of an earlier writer to `resume`, it truncates the file to them; a file that does not begin
    with what they describe is a `UserError`.
    """

    def __init__(self, path: Path, vocabulary_size: int, resume: Sidecar | None = None) -> None:
        self.path = path
        self.vocabulary_size = vocabulary_size
        self.dtype = token_dtype(vocabulary_size)
        self._sha256 = hashlib.sha256() if resume is None else self._truncate(resume)
        dtype: Any = self.dtype.name
        self.statistics = resume or Sidecar(
            dtype=dtype,
            tokens=0,
            documents=0,
            max_token_id=-1,
            vocabulary_size=vocabulary_size,
            sha256=self._sha256.hexdigest(),
        )
        self._file = path.open("ab" if resume else "wb")

    def _truncate(self, resume: Sidecar) -> Any:
        size = resume.tokens * self.dtype.itemsize
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < size:
            raise UserError(f"{self.path} has {found} bytes, and {size} were written: start again with --overwrite")
        os.truncate(self.path, size)
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        if digest.hexdigest() != resume.sha256:
            raise UserError(f"{self.path} was changed since it was written: start again with --overwrite")
        return digest

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, ids: np.ndarray, **counts: int) -> None:
        """Append `ids`, (tokens,), and add the counts (`documents` that end in them, ...) to the statistics."""
        low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, -1)
        if low < 0 or high >= self.vocabulary_size:
            raise ValueError(f"token ids {low}…{high} are not all in a vocabulary of {self.vocabulary_size}")
        content = np.ascontiguousarray(ids, dtype=self.dtype).data
        self._file.write(content)
        self._sha256.update(content)
        before = self.statistics
        sums: dict[str, Any] = {key: (getattr(before, key) or 0) + count for key, count in counts.items()}
        self.statistics = dataclasses.replace(
            before,
            tokens=before.tokens + ids.size,
            max_token_id=max(before.max_token_id, high),
            sha256=self._sha256.hexdigest(),
            **sums,
        )

    def sync(self) -> None:
        """Flush everything that was written to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


def write_token_file(
    path: Path, pieces: Iterable[tuple[np.ndarray, int]], vocabulary_size: int, fields: Mapping[str, Any]
) -> Sidecar:
    """Write a complete token file with its sidecar, or leave nothing.

    The `pieces` are ids, (tokens,), and the number of documents that end in them; `fields` are the sidecar's besides
    the file's statistics. A `.bin` never lies beside a wrong sidecar: an older `.bin` is removed first, then the
    sidecar is written, then the new `.bin` gets its name.
    """
    with atomic_write(path) as temporary:
        with TokenWriter(temporary, vocabulary_size) as writer:
            for ids, documents in pieces:
                writer.write(ids, documents=documents)
            writer.sync()
        path.unlink(missing_ok=True)
        sampled = {"samples_sha256": digest_of_samples(temporary)}
        sidecar = Sidecar(**{**fields, **writer.statistics.to_json(), **sampled})
        write_json(sidecar_path(path), sidecar.to_json())
    return sidecar


@dataclass(frozen=True)
class TokenFile:
    """Token ids on disk, of which a part is read at a time; `sidecar` is None for a bare file.

    They are not mapped: where a mapped file was truncated, or its disk fails, a signal (SIGBUS) ends the process.
    """

    path: Path
    descriptor: int
    dtype: np.dtype[Any]
    tokens: int
    sidecar: Sidecar | None
    samples_sha256: str

    def __len__(self) -> int:
        return self.tokens

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint records of its data, and a run that resumes must have too; a bare file has no `sha256`."""
        sha256 = self.sidecar.sha256 if self.sidecar else None
        return {"tokens": len(self), "sha256": sha256, "samples_sha256": self.samples_sha256}

    def read(self, start: int, count: int) -> np.ndarray:
        """The `count` ids from `start` on, (count,), or those up to the end of the file.

        Raises:
            UserError: if the file has become shorter since it was opened, or its disk fails.
        """
        start_byte, left = start * self.dtype.itemsize, min(count, self.tokens - start) * self.dtype.itemsize
        parts = []
        while left > 0:  # one call reads 2 GiB at most
            try:
                part = os.pread(self.descriptor, left, start_byte)
            except OSError as error:
                raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
            if not part:
                raise UserError(
                    f"{self.path} was truncated while it was read: it had {self.tokens:,} tokens and ends before "
                    f"token {start + count:,}; prepare it again with python -m train.preprocess_data"
                )
            parts.append(part)
            start_byte, left = start_byte + len(part), left - len(part)
        return np.frombuffer(b"".join(parts), self.dtype)

    def will_need(self, offsets: np.ndarray, count: int) -> None:
        """Have the system read the `count` ids at each offset in parallel; they would be read one after another."""
        if not hasattr(os, "posix_fadvise"):
            return
        size = self.dtype.itemsize
        for offset in offsets.tolist():
            os.posix_fadvise(self.descriptor, offset * size, count * size, os.POSIX_FADV_WILLNEED)


def open_tokens(path: str | Path, vocab_size: int, *, check_samples: bool = True) -> TokenFile:
    """Open a token file, and check that a model with `vocab_size` tokens can read it.

    The sidecar's greatest id is trusted when its size and its samples fit the file; a bare file is scanned, once, in
    pieces. The sidecar's SHA-256 is not recomputed: OpenWebText's 18 GB would take a minute at every start.
    """
    path = Path(path)
    size = file_size(path)
    sidecar = read_sidecar(path)
    dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[sidecar.dtype] if sidecar else "<u2")
    if size % dtype.itemsize:
        raise UserError(
            f"{path} has {size} bytes, which is not a multiple of {dtype.itemsize} ({dtype.name}): "
            "it was truncated or is not a token file; prepare it again with python -m train.preprocess_data"
        )
    if sidecar and sidecar.tokens * dtype.itemsize != size:
        raise UserError(
            f"{path} has {size // dtype.itemsize} tokens, but its sidecar {sidecar_path(path)} says "
            f"{sidecar.tokens}: one of them is from another preparation or was truncated; prepare both again with "
            "python -m train.preprocess_data"
        )
    samples = digest_of_samples(path)
    if check_samples and sidecar and sidecar.samples_sha256 not in (None, samples):
        raise UserError(
            f"{path} is not the file that its sidecar {sidecar_path(path)} describes: samples of it differ; prepare "
            "both again with python -m train.preprocess_data --overwrite"
        )
    tokens = TokenFile(path, os.open(path, os.O_RDONLY), dtype, size // dtype.itemsize, sidecar, samples)
    weakref.finalize(tokens, os.close, tokens.descriptor)
    max_token_id = sidecar.max_token_id if sidecar else scan_max_token_id(tokens)
    if max_token_id >= vocab_size:
        raise UserError(
            f"{path} holds token id {max_token_id}, but the model's vocab_size is {vocab_size}: "
            f"set vocab_size to {max_token_id + 1} or more, or prepare the text with the model's own tokenizer"
        )
    return tokens


def digest_of_samples(path: Path) -> str:
    """SHA-256 of a file's size, its ends and pages between them: 2.3 MB are read, whatever its size."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        pages = [(size * page // (PAGES + 1), PAGE_BYTES) for page in range(1, PAGES + 1)]
        for start, count in [(0, END_BYTES), *pages, (max(0, size - END_BYTES), END_BYTES)]:
            file.seek(start)
            digest.update(file.read(count))
    return digest.hexdigest()


def file_size(path: Path) -> int:
    """The size of a file that must be readable and not empty."""
    prepare = "prepare one with python -m train.preprocess_data"
    if path.suffix == ".json":
        raise UserError(f"{path} is not a token file: give the .bin next to it")
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a token file: give the file in it, such as {path / 'train.bin'}")
    if not path.exists():
        raise UserError(f"no token file at {path}: {prepare}")
    if not path.is_file():
        raise UserError(f"{path} is a pipe or a device, not a token file, which is read in any order: {prepare}")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
    if not size:
        raise UserError(f"the token file {path} is empty: {prepare}")
    return size


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of a token file; None where there is none."""
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        return None
    try:
        return from_json(Sidecar, read_json(sidecar), sidecar, "train.preprocess_data")
    except UserError as error:
        raise UserError(
            f"{error}; prepare the data again, or move the file away to have {path} read as bare uint16"
        ) from None


def scan_max_token_id(tokens: TokenFile) -> int:
    return max(int(tokens.read(start, SCAN_CHUNK).max()) for start in range(0, len(tokens), SCAN_CHUNK))
