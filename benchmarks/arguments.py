"""The flags of the benchmarks: most are a number, several numbers, or a size, and have a default."""

import argparse
from collections.abc import Iterable
from typing import Any

from train.checkpoints.loading import SIZES


def make_parser(
    description: str | None, size_choices: Iterable[str] = SIZES, **defaults: Any
) -> argparse.ArgumentParser:
    """A parser with a flag for each default, of its type. A default that is a list makes a flag of several values.

    `size_choices` are the choices of `--size`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        if name == "size":
            parser.add_argument("--size", choices=list(size_choices), default=default)
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", nargs="+", type=type(default[0]), default=default)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser
