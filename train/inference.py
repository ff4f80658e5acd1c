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
from train.tokens import VOCABULARY_SIZE, gpt2_tokenizer


@dataclass(frozen=True)
class Latency:
    """Seconds to the first token (prompt included), and seconds for each further one."""

    first_token: float
    per_token: float


def load_model(folder: str | Path, dtype: str = "auto") -> Any:
    """The model of any GPT-2 folder, a run's included: in evaluation mode, on this machine's accelerator.

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
    except Exception as error:  # a foreign or damaged folder fails in many ways
        raise UserError(f"--checkpoint {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_tokenizer(folder: str | Path, model: Any) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, else GPT-2's own if the model has its vocabulary.

    Raises:
        UserError: when there is none that fits.
    """
    if (Path(folder) / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    if model.config.vocab_size < VOCABULARY_SIZE:
        raise UserError(
            f"--checkpoint {folder}: has no tokenizer, and its {model.config.vocab_size} tokens are not GPT-2's; "
            "save one into it"
        )
    return gpt2_tokenizer(model_max_length=model.config.n_positions)


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
    return Latency(first, (whole - first) / (new_tokens - 1))
