"""One preparation, from its first token to its files in place, whatever is killed in between.

1. While it runs, everything is in OUT/.preparing, under the lock OUT/.preparing.lock. `train.bin` and `val.bin` only
   grow, and `journal.json` says up to where they and the stream of documents are whole: it is replaced, whole, each
   time that both files were brought to the disk.
2. After a kill, the same command cuts both files to the journal's account, checks their digests and reads on behind
   the journal's last document.
3. When all is read ("finishing"), both parts are made ready in OUT/.preparing/ready: as they are, or in another order.
4. When both are ready ("placing"), they are renamed to their places.

Each of these steps can be done again after a kill in the middle of it.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from train.data.token_file import (
    VOCABULARY_SIZE,
    TokenAppender,
    read_sidecar,
    sidecar_path,
    token_dtype,
    write_token_file,
)
from train.preprocess_data.splits import in_order
from train.preprocess_data.streams import Position
from train.utils.errors import UserError
from train.utils.files import fsync, write_json

WORK_FOLDER = ".preparing"
LOCK = ".preparing.lock"
PARTS = ("train", "val")
COMMIT_SECONDS = 2.0  # what a kill costs at most, beside starting again


class Chunk(NamedTuple):
    """Some documents of one part; ids (tokens,), each document closed by <|endoftext|>."""

    ids: np.ndarray
    documents: int
    empty_documents: int
    documents_with_replacement_character: int
    text_bytes: int


COUNTS = Chunk._fields[2:]


def read_journal(out_dir: Path) -> dict[str, Any] | None:
    """The journal of the preparation that is, or was, under way in a folder; None where there is none."""
    path = out_dir / WORK_FOLDER / "journal.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): throw the preparation away with --overwrite") from None


@contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Hold a folder's lock. The system frees it when its holder dies, so a lock that is held has a living holder."""
    lock = FileLock(out_dir / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        journal = read_journal(out_dir)
        owner = named(journal["owner"]) if journal else "another process"
        raise UserError(f"--out_dir {out_dir} is being written by {owner}: wait for it, or name another") from None
    try:
        yield
    finally:
        (out_dir / LOCK).unlink(missing_ok=True)  # still held: whoever waits finds it nameless, and tries again
        lock.release()


def named(owner: Mapping[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}, started {owner['started']}"


def finished(out_dir: Path, request: Mapping[str, Any]) -> bool:
    """Whether both files are in place and were prepared as asked for."""
    for name in PARTS:
        path = out_dir / f"{name}.bin"
        sidecar = read_sidecar(path)
        if sidecar is None or sidecar.get("request") != request or not path.exists():
            return False
        if path.stat().st_size != sidecar["tokens"] * np.dtype(sidecar["dtype"]).itemsize:
            return False
    return True


class Preparation:
    """A preparation that is under way; whoever makes one holds the folder's lock.

    Args:
        out_dir: where its files will be.
        request: what the command asks for; a preparation is taken up by the same request only.
        overwrite: whether to throw away what another request left unfinished, or what was damaged.

    Raises:
        UserError: another request left something unfinished, or what was left was changed.
    """

    def __init__(self, out_dir: Path, request: Mapping[str, Any], overwrite: bool) -> None:
        self.out_dir = out_dir
        self.folder = out_dir / WORK_FOLDER
        self.request = request
        self._files = ExitStack()
        try:
            journal = read_journal(out_dir)
            if journal and journal["request"] != request:
                raise UserError(unfinished(out_dir, journal, request))
            self._take_up(journal)
        except UserError:
            if not overwrite:
                raise
            journal = None
            self._take_up(journal)

    def _take_up(self, journal: dict[str, Any] | None) -> None:
        if journal is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
            journal = {"phase": "reading", "rows": 0, "position": None, "parts": {}, "sidecar": {}}
        elif journal["rows"]:
            print(
                f"{named(journal['owner'])}, ended before it was done: going on from row {journal['rows']:,}",
                file=sys.stderr,
            )
        started = datetime.now(UTC).isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": gethostname(), "started": started}
        self.journal: dict[str, Any] = journal | {"request": self.request, "owner": owner}
        self.rows: int = journal["rows"]
        self.taken_up = self.rows > 0
        self.position = Position(*journal["position"] or ())
        self.counts = {name: {key: journal["parts"].get(name, {}).get(key, 0) for key in COUNTS} for name in PARTS}
        self._committed = -COMMIT_SECONDS  # so that the first documents are committed at once
        self._write_journal()
        self._appenders: dict[str, TokenAppender] = {}
        if self.phase == "reading":
            for name in PARTS:
                path = self.folder / f"{name}.bin"
                appender = TokenAppender(path, VOCABULARY_SIZE, journal["parts"].get(name))
                self._appenders[name] = self._files.enter_context(appender)

    @property
    def phase(self) -> str:
        return self.journal["phase"]

    @property
    def sidecar(self) -> dict[str, Any]:
        """What the sidecars will say besides their file's account; kept in the journal from when it is settled."""
        return self.journal["sidecar"]

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            orderly = error is not None and not isinstance(error, OSError) and self.folder.exists()
            if orderly and self.phase == "reading" and self.rows > self.journal["rows"]:
                self.commit()  # a source that fails, or Ctrl-C, costs nothing that was read
        finally:
            self._files.__exit__(kind, error, trace)
            if error is not None and not self.journal["rows"]:
                self.discard()

    def discard(self) -> None:
        """Leave nothing to take up, if all of it is this process's work."""
        if not self.taken_up:
            shutil.rmtree(self.folder, ignore_errors=True)

    def settle(self, sidecar: dict[str, Any]) -> None:
        self.journal["sidecar"] = sidecar
        self._write_journal()

    def append(self, chunks: Iterable[Chunk], rows: int, behind: Position) -> None:
        """Write the training and the validation chunk of the next `rows` rows, behind which the stream goes on."""
        for name, chunk in zip(PARTS, chunks, strict=True):
            self._appenders[name].write(chunk.ids, chunk.documents)
            for key in COUNTS:
                self.counts[name][key] += getattr(chunk, key)
        self.rows += rows
        self.position = behind
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def tokens(self) -> dict[str, int]:
        return {name: appender.tokens for name, appender in self._appenders.items()}

    def documents(self) -> dict[str, int]:
        return {name: appender.documents for name, appender in self._appenders.items()}

    def commit(self) -> None:
        """Bring everything so far to the disk; from here on no kill can take it away."""
        for name, appender in self._appenders.items():
            appender.sync()
            self.journal["parts"][name] = appender.account() | self.counts[name]
        self.journal |= {"rows": self.rows, "position": self.position}
        self._write_journal()
        self._committed = time.monotonic()

    def finish(self, orders: Mapping[str, np.ndarray | None]) -> None:
        """Put both files in place.

        Args:
            orders: for each part, the numbers of its rows in the order that is wanted; None: the stream's.
        """
        if self.phase == "reading":
            self.journal["phase"] = "finishing"
            self.commit()
        if self.phase == "finishing":
            self._make_ready(orders)
            self.journal["phase"] = "placing"
            self._write_journal()
        self._place()

    def _make_ready(self, orders: Mapping[str, np.ndarray | None]) -> None:
        ready = self.folder / "ready"
        ready.mkdir(exist_ok=True)
        for leftover in ready.glob(".*"):
            leftover.unlink()
        for name in PARTS:
            source, target = self.folder / f"{name}.bin", ready / f"{name}.bin"
            if target.exists():
                continue
            order, account = orders[name], self.journal["parts"][name]
            extra = {key: account[key] for key in COUNTS} | self.sidecar
            extra |= {"rows": self.journal["rows"], "request": self.request}
            if order is None:
                write_json(sidecar_path(target), account | extra)
                source.replace(target)
                continue
            with tqdm(
                total=account["tokens"], unit=" tokens", unit_scale=True, desc=f"{name} in order", leave=False
            ) as progress:
                pieces = in_order(source, token_dtype(VOCABULARY_SIZE), order)
                write_token_file(target, counted(pieces, progress), VOCABULARY_SIZE, extra)

    def _place(self) -> None:
        ready = self.folder / "ready"
        left = [name for name in PARTS if (ready / f"{name}.bin").exists()]
        for name in left:  # all older files go first, so that never two of different preparations lie side by side
            (self.out_dir / f"{name}.bin").unlink(missing_ok=True)
        for name in left:
            for file in (f"{name}.json", f"{name}.bin"):
                if (ready / file).exists():
                    (ready / file).replace(self.out_dir / file)
        fsync(self.out_dir)
        # The journal goes last, so that a kill in between leaves something to take up.
        for path in sorted(self.folder.rglob("*"), key=lambda path: (path.name == "journal.json", -len(path.parts))):
            path.rmdir() if path.is_dir() else path.unlink()
        self.folder.rmdir()

    def _write_journal(self) -> None:
        write_json(self.folder / "journal.json", self.journal)


def counted(pieces: Iterable[tuple[np.ndarray, int]], progress: tqdm) -> Iterator[tuple[np.ndarray, int]]:
    for ids, documents in pieces:
        yield ids, documents
        progress.update(ids.size)


def unfinished(out_dir: Path, journal: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    old = journal["request"]
    differing = [key for key in request if request[key] != old.get(key)]
    said = [f"--{key} {old.get(key)}, not {request[key]}" for key in differing if key != "files_sha256"]
    if differing == ["files_sha256"]:
        said = ["the same files, which have changed since"]
    return (
        f"--out_dir {out_dir} holds an unfinished preparation of something else ({'; '.join(said)}): finish it with "
        "its own flags, or throw it away with --overwrite"
    )
