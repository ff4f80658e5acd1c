"""Preparations of token files for tests to start, kill, resume and compare."""

import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.conftest import python

COMMAND = ["-m", "train.preprocess_data"]
FORKS_SECONDS = 300
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}  # audit events


def prepare(*words: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    return python(*COMMAND, *words, cwd=cwd, check=check)


def refused(*words: object, cwd: Path) -> str:
    """The sentence, or one a line, with which a command ends that cannot be."""
    return sentence(prepare(*words, cwd=cwd, check=False))


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    said = f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 2, said
    assert "Traceback" not in done.stderr, said
    _, error, sentences = done.stderr.partition("error: ")
    assert error, said
    return sentences


@contextmanager
def preparing(*words: object, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A preparation in the background; if it is still there at the end, it is killed."""
    process = subprocess.Popen(
        [sys.executable, *COMMAND, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def contents(folder: Path) -> dict[str, Any]:
    """All that is in a folder: of a sidecar what it says, of any other file the SHA-256, of a folder None."""
    return {path.name: _content(path) for path in sorted(folder.iterdir())}


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def check_pairs(folder: Path) -> None:
    """A `.bin` is never beside a sidecar that is not its own, whenever one looks."""
    for name in ("train", "val"):
        tokens, sidecar = folder / f"{name}.bin", folder / f"{name}.json"
        if tokens.exists() and sidecar.exists():
            assert json.loads(sidecar.read_bytes())["sha256"] == _content(tokens), f"{tokens} with a wrong sidecar"


def write_lines(path: Path, texts: Sequence[str | None]) -> Path:
    """JSON lines; a name that ends in .gz or .zst is compressed."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    return write_compressed(path, content)


def write_compressed(path: Path, content: bytes) -> Path:
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, texts: Sequence[str | None], **options: Any) -> Path:
    pyarrow.parquet.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, **options)
    return path


def pieces_of_the_standard_library(lines: int = 60) -> list[str]:
    """Its modules in documents of so many lines: some 4,700 documents, 11 MB."""
    from train.preprocess_data.sources import stdlib_modules

    pieces = []
    for module in stdlib_modules():
        whole = Path(module).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        pieces += ["".join(whole[start : start + lines]) for start in range(0, len(whole), lines)]
    return pieces


def fork_prepare(
    words: Sequence[object], cwd: Path, change: int | None = None, error: int | None = None
) -> tuple[int, str]:
    """Prepare in a process forked from one that has the libraries loaded; return its exit code and what it said.

    It keeps its journal after each batch, not every two seconds.

    A `change` is what opens for writing, syncs, makes, truncates, renames or removes something in `cwd`. Before the
    one with the number given (from 1) the process is killed with signal 9, which is the exit code -9; or, with an
    `error`, this one and all that follow fail with that errno, but for removals.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "torch", "train.preprocess_data.__main__", "tests.preparations"])
    log = cwd.with_name(f"{cwd.name}.log")
    process = context.Process(target=_forked, args=(list(map(str, words)), str(cwd), str(log), change, error))
    process.start()
    process.join(FORKS_SECONDS)
    code, said = process.exitcode, log.read_text()
    if code is None:
        process.kill()
        process.join()
        pytest.fail(f"still there after {FORKS_SECONDS} s\n{said}")
    return code, said


def _forked(words: list[str], cwd: str, log: str, change: int | None, error: int | None) -> NoReturn:
    from train.preprocess_data import preparation
    from train.preprocess_data.__main__ import main
    from train.utils.command import run_command

    preparation.COMMIT_SECONDS = 0.0
    multiprocessing.set_start_method("fork", force=True)  # whose semaphores (tqdm's) have no name to be left behind
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(cwd)
    if change is not None:
        watch_changes(cwd, change, error)
    run_command(lambda: main(words))


def watch_changes(folder: str, number: int, error: int | None = None) -> None:
    """Kill this process before its change with this number in a folder, or let this and all further ones fail."""
    left = number
    sync = os.fsync

    def count(removes: bool = False) -> None:
        nonlocal left
        left -= 1
        if left == 0 and error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if left <= 0 and error is not None and not removes:
            raise OSError(error, os.strerror(error))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, mode = arguments
            changes = bool(mode & (os.O_WRONLY | os.O_RDWR)) and not isinstance(path, int)  # that is open already
        elif event in CHANGES:
            path, changes = arguments[0], True
        else:
            return
        # A number is an open file; a name without a folder belongs to an open folder, as where a tree is removed.
        if changes and (isinstance(path, int) or Path(os.fsdecode(path)).absolute().is_relative_to(folder)):
            count(removes=event in ("os.remove", "os.rmdir"))

    def fsync(file: Any) -> None:
        count()
        sync(file)

    sys.addaudithook(hook)
    os.fsync = fsync
