"""A folder of transformers' own GPT-2."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from train.export.checks import check_logits, logits_of, stock_config, write_tokenizer


def write(checkpoint: str, folder: Path, model: Any, dtype: str) -> list[str]:
    """Write the folder, with the field that older readers need (`n_ctx`); return what to report."""
    with torch.device("meta"):
        stock: Any = GPT2LMHeadModel(stock_config(model))
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    expected = logits_of(model)
    stock.to(getattr(torch, dtype)).save_pretrained(folder)
    config = folder / "config.json"
    fields = {**json.loads(config.read_text()), "n_ctx": model.config.n_positions}
    config.write_text(json.dumps(fields, indent=2) + "\n")
    tokenizer = write_tokenizer(checkpoint, folder, model)
    read_back = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    return [f"GPT2LMHeadModel in {dtype}", tokenizer, check_logits(logits_of(read_back), expected)]
