"""JSON without NaN, and read back: a file that is not JSON or not of a schema is refused with its key and value."""

import json
import math
from pathlib import Path
from typing import Any, TypeVar

from train.utils.errors import UserError

T = TypeVar("T")

EXPECTED = {
    "bool_type": "a boolean",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "string_type": "a string",
}
"""What pydantic's kinds of error mean in JSON's own words."""


def read_text(path: Path) -> str:
    """The content of a file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """JSON whose first line is `line` of `path`. NaN and Infinity, which Python writes by default, become null."""
    try:
        value = json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise UserError(f"{where}: broken JSON ({error.msg})") from None
    try:  # JSON can name a lone surrogate ("\\ud800"), which no file can hold
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} holds half a character (U+{ord(error.object[error.start]):04X} alone)") from None
    return value


def read_json(path: Path) -> Any:
    return parse_json(read_text(path), path)


def from_json(schema: type[T], value: Any, path: Path, writer: str) -> T:
    """`value`, which `path` holds, as an instance of the dataclass `schema` that `writer` writes.

    Types are not coerced, apart from integers where a float is expected. Keys that `schema` does not have are ignored.
    """
    from pydantic import TypeAdapter, ValidationError  # takes 0.1 s

    try:
        return TypeAdapter(schema).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key = f'"{".".join(map(str, first["loc"]))}"' if first["loc"] else "its content"
    if first["type"] == "missing":
        raise UserError(f"{path}: {key} is missing: it is not what {writer} writes")
    found = repr(first["input"])
    found = found if len(found) <= 80 else f"{found[:79]}…"
    expected = EXPECTED.get(first["type"], first["msg"])
    raise UserError(f"{path}: {key} is {found}, not {expected}: it is not what {writer} writes")


def json_safe(value: Any) -> Any:
    """The same value with every NaN and infinity, at any depth, as None: strict JSON has neither."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def _finite(text: str) -> float | None:
    """A JSON number as a float; None beyond a float's range ("1e999")."""
    value = float(text)
    return value if math.isfinite(value) else None
