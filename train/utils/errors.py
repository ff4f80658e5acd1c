"""Exit codes, errors that a user can fix, and the one-line summary of any other error."""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator

# Errors of a disk, which libraries wrap in their own.
OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.ESTALE}
OF_A_PATH = {errno.EACCES, errno.EISDIR, errno.ENOENT, errno.ENOTDIR, errno.EPERM}
OF_NETWORKS = {
    errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ENOTCONN,
    errno.ETIMEDOUT, *range(-99, 1),  # the negative ones are of names that cannot be resolved
}  # fmt: skip
DISK_TEXTS = {os.strerror(number): number for number in OF_A_DISK}
RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust writes an errno: safetensors, tokenizers
TORCH_WRITER = re.compile(r"PytorchStreamWriter failed writing|inline_container\.cc.*unexpected pos", re.DOTALL)
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Storage size calculation overflowed"
)

# Exit codes of the commands, which docs/reliability.md explains; 0 is success.
FAILED = 1  # an error of the program or of another process of the job, or a check that is not met
USER_ERROR = 2  # the user can fix it, and the message says how: `UserError`, a file, a lack of memory
STOPPED_BY_GUARD = 3
RUN_AGAIN = 75  # sysexits.h's EX_TEMPFAIL: everything is saved, the same command continues
INTERRUPTED = 128 + 2  # Ctrl-C, as after SIGINT; while training, the second one
READER_GONE = 128 + 13  # the reader of stdout has gone, as in `... | head -1`, as after SIGPIPE


class UserError(Exception):
    """An invalid request: the message names the key, its value and the remedy."""


class EarlyEnd(BaseException):
    """The run ends before its last step, alike on all processes; the message says why and how to continue.

    It is not an error: what handles the errors of a library must not catch it.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def first_line(error: BaseException) -> str:
    """First line of the error's message, or the name of its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def shortened(value: object, length: int = 80) -> str:
    """The `repr` of a value as far as a message has room for it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def text_of(message: str) -> str:
    """A message as text that can be written: it may hold bytes that are not UTF-8, of a file name or an argument."""
    return message.encode("utf-8", "backslashreplace").decode()


def file_error(error: BaseException) -> str | None:
    """The sentence of an error of the file system, also where a library wraps one; None for any other error."""
    found = os_error(error)
    if found is not None:
        names = [found.filename2, found.filename]  # of a file that is renamed, the new name
        paths = [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]
        return f"{paths[0] if paths else 'the file system'}: {os.strerror(found.errno or 0)}"
    for each in _causes(error):
        if TORCH_WRITER.search(str(each)):
            return f"the file system: a file could not be written ({first_line(each)}); is the disk full?"
    return None


def user_sentence(error: BaseException) -> str | None:
    """The sentence of what a user can mend: a `UserError` or an error of the file system; None for any other error."""
    return str(error) if isinstance(error, UserError) else file_error(error)


def os_error(error: BaseException) -> OSError | None:
    """The error of the file system that an error is, or that a library made it of; None for any other error."""
    if isinstance(error, UserError):
        return None
    for each in _causes(error):
        if isinstance(each, OSError) and each.errno is not None:
            # Of the errors that were handled meanwhile only those of a disk count: others may be unrelated.
            if _is_of_files(each) and (each is error or each.errno in OF_A_DISK):
                return each
            continue
        found = RUST_ERROR.search(str(each))
        numbers = [int(found[1])] if found else [number for words, number in DISK_TEXTS.items() if words in str(each)]
        if numbers and numbers[0] in OF_A_DISK | OF_A_PATH:
            return OSError(numbers[0], os.strerror(numbers[0]))
    return None


def memory_error(error: BaseException) -> str | None:
    """The sentence of a lack of memory; None for any other error."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))):
        return f"out of memory: {first_line(error)}; ask for less at once, or for a smaller model"
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean NAME? " with the nearest known name, empty where none is near: the start of a remedy."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {nearest[0]}? " if nearest else ""


def _is_of_files(error: OSError) -> bool:
    """Whether it is not of a network or of a process; those have no file name."""
    if isinstance(error, ConnectionError | ChildProcessError | ProcessLookupError):
        return False
    return error.filename is not None or (error.errno or 0) not in OF_NETWORKS


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, or what was being handled then, and so on."""
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
