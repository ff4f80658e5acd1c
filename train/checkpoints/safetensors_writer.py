"""A safetensors file written tensor by tensor, so that no process holds a full model in order to save it.

The library's own `save_file` takes all tensors at once; the bytes are the same.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from train.checkpoints.digests import PIECE_BYTES, TensorDigest

ITEM_BYTES = 4  # fp32


class TensorFile(AbstractContextManager):
    """Writer of fp32 tensors, in any order, into a file whose names and shapes are known in advance.

    The format: https://github.com/huggingface/safetensors
    """

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: list(shapes[name]) for name in sorted(shapes)}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self.starts: dict[str, int] = {}
        end = 0
        for name, shape in self.shapes.items():
            self.starts[name], end = end, end + torch.Size(shape).numel() * ITEM_BYTES
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [self.starts[name], end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.file = path.open("wb")
        self.file.write(len(encoded).to_bytes(8, "little") + encoded)
        self.data = self.file.tell()
        self.missing = set(self.shapes)

    def write(self, name: str, tensor: torch.Tensor) -> TensorDigest:
        """Write a tensor, and return the digest of its bytes."""
        assert list(tensor.shape) == self.shapes[name], f"{name} is {list(tensor.shape)}, not {self.shapes[name]}"
        assert tensor.dtype == torch.float32
        self.file.seek(self.data + self.starts[name])
        values = tensor.contiguous().numpy().astype("<f4", copy=False).reshape(-1)
        digest = TensorDigest()
        step = PIECE_BYTES // ITEM_BYTES
        for start in range(0, values.size, step):
            piece = values[start : start + step]
            digest.update(piece)
            self.file.write(piece.data)
        self.missing.remove(name)
        return digest

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        assert kind is not None or not self.missing, f"never written: {sorted(self.missing)}"
