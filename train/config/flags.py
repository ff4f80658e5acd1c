"""Dataclasses as command-line flags: groups in --help, the same flags in a YAML file, one line for each mistake.

A field made by `flag` is one flag. Its type, choices and bounds are those of its argparse argument, so that a value is
parsed, or refused, in the same way on the command line and in a file.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from train.utils.errors import UserError, did_you_mean

NULL = ("", "null", "~")  # YAML's spellings of "not set", which leave a flag without a default unset


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is a flag.

    `at_least`, `above`, `at_most` and `below` bound a number, `choices` are the accepted values, and anything else is
    an argument of `add_argument`.
    """
    return field(default=default, metadata={"help": help, **metadata})


class FlagParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are a `UserError` of one line, with the nearest name for an unknown flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def add_flags(self, group: type) -> None:
        """Add the flags of a dataclass as a group, under the first line of its docstring."""
        title = (group.__doc__ or group.__name__).splitlines()[0].rstrip(".")
        arguments = self.add_argument_group(title)
        types = get_type_hints(group)
        for each in fields(group):
            arguments.add_argument(f"--{each.name}", **_argument(each, types[each.name]))

    def parse_flags(self, argv: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """`parse_args`, with hyphens accepted in place of the underscores of a flag's name.

        Raises:
            UserError: for an unknown flag, or a value that its flag refuses.
        """
        argv = sys.argv[1:] if argv is None else argv
        found, unknown = self.parse_known_args(list(map(_underscored, argv)), namespace)
        if unknown:
            name, known = unknown[0].partition("=")[0], list(self._option_string_actions)
            raise UserError(f"{name}: unknown argument; {did_you_mean(name, known)}{self.prog} --help lists the flags")
        return found

    def parse_yaml(self, file: Path, groups: Iterable[type]) -> argparse.Namespace:
        """The flags in a YAML file: `flag: value` lines, which may stand under the name of their group.

        Raises:
            UserError: for an unreadable file, an unknown key, or a value that its flag refuses.
        """
        try:
            words = [f"--{key}={value}" for key, value in _read_yaml(file, groups)]
            return self.parse_flags(words)
        except UserError as error:
            raise UserError(f"--config {file}: {error}") from None

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows each default that is a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "") else super()._get_help_string(action)


def _argument(each: Field, annotation: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a field."""
    options = {key: value for key, value in each.metadata.items() if key not in BOUNDS}
    bounds = {key: value for key, value in each.metadata.items() if key in BOUNDS}
    optional = type(None) in get_args(annotation)
    [kind] = [kind for kind in get_args(annotation) if kind is not type(None)] if optional else [annotation]
    if get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    elif kind is bool:
        options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
    elif kind in (int, float):
        options["type"] = _number(kind, bounds)
    assert each.default is not MISSING
    return {"default": each.default, **options}


def _boolean(text: str) -> bool:
    values = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


BOUNDS: dict[str, tuple[Callable[[float, float], bool], str]] = {
    "at_least": (lambda value, bound: value >= bound, "at least"),
    "above": (lambda value, bound: value > bound, "above"),
    "at_most": (lambda value, bound: value <= bound, "at most"),
    "below": (lambda value, bound: value < bound, "below"),
}


def _number(kind: type[int] | type[float], bounds: dict[str, float]) -> Callable[[str], float]:
    expected = " and ".join(f"{BOUNDS[key][1]} {bound:,}" for key, bound in bounds.items())

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole number' if kind is int else 'number'}")
        if not all(BOUNDS[key][0](value, bound) for key, bound in bounds.items()):
            raise argparse.ArgumentTypeError(f"{text} must be {expected}")
        return value

    return parse


def _underscored(word: str) -> str:
    return re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)


def _read_yaml(file: Path, groups: Iterable[type]) -> list[tuple[str, str]]:
    """The (flag, value) pairs of a file, as they are written: argparse knows their types, YAML only guesses."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except FileNotFoundError:
        raise UserError("there is no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"holds a {type(values).__name__}; write one 'flag: value' a line")
    by_name = {group.__name__.lower(): {each.name: each for each in fields(group)} for group in groups}
    every = {name: each for flags in by_name.values() for name, each in flags.items()}
    found = []
    for key, value in values.items():
        flags, pairs = (by_name[key], value) if key in by_name and isinstance(value, dict) else (every, {key: value})
        for name, text in pairs.items():
            if name not in flags:
                where = "" if flags is every else f" in the group {key}"
                nearest = did_you_mean(name, [*every, *by_name] if flags is every else flags)
                raise UserError(f"{name}: unknown flag{where}; {nearest}--help lists the flags")
            if not isinstance(text, str):
                raise UserError(f"{name}: holds a {type(text).__name__}; write one value")
            if not (text in NULL and flags[name].default is None):
                found.append((name, text))
    return found
