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
    """Schema of the digests in `training_state.json`: of each tensor's bytes, and of each other file of the folder."""

    tensors: dict[str, str]
    files: dict[str, str]
    algorithm: Literal["xxh3_128"] = ALGORITHM


class TensorDigest:
    """The digest of a tensor, and whether all its values are finite, from one piece of it after another."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        self.finite = True

    def update(self, values: np.ndarray) -> None:
        """Add fp32 values, (count,)."""
        self._hash.update(values.data)
        with np.errstate(all="ignore"):
            # A sum of finite values is mostly finite, and that of others never is; it is the cheaper test.
            self.finite = self.finite and bool(np.isfinite(values.sum()) or np.isfinite(values).all())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_of_file(path: Path) -> str:
    return xxhash.xxh3_128(path.read_bytes()).hexdigest()


def faults_of_files(folder: Path, digests: Digests) -> Iterator[str]:
    """A sentence for each file besides the tensors' that is not what it was when it was written."""
    for name, digest in digests.files.items():
        try:
            if digest_of_file(folder / name) != digest:
                yield f"{folder / name} has changed since it was written"
        except OSError as error:
            yield f"{folder / name} cannot be read: {error.strerror}"


def faults_of_tensors(path: Path, shapes: Mapping[str, Sequence[int]], digests: Digests | None) -> Iterator[str]:
    """A sentence for each tensor of a safetensors file that is not one of `shapes`, fp32, finite and unchanged.

    `digests` is None for a checkpoint that has none. Reads the file piece by piece, without mapping it: a sector that
    cannot be read is an error here, and would be a signal there.
    """
    try:
        header, data = _read_header(path)
        for name in sorted(shapes.keys() - header.keys()):
            yield f"{path}: {name} is missing"
        with path.open("rb") as file:
            for name, found in header.items():
                if fault := _fault_of_header(name, found, shapes):
                    yield f"{path}: {fault}"
                    continue
                start, end = found["data_offsets"]
                file.seek(data + start)
                digest = TensorDigest()
                for first in range(start, end, PIECE_BYTES):
                    digest.update(np.frombuffer(file.read(min(PIECE_BYTES, end - first)), dtype="<f4"))
                if digests is not None and digests.tensors.get(name) != digest.hexdigest():
                    yield f"{path}: {name} has changed since it was written"
                elif not digest.finite:
                    yield f"{path}: {name} holds NaN or infinity"
    except OSError as error:
        yield f"{path} cannot be read: {error.strerror or first_line(error)}"
    except SafetensorError as error:
        yield f"{path} is damaged: {first_line(error)}"


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
