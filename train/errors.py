"""What a person did wrong, said in a sentence."""

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

# What the file system refuses for reasons that are the person's to mend, not the program's.
REFUSALS = {errno.EACCES, errno.EDQUOT, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}


class UserError(Exception):
    """A mistake in what was asked: the message names the key, the value and the remedy."""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main`; a `UserError` becomes its sentence on stderr and exit code 2, never a traceback."""
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _fail(f"{error.filename or 'the file system'}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fail(sentence: str) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine, not once per process
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)
