"""Files: written atomically, and JSON without NaN, which is read back against a schema.

A file or folder is complete or absent: it is written under another name, flushed, then renamed. In a folder that this
process owns (`train.utils.lock`), nothing is written or deleted once another process has taken it over.
"""

import glob
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from train.utils import lock
from train.utils.errors import UserError, os_error, shortened

T = TypeVar("T")
BEYOND_NUMBERS = 1e100
MOST_NESTED = 100  # levels of JSON: what this package writes has fewer than ten


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk (a folder's fsync makes the renames in it durable)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed to `path`, otherwise removed."""
    lock.check(path)
    temporary = _temporary(path)
    try:
        with _errors_name(path):
            yield temporary
            fsync(temporary)
            lock.check(path)
            temporary.replace(path)
            fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; on success it is flushed and renamed, otherwise removed.

    By then `path` must be absent, or an empty folder, unless the new folder may `replace` it.
    """
    lock.check(path)
    temporary = _temporary(path)
    temporary.mkdir(parents=True)
    try:
        with _errors_name(path):
            yield temporary
            for entry in [*temporary.iterdir(), temporary]:
                fsync(entry)
            lock.check(path)
            if replace:
                delete_folder(path)
            temporary.rename(path)
            fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # frees a full disk


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Give an error of the file system the name of what is being written: an open file's, or a library's, has none."""
    try:
        yield
    except Exception as error:
        found = os_error(error)
        if found is None:
            raise
        found.filename = found.filename or str(path)
        raise found from None


def _temporary(path: Path) -> Path:
    """The temporary name beside `path` of this process, without what it and killed ones of this machine left there."""
    host = re.sub(r"\W", "-", socket.gethostname())
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{host}.*.tmp"):
        owner = leftover.name.split(".")[-2]
        if owner == f"{os.getpid()}" or not (owner.isdigit() and psutil.pid_exists(int(owner))):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")


def delete_folder(folder: Path) -> str:
    """Delete a step folder if it exists; it is renamed first, so that a partial one is never read as a checkpoint.

    What a disk or a file server does not delete (a file that another process has open, for example) stays under the
    hidden name: the sentence that says so, or "".
    """
    if not folder.exists():
        return ""
    lock.check(folder)
    renamed = folder.with_name(f".{folder.name}.{time.time_ns()}.old")
    folder.rename(renamed)
    return delete_tree(renamed)


def delete_tree(folder: Path) -> str:
    """Delete as much of a folder as possible; the sentence that says what remains, or ""."""
    lock.check(folder)
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return ""
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # what the error has kept it from
        return f"{folder} cannot be deleted yet: {error.strerror}" if folder.exists() else ""
    return ""


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """The content of a file in UTF-8."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device, and not a file")  # a pipe without a writer would wait for ever
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """JSON whose first line is `line` of `path`, nested at most `MOST_NESTED` deep.

    NaN and Infinity, which Python writes by default, become null, and so do numbers that nothing measures: what is
    computed from them would overflow.
    """
    try:
        value = json.loads(text, parse_constant=lambda name: None, parse_float=_finite, parse_int=_whole)
        if text.count("[") + text.count("{") > MOST_NESTED:
            _check_depth(value)
    except RecursionError:
        raise UserError(f"{path}, line {line}: nested more than {MOST_NESTED} deep") from None
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{where}: broken JSON ({error.msg})") from None
    try:  # JSON can name a lone surrogate ("\\ud800"), which no file can hold
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} contains a lone surrogate (U+{ord(error.object[error.start]):04X})") from None
    return value


def read_json(path: Path) -> Any:
    return parse_json(read_text(path), path)


def from_json(schema: type[T], value: Any, path: Path, writer: str) -> T:
    """`value`, which `path` holds, as an instance of the dataclass `schema` that `writer` writes.

    Types are not coerced, apart from integers where a float is expected. Keys that `schema` does not have are ignored.
    """
    from pydantic import TypeAdapter, ValidationError  # takes 0.1 s

    try:
        return TypeAdapter(schema).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = f'"{".".join(map(str, first["loc"]))}"' if first["loc"] else "its content"
    if first["type"] == "missing":
        raise UserError(f"{path}: {key} is missing: it is not what {writer} writes")
    mistake = first["msg"].replace("Input should be", "not")
    raise UserError(f"{path}: {key} is {shortened(first['input'])}, {mistake}: it is not what {writer} writes")


def json_safe(value: Any) -> Any:
    """The same value with every NaN and infinity, at any depth, as None: strict JSON has neither."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def _check_depth(value: Any) -> None:
    """Raise a `RecursionError` if lists and objects are nested deeper than the code that reads them may recurse."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, list | dict)]:
        depth += 1
        if depth > MOST_NESTED:
            raise RecursionError
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]


def _whole(text: str) -> int | float | None:
    """A JSON integer; as a float where it is beyond 64 bits, and None where it is beyond `BEYOND_NUMBERS`."""
    value = _finite(text)
    return value if value is None or abs(value) >= 2**63 else int(text)


def _finite(text: str) -> float | None:
    """A JSON number as a float; None beyond `BEYOND_NUMBERS` ("1e999", or a thousand digits), 0 below its inverse."""
    value = float(text)
    if abs(value) * BEYOND_NUMBERS < 1:
        return 0.0
    return value if abs(value) < BEYOND_NUMBERS else None
