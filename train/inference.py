"""A trained folder at work: load it, complete a prompt, time it."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashForCausalLM
from train.errors import UserError
from train.tokens import gpt2_tokenizer


@dataclass(frozen=True)
class Latency:
    """Seconds to the first token (prompt included), seconds for each further one, and tokens per second over all."""

    first_token: float
    per_token: float
    tokens_per_second: float


def load(folder: str | Path, dtype: str = "auto") -> tuple[Any, PreTrainedTokenizerBase]:
    """Model (in evaluation mode, on this machine's accelerator) and tokenizer of any GPT-2 folder, a run's included.

    A folder without a tokenizer gets GPT-2's own.

    Raises:
        UserError: when the folder is not there or is no GPT-2.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"--checkpoint {folder}: there is no such folder")
    if not (path / "config.json").exists():
        raise UserError(f"--checkpoint {folder}: has no config.json; name a step-N folder or a finished run's folder")
    try:
        model: Any = GPT2FlashForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        if (path / "tokenizer_config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(path)
        else:
            tokenizer = gpt2_tokenizer(model_max_length=model.config.n_positions)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--checkpoint {folder}: cannot be loaded: {str(error).splitlines()[0]}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    samples: int = 1,
) -> list[str]:
    """`samples` continuations of `prompt`, prompt included; temperature 0 takes the likeliest token each time."""
    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").to(model.device)
    choice: dict[str, Any] = {
        "do_sample": temperature > 0,
        "num_return_sequences": samples,
        "max_new_tokens": max_new_tokens,
    }
    if temperature > 0:
        choice |= {"temperature": temperature, "top_k": top_k}
    torch.manual_seed(seed)
    ids = model.generate(**inputs, **choice)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def measure_latency(model: Any, prompt_ids: torch.Tensor, new_tokens: int, rounds: int = 3) -> Latency:
    """Greedy generation from `prompt_ids` (batch, length), median of `rounds` after one that is not counted."""

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), do_sample=False,
                       min_new_tokens=tokens, max_new_tokens=tokens)  # fmt: skip
        if prompt_ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(2)
    first = median(seconds(1) for _ in range(rounds))
    whole = median(seconds(new_tokens) for _ in range(rounds))
    return Latency(first, (whole - first) / (new_tokens - 1), prompt_ids.shape[0] * new_tokens / whole)
