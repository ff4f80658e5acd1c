"""What a person did wrong, said in a sentence."""

import errno
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from train.utils import failure

# What the file system refuses for reasons that are the person's to mend, not the program's.
REFUSALS = {errno.EACCES, errno.EDQUOT, errno.EISDIR, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}


class UserError(Exception):
    """A mistake in what was asked: the message names the key, the value and the remedy."""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main`; a `UserError` becomes its sentence on stderr and exit code 2, never a traceback.

    Any other error names its rank first, in a job of several processes.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in REFUSALS:
            _fail(f"{error.filename or 'the file system'}: {error.strerror}")
        if failure.job()[1] > 1:
            failure.end(error)
        raise
    if failure.job()[1] > 1:
        failure.leave()
    gc.freeze()  # what is left goes with the process; to look for garbage in it first takes a third of a second
    sys.exit(0)


def _fail(sentence: str) -> NoReturn:
    """Once per machine, not once per process: the others speak only if they alone had to, and are still there."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(failure.PATIENCE_SECONDS)
        sentence = f"rank {failure.job()[0]}: {sentence}"
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(2)
