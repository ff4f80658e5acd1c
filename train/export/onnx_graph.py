"""A model as one ONNX graph: tokens and mask in, logits out, for batches and lengths of any size."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.utils.errors import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUTS = ("input_ids", "attention_mask")


def check_installed(dtype: str) -> None:
    """Raise a UserError for what cannot be, before a model is loaded."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx: needs {', '.join(missing)}; pip install 'gpt2flash[onnx]'")
    if dtype != "float32":
        raise UserError(
            f"--dtype {dtype}: the graph is fp32; leave it out, and have ONNX Runtime's tools make it smaller"
        )


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) tokens and mask, 0 where there is padding -> (B, T, V)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def write(path: Path, model: Any) -> None:
    """Write `model.onnx` for a model in fp32; weights beyond 2 GB go to a file beside it."""
    rows, length = 2, 8  # neither 1 nor the same: exporting takes such sizes for fixed
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=model.config.n_positions)}
    ids = torch.zeros(rows, length, dtype=torch.long)
    program = torch.onnx.export(
        _Logits(model).eval(),
        (ids, torch.ones_like(ids)),
        input_names=INPUTS,
        output_names=["logits"],
        dynamic_shapes=dict.fromkeys(INPUTS, sizes),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path)


def run(path: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, T, V) by ONNX Runtime on the CPU of tokens and mask (B, T)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return torch.from_numpy(logits)
