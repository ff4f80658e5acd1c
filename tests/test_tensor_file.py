"""Files written tensor by tensor are those that safetensors itself would write."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train.checkpoints.safetensors_writer import TensorFile

TENSORS = {
    "transformer.wte.weight": torch.randn(7, 3),
    "transformer.h.10.ln_1.bias": torch.randn(5),
    "transformer.h.2.ln_1.bias": torch.randn(5),
    "transposed": torch.randn(4, 6).T,
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
}
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("order", [sorted(TENSORS), sorted(TENSORS, reverse=True)])
def test_the_bytes_are_those_of_the_library(tmp_path: Path, order: list[str]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    with TensorFile(tmp_path / "ours", SHAPES) as file:
        for name in order:
            file.write(name, TENSORS[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    loaded = load_file(tmp_path / "ours")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="scalar"), TensorFile(tmp_path / "file", SHAPES) as file:
        file.write("scalar", torch.ones(2))
    with pytest.raises(AssertionError, match="never written"), TensorFile(tmp_path / "file", SHAPES):
        pass
