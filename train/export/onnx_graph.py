"""A model as one ONNX graph: tokens and mask in, logits out, for batches and lengths of any size."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.export.checks import check_logits, sample_ids, stock_config, write_tokenizer
from train.utils.errors import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUTS = ("input_ids", "attention_mask")


def check_installed(dtype: str) -> None:
    """Raise a `UserError` for what is impossible, before a model is loaded."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--format onnx: needs {', '.join(missing)}; pip install 'gpt2flash[onnx]'")
    if dtype != "float32":
        raise UserError(
            f"--dtype {dtype}: the graph is fp32; leave it out, and convert the graph with ONNX Runtime's tools"
        )


def write(checkpoint: str, folder: Path, model: Any, dtype: str) -> list[str]:
    """Write `model.onnx` with configuration and tokenizer beside it; return what to report."""
    file, ids = folder / "model.onnx", sample_ids(model)
    export_graph(file, model)
    stock_config(model).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer = write_tokenizer(checkpoint, folder, model)
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 2] = 0  # padding on the left, as in batches of prompts
    with torch.no_grad():
        reference = model(ids, attention_mask=mask).logits
    return ["model.onnx", tokenizer, check_logits(run(file, ids, mask)[mask == 1], reference[mask == 1])]


class _Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) tokens and mask, 0 for padding -> (B, T, V)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def export_graph(path: Path, model: Any) -> None:
    """Write the graph of an fp32 model; weights beyond 2 GB go to a file beside it."""
    rows, length = 2, 8  # neither 1 nor equal: the exporter treats such sizes as constants
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
    """Logits (B, T, V) that ONNX Runtime computes on the CPU from tokens and mask (B, T)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return torch.from_numpy(logits)
