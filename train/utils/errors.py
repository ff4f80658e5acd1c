"""Errors that a user can fix, and the one-line summary of any other error."""


class UserError(Exception):
    """An invalid request: the message names the key, its value and the remedy."""


def first_line(error: BaseException) -> str:
    """First line of the error's message, or the name of its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
