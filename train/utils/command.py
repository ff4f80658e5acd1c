"""Entry point of every command: errors become a message and an exit code, and its output may go away.

The exit codes are defined in `errors.py`. A command whose product is files outlives stdout and stderr.
"""

import contextlib
import errno
import gc
import io
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from train.utils import processes
from train.utils.errors import (
    INTERRUPTED,
    READER_GONE,
    RUN_AGAIN,
    USER_ERROR,
    EarlyEnd,
    UserError,
    file_error,
    memory_error,
    text_of,
)

PRINT_SECONDS = 1.0  # in which rank 0 prints, before a launcher ends it because another rank has exited


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and exit. A `UserError` is printed without a traceback and exits with `USER_ERROR`.

    So are errors of the file system, and a lack of memory in a single process. In a job of several processes, any
    other error is printed with its rank first.
    """
    _protect_output()
    try:
        main()
        sys.stdout.flush()
    except SystemExit:
        _flush()
        raise
    except KeyboardInterrupt:
        _flush()
        sys.exit(INTERRUPTED)
    except UserError as error:
        _exit_with_user_error(str(error))
    except EarlyEnd as end:
        if processes.rank() == 0:
            print(end, file=sys.stderr, flush=True)
        restarts_failures = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        code = 0 if end.code == RUN_AGAIN and restarts_failures else end.code
        if processes.rank() != 0 and code != 0:
            time.sleep(PRINT_SECONDS)
        processes.exit_process(code)
    except Exception as error:
        _exit_if_unreadable()
        sentence = file_error(error)
        if sentence is None and processes.world_size() == 1:
            sentence = memory_error(error)
        if sentence is not None:
            _exit_with_user_error(sentence)
        if processes.world_size() > 1:
            processes.exit_with_error(error)
        raise
    _exit_if_unreadable()  # a library may have caught the error
    if processes.world_size() > 1:
        processes.exit_process()
    gc.freeze()  # the interpreter would search all objects for garbage before it exits: a third of a second
    sys.exit(0)


def outlive_output() -> None:
    """Continue when stdout can no longer be written, for a command whose product is files; the loss is reported once.

    Where a full disk has room again, the output continues.
    """
    for output in _outputs.values():
        output.survives = output.reports = True


class _Output(io.FileIO):
    """The file of stdout or stderr, which drops what can no longer be written."""

    def __init__(self, number: int, name: str) -> None:
        super().__init__(number, "w", closefd=False)
        self.failure: OSError | None = None
        self.label = name
        self.survives = name == "stderr"  # otherwise the first failure is raised
        self.reports = False  # on the other of the two

    def write(self, data: Any) -> int:
        gone = self.failure is not None and (not self.survives or self.failure.errno == errno.EPIPE)
        try:
            while not gone:
                if (written := super().write(data)) is not None:
                    return written
                select.select([], [self], [])  # another program has made a terminal non-blocking
        except OSError as error:
            first, self.failure = self.failure is None, error
            if error.errno == errno.EPIPE:  # for libraries and processes that write to the same file
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
            if not self.survives:
                raise
            other = "stdout" if self.label == "stderr" else "stderr"
            if first and self.reports and other in _outputs and _outputs[other].failure is None:
                sentence = f"{self.label} cannot be written ({error.strerror}): the run continues without it"
                print(sentence, file=getattr(sys, other), flush=True)
        return len(data)


_outputs: dict[str, _Output] = {}


def _protect_output() -> None:
    """Have stdout and stderr drop what cannot be written, and escape characters that their encoding does not have."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed, as by >&-: the next file that is opened would get the number, and the output
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        if stream is not getattr(sys, f"__{name}__") or stream.fileno() != number:
            continue  # a notebook's or a test's own
        stream.flush()
        raw = _outputs[name] = _Output(number, name)
        unbuffered = stream.write_through  # python -u
        protected = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=unbuffered,
        )
        setattr(sys, name, protected)


def _flush() -> None:
    """Flush stdout, so that nothing is left to fail when the interpreter exits."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()


def _exit_if_unreadable() -> None:
    """Exit if nobody can read what the command prints."""
    stdout = _outputs.get("stdout")
    if stdout is None or stdout.failure is None or stdout.survives:
        return
    if stdout.failure.errno == errno.EPIPE:
        sys.exit(READER_GONE)
    _exit_with_user_error(f"stdout cannot be written: {stdout.failure.strerror}")


def _exit_with_user_error(message: str) -> NoReturn:
    """Print the message once per machine: the other ranks wait, and print it only if they are still running then."""
    _flush()
    if "tqdm" in sys.modules:  # the bars would be drawn once more, over the message
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", [])):
            bar.close()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(processes.GRACE_SECONDS)
        message = f"rank {processes.rank()}: {message}"
    print(f"error: {text_of(message)}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)
