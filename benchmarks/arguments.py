"""The flags of the benchmarks: most are a number, several numbers, or a size, and have a default."""

from collections.abc import Iterable
from typing import Any

from train.checkpoints.loading import SIZES
from train.config.arguments import ArgumentParser, number


def make_parser(description: str | None, size_choices: Iterable[str] = SIZES, **defaults: Any) -> ArgumentParser:
    """A parser with a flag for each default, of its type. A default that is a list makes a flag of several values.

    Numbers must be above 0. `size_choices` are the choices of `--size`.
    """
    parser = ArgumentParser(description=description)
    for name, default in defaults.items():
        nargs, example = ("+", default[0]) if isinstance(default, list) else (None, default)
        kind: Any = str if isinstance(example, str) else number(type(example), above=0)
        choices = list(size_choices) if name == "size" else None
        parser.add_argument(f"--{name}", nargs=nargs, type=kind, choices=choices, default=default)
    return parser
