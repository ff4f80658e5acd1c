"""What a person did wrong, said in a sentence."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake in what was asked: the message names the key, the value and the remedy."""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command's `main`; a `UserError` becomes its sentence on stderr and exit code 2, never a traceback."""
    try:
        main()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per machine, not once per process
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
