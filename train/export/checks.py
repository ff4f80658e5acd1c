"""Whether an exported model computes the original's logits, and what every format writes beside the weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

from train.checkpoints.loading import load_tokenizer

TOLERANCE = 1e-5  # of the logits, relative to the largest
SAMPLE_TOKENS = 64  # in each of the two rows that are compared


def sample_ids(model: Any) -> Tensor:
    """Two rows of random tokens, (2, T): the same for every model with the same vocabulary and positions."""
    length = min(SAMPLE_TOKENS, model.config.n_positions)
    return torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Logits of `sample_ids`, (2, T, V)."""
    return model(sample_ids(model)).logits


def largest_difference(logits: Tensor, reference: Tensor) -> float:
    return (logits - reference).abs().max().item()


def check_logits(written: Tensor, reference: Tensor) -> str:
    """Raise unless the logits of what was written equal the reference; return the check's result as text."""
    difference = largest_difference(written, reference)
    if not difference <= TOLERANCE * max(1.0, reference.abs().max().item()):
        raise RuntimeError(f"the exported model gives different results: logits differ by {difference:.1e}")
    return f"logits checked, largest difference {difference:.1e}"


def write_tokenizer(checkpoint: str, folder: Path, model: Any) -> str:
    """Write the checkpoint's tokenizer or GPT-2's; return what to report about it."""
    tokenizer = load_tokenizer(checkpoint, model.config, flag="CKPT")
    if tokenizer is None:
        return f"no tokenizer: the model has none, and its {model.config.vocab_size} tokens are not GPT-2's"
    tokenizer.save_pretrained(folder)
    return "with its tokenizer"


def stock_config(model: Any) -> GPT2Config:
    """The model's configuration as transformers' own GPT-2 has it."""
    fields = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "dtype", "loss_chunk_size", "transformers_version"):
        fields.pop(key, None)
    return GPT2Config(**fields)
