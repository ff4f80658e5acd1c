"""Entry point of every command: errors become a message and an exit code."""

import errno
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from train.utils import processes
from train.utils.errors import UserError

# Errors of the file system that the user can fix: no permission, a full disk, a wrong path.
USER_ERRNOS = {errno.EACCES, errno.EDQUOT, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main` and exit. A `UserError` is printed without a traceback and exits with code 2.

    In a job of several processes, any other error is printed with its rank first.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        _exit_with_user_error(str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in USER_ERRNOS:
            _exit_with_user_error(f"{error.filename or 'the file system'}: {error.strerror}")
        if processes.world_size() > 1:
            processes.exit_with_error(error)
        raise
    if processes.world_size() > 1:
        processes.exit_process()
    gc.freeze()  # the interpreter would search all objects for garbage before it exits: a third of a second
    sys.exit(0)


def _exit_with_user_error(message: str) -> NoReturn:
    """Print the message once per machine: the other ranks wait, and print it only if they are still running then."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(processes.GRACE_SECONDS)
        message = f"rank {processes.rank()}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
