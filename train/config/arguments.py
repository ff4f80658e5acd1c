"""Command-line arguments: dataclasses as flags, and each mistake answered in one line, with the nearest known flag.

A field made by `flag` is one flag. Its type, choices and bounds are those of its argparse argument.
"""

import argparse
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from train.utils.errors import UserError, did_you_mean, shortened

LARGEST = 2**53  # of whole numbers without a bound of their own: a float still counts to it
BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is a flag.

    `at_least`, `above`, `at_most` and `below` bound a number, `choices` are the accepted values, `tag` is for whoever
    reads the field, and anything else is an argument of `add_argument`.
    """
    return field(default=default, metadata={"help": help, **metadata})


def flags_of(group: type) -> list[Field]:
    """The fields of a dataclass that are flags."""
    return [each for each in fields(group) if "help" in each.metadata]


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that raises `UserError` instead of printing its usage.

    Flags cannot be abbreviated and may be written with hyphens; --help shows defaults, and descriptions as they are.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def add_flags(self, group: type, title: str | None = None) -> argparse._ArgumentGroup:
        """Add the flags of a dataclass as a group, under `title` or else its docstring."""
        arguments = self.add_argument_group(title or group.__doc__)
        types = get_type_hints(group)
        for each in flags_of(group):
            arguments.add_argument(f"--{each.name}", default=each.default, **_argument(each, types[each.name]))
        return arguments

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        args = [_underscored(_text(word)) for word in (sys.argv[1:] if args is None else args)]
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            kind = "flag" if name.startswith("-") else "argument"
            nearest = did_you_mean(name, self._option_string_actions)
            raise UserError(f"unknown {kind} {name}; {nearest}--help lists all")
        return namespace

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default that is a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_value = action.default not in (None, "") and not isinstance(action.default, bool | list | tuple)
        return super()._get_help_string(action) if is_value and "default: " not in (action.help or "") else action.help


def _argument(each: Field, annotation: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a field."""
    options = {key: value for key, value in each.metadata.items() if key not in (*BOUNDS, "tag")}
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    kind = kinds[0] if type(None) in get_args(annotation) else annotation
    if get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    elif kind is bool:
        options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    elif kind in (int, float) and "type" not in options:
        options["type"] = number(kind, **{key: each.metadata[key] for key in BOUNDS if key in each.metadata})
    elif kind is Path:
        options["type"] = Path
    return options


def _boolean(text: str) -> bool:
    values = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def number(kind: type[int] | type[float], **bounds: float) -> Callable[[str], Any]:
    """The `type` of an argument that is a finite number; `bounds` are those of `flag`."""
    expected = " and ".join(f"{key.replace('_', ' ')} {bound:,}" for key, bound in bounds.items())

    def parse(text: str) -> float:
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, OverflowError):  # no number, or one beyond what any can be
            finite = False
        if not finite:
            expected_kind = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shortened(text)} is not {expected_kind}")
        if kind is int and abs(value) > LARGEST and not bounds.keys() & {"at_most", "below"}:
            raise argparse.ArgumentTypeError(f"{text[:40]} is larger than any count here can be ({LARGEST:,})")
        if not all(BOUNDS[key](value, bound) for key, bound in bounds.items()):
            raise argparse.ArgumentTypeError(f"{text[:40]} must be {expected}")
        return value

    return parse


def _text(word: str) -> str:
    """An argument, which must be UTF-8: it may become text for a model, or be recorded in JSON."""
    try:
        word.encode()
    except UnicodeEncodeError:
        flag, _, value = word.partition("=") if word.startswith("--") else ("", "", word)
        raise UserError(f"{flag or 'an argument'}: {os.fsencode(value)!r} is not UTF-8; write it in UTF-8") from None
    return word


def duration(text: str) -> float:
    """The `type` of an argument that is a time: seconds of "H:M:S", "M:S" or Slurm's "D-H:M:S"."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a duration; write it as H:M:S, for example 11:50:00, or D-H:M:S"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _underscored(word: str) -> str:
    return re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)
