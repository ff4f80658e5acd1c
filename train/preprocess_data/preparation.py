"""The files of a preparation on the disk, from its first token until they have their names, across kills.

1. Until it is finished, everything is in OUT/.preparing, and one process owns OUT (`utils.lock`). `train.bin` and
   `val.bin` only grow, and `journal.json` records up to where they and the stream of documents are complete: it is
   replaced atomically each time after both files were flushed to the disk.
2. After a kill, the same command truncates both files to the journal's sizes, checks their digests and reads on after
   the journal's last document.
3. When everything is read ("finishing"), each file is completed in OUT/.preparing/ready, as it is or reordered, and
   its original is gone.
4. When both are ready, they are renamed into OUT.

Each of these steps can be repeated after a kill in the middle of it.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import Any, Literal, NamedTuple

import numpy as np

from train.data.token_file import (
    Sidecar,
    TokenWriter,
    digest_of_samples,
    sidecar_path,
    token_dtype,
    write_token_file,
)
from train.data.tokenizer import VOCABULARY_SIZE
from train.preprocess_data.splits import in_order
from train.preprocess_data.streams import BEGINNING, Position
from train.utils.errors import UserError
from train.utils.files import from_json, fsync, read_json, write_json

WORK_FOLDER = ".preparing"
PARTS = ("train", "val")
COMMIT_SECONDS = 2.0  # of work that a kill can lose


class Chunk(NamedTuple):
    """Some documents of one part, as ids (tokens,); each document ends with <|endoftext|>."""

    ids: np.ndarray
    counts: dict[str, int]  # fields of the sidecar


@dataclass
class Journal:
    """The content of `journal.json`."""

    request: dict[str, Any]  # only the same request may resume
    owner: str = ""  # the process that prepares
    phase: Literal["reading", "finishing"] = "reading"
    rows: int = 0
    position: Position = BEGINNING  # after these rows
    parts: dict[str, Sidecar] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)  # fields that both sidecars share


def read_journal(out_dir: Path) -> Journal | None:
    """The journal of an unfinished preparation; None where there is none."""
    path = out_dir / WORK_FOLDER / "journal.json"
    if not path.exists():
        return None
    try:
        return from_json(Journal, read_json(path), path, "train.preprocess_data")
    except UserError as error:
        raise UserError(f"{error}; discard the preparation with --overwrite") from None


class Preparation:
    """An unfinished preparation. The caller holds the folder's lock.

    What another `request` left unfinished, or what was damaged, is a `UserError`, or discarded with `overwrite`.
    """

    def __init__(self, out_dir: Path, request: dict[str, Any], overwrite: bool) -> None:
        self.out_dir = out_dir
        self.folder = out_dir / WORK_FOLDER
        self._files = ExitStack()
        try:
            journal = read_journal(out_dir)
            if journal and journal.request != request:
                raise UserError(unfinished(out_dir, journal.request, request))
            self._open(journal, request)
        except UserError:
            if not overwrite:
                raise
            self._open(None, request)

    def _open(self, journal: Journal | None, request: dict[str, Any]) -> None:
        if journal is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            journal = Journal(request)
        elif journal.rows:
            print(f"{journal.owner}, did not finish: resuming from row {journal.rows:,}", file=sys.stderr)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        journal.owner = f"process {os.getpid()} on {gethostname()}, started {started}"
        self.journal = journal
        self.resumed = journal.rows > 0
        self._committed: float | None = None  # when
        self._write_journal()
        self._writers: dict[str, TokenWriter] = {}
        if journal.phase == "reading":
            for name in PARTS:
                writer = TokenWriter(self.folder / f"{name}.bin", VOCABULARY_SIZE, journal.parts.get(name))
                self._writers[name] = self._files.enter_context(writer)

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            can_write = error is not None and not isinstance(error, OSError) and self.folder.exists()
            if can_write and self.journal.phase == "reading" and self.journal.rows:
                self.commit()  # a source that fails, or Ctrl-C, loses nothing that was read
        finally:
            self._files.close()
            if error is not None and self._committed is None:
                self.discard()

    def discard(self) -> None:
        """Delete everything, unless it was resumed from an earlier process."""
        if not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)

    def append(self, chunks: Iterable[Chunk], rows: int, position: Position) -> None:
        """Write the training and the validation chunk of the next `rows` rows; the stream is at `position` then."""
        for name, chunk in zip(PARTS, chunks, strict=True):
            self._writers[name].write(chunk.ids, **chunk.counts)
        parts = {name: writer.statistics for name, writer in self._writers.items()}
        # One assignment, so that Ctrl-C finds rows and parts that belong together.
        self.journal = replace(self.journal, rows=self.journal.rows + rows, position=position, parts=parts)
        if self._committed is None or time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Flush everything so far to the disk; a kill cannot lose it any more."""
        for writer in self._writers.values():
            writer.sync()
        self._write_journal()
        self._committed = time.monotonic()

    def finish(self, orders: Mapping[str, np.ndarray | None]) -> None:
        """Complete both files, the rows of each in one of the `orders` (None: the stream's), and put them in place."""
        if self.journal.phase == "reading":
            self.journal.phase = "finishing"
            self.commit()
        ready = self.folder / "ready"
        ready.mkdir(exist_ok=True)
        for leftover in ready.glob(".*"):
            leftover.unlink()
        for name, order in orders.items():
            if (self.folder / f"{name}.bin").exists():
                self._complete(name, order, ready / f"{name}.bin")
        left = [name for name in PARTS if (ready / f"{name}.bin").exists()]
        for name in left:  # all older files first, so that files of two preparations never lie side by side
            (self.out_dir / f"{name}.bin").unlink(missing_ok=True)
        for name in left:
            for file in (f"{name}.json", f"{name}.bin"):
                if (ready / file).exists():
                    (ready / file).replace(self.out_dir / file)
        fsync(self.out_dir)
        shutil.rmtree(self.folder)

    def _complete(self, name: str, order: np.ndarray | None, target: Path) -> None:
        source, journal = self.folder / f"{name}.bin", self.journal
        sidecar = replace(journal.parts[name], **journal.provenance, rows=journal.rows, request=journal.request)
        if order is None:
            sidecar = replace(sidecar, samples_sha256=digest_of_samples(source))
            write_json(sidecar_path(target), sidecar.to_json())
            source.replace(target)
        else:
            pieces = in_order(source, token_dtype(VOCABULARY_SIZE), order)
            write_token_file(target, pieces, VOCABULARY_SIZE, sidecar.to_json())
            source.unlink()

    def _write_journal(self) -> None:
        write_json(self.folder / "journal.json", asdict(self.journal))


def unfinished(out_dir: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    differing = [key for key in new if new[key] != old.get(key)]
    flags = [f"--{key} {old.get(key)}, not {new[key]}" for key in differing if key != "files_sha256"]
    if differing == ["files_sha256"]:
        flags = ["the same files, which have changed since"]
    return (
        f"--out_dir {out_dir} holds an unfinished preparation of something else ({'; '.join(flags)}): finish it with "
        "its own flags, or discard it with --overwrite"
    )
