"""Command-line arguments: a mistake is answered in one line, with the nearest known flag."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from train.utils.errors import UserError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint to append to "unknown flag NAME" or "unknown key NAME"; empty where no known name is near."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises `UserError` instead of printing its usage.

    Flags cannot be abbreviated, and descriptions keep their line breaks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **kwargs}
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            kind = "flag" if flag.startswith("-") else "argument"
            raise UserError(
                f"unknown {kind} {flag}{did_you_mean(flag, self._option_string_actions)} (--help lists all)"
            )
        return namespace

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists all)")
