"""Digests of a checkpoint: what its tensors and files were when they were written, to find what has changed since.

safetensors checks the header of a file only, so one flipped bit in a weight would train on in silence.

The digest is XXH3 with 128 bits. It finds what disks, memory and copies change by accident; it does not protect from a
person, who could write the digests as well. Of the digests in the dependencies it alone is faster than a disk: 11 GB/s
on a core that computes SHA-256 at 0.7 GB/s and CRC-32 at 1.5 GB/s.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from train.utils.errors import first_line

ALGORITHM: Literal["xxh3_128"] = "xxh3_128"
PIECE_BYTES = 1 << 20  # read, digested and checked at once: fits the cache of a core


@dataclass(frozen=True, kw_only=True)
class Digests:
    """Schema of the digests in `training_state.json`: of each tensor's bytes, of each other file of the folder, and of
    the training state itself.
    """

    tensors: dict[str, str]
    files: dict[str, str]
    algorithm: Literal["xxh3_128"] = ALGORITHM
    state: str | None = None  # `digest_of_state`; None in a checkpoint from before there was one


@dataclass(frozen=True)
class Fault:
    """What is wrong with a checkpoint, in a sentence.

    It is `damage` if the content was read and is not what was written. Otherwise it could not be read or understood
    (an error of the disk, another version's schema), and may be intact.
    """

    sentence: str
    is_damage: bool

    def __str__(self) -> str:
        return self.sentence


class TensorDigest:
    """The digest of a tensor, and whether all its values are finite, from one piece of it after another."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.finite = True

    def update(self, values: np.ndarray) -> None:
        """Add fp32 values, or bytes, (count,)."""
        self._hash.update(values.data)
        with np.errstate(all="ignore"):
            # A sum of finite values is mostly finite, and that of others never is; it is the cheaper test.
            self.finite = self.finite and bool(np.isfinite(values.sum()) or np.isfinite(values).all())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_of_file(path: Path) -> str:
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()


def digest_of_state(state: Mapping[str, Any]) -> str:
    """The digest of a training state as it is read from JSON, in canonical JSON and without this digest itself."""
    digests = {key: value for key, value in state["digests"].items() if key != "state"}
    content = json.dumps({**state, "digests": digests}, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128(content.encode()).hexdigest()


def has_changed(state: Any) -> bool:
    """Whether a training state, as it is read from JSON, has a digest of its own that is not its content's."""
    recorded = state.get("digests") if isinstance(state, dict) else None
    digest = recorded.get("state") if isinstance(recorded, dict) else None
    return digest is not None and digest != digest_of_state(state)


def faults_of_files(folder: Path, digests: Digests) -> Iterator[Fault]:
    """Each file besides the tensors' that is not what it was when it was written."""
    for name, digest in digests.files.items():
        try:
            if digest_of_file(folder / name) != digest:
                yield Fault(f"{folder / name} has changed since it was written", is_damage=True)
        except OSError as error:
            yield unreadable(folder / name, error)


def unreadable(path: Path, error: OSError) -> Fault:
    is_missing = isinstance(error, FileNotFoundError)
    return Fault(f"{path} cannot be read: {error.strerror or first_line(error)}", is_damage=is_missing)


def faults_of_tensors(path: Path, shapes: Mapping[str, Sequence[int]], digests: Digests | None) -> Iterator[Fault]:
    """Each tensor of a safetensors file that is not one of `shapes`, fp32, finite and unchanged.

    `digests` is None for a checkpoint that has none. Reads the file piece by piece, without mapping it: a sector that
    cannot be read is an error here, and would be a signal there.
    """
    try:
        header, data = _read_header(path)
        for name in sorted(shapes.keys() - header.keys()):
            yield Fault(f"{path}: {name} is missing", is_damage=digests is not None and name in digests.tensors)
        with path.open("rb") as file:
            for name, found in header.items():
                fault = _fault_of_header(name, found, shapes)
                start, end = found["data_offsets"]
                file.seek(data + start)
                digest = TensorDigest()
                for first in range(start, end, PIECE_BYTES):
                    digest.update(np.frombuffer(file.read(min(PIECE_BYTES, end - first)), "u1" if fault else "<f4"))
                differs = digests is not None and digests.tensors.get(name) != digest.hexdigest()
                if fault:  # if its digest is right, another version has written it so
                    yield Fault(f"{path}: {fault}", is_damage=differs)
                elif differs:
                    yield Fault(f"{path}: {name} has changed since it was written", is_damage=True)
                elif not digest.finite:
                    yield Fault(f"{path}: {name} holds NaN or infinity", is_damage=True)
    except OSError as error:
        yield unreadable(path, error)
    except SafetensorError as error:
        yield Fault(f"{path} is damaged: {first_line(error)}", is_damage=True)


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of a safetensors file in the order of their data, and where the data begins."""
    with safe_open(path, framework="np"):
        pass  # the library checks the header, and that the file has the length that it describes
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, dict[str, Any]] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])), 8 + size


def _fault_of_header(name: str, found: dict[str, Any], shapes: Mapping[str, Sequence[int]]) -> str | None:
    if name not in shapes:
        return f"{name} is not a tensor of this model and optimizer"
    if found["dtype"] != "F32":
        return f"{name} is {found['dtype']}, and checkpoints are F32"
    if found["shape"] != list(shapes[name]):
        return f"{name} has shape {found['shape']}, and the model needs {list(shapes[name])}"
    return None
