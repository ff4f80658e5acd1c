"""Schema of `memory.json`: the bytes of tensors, by category, over one step. Imports no torch."""

from dataclasses import dataclass, fields
from pathlib import Path

from train.utils.errors import UserError
from train.utils.files import from_json, read_json

SCHEMA = 1


@dataclass(frozen=True)
class CategoryBytes:
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int


CATEGORIES = tuple(field.name for field in fields(CategoryBytes))


@dataclass(frozen=True)
class Point(CategoryBytes):
    """The most that is allocated at one time in one of the intervals that a step is divided into."""

    phase: str
    event: int  # allocations and releases of the step before this point


@dataclass(frozen=True)
class MemoryProfile:
    schema: int
    peak_bytes: int
    at_peak: CategoryBytes
    over_step: list[Point]


def read_memory(run_folder: Path) -> MemoryProfile | None:
    """Read the `profile/memory.json` of a run, or return None where there is no such file."""
    file = run_folder / "profile" / "memory.json"
    if not file.is_file():
        return None
    content = read_json(file)
    if isinstance(content, dict) and content.get("schema", SCHEMA) != SCHEMA:
        raise UserError(f"{file} has schema {content['schema']!r}; this version reads schema {SCHEMA}")
    return from_json(MemoryProfile, content, file, "python -m train --profile")
