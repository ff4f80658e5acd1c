"""Errors that a user can fix, and the one-line summary of any other error."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An invalid request: the message names the key, its value and the remedy."""


def first_line(error: BaseException) -> str:
    """First line of the error's message, or the name of its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean NAME? " with the nearest known name, empty where none is near: the start of a remedy."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {nearest[0]}? " if nearest else ""
