"""Texts generated after prompts, in batches."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from train.generate.decoding import Decoding


def generate_text(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, decoding: Decoding, *, seed: int = 0
) -> str:
    """One continuation of `prompt`, prompt included."""
    return next(generate_texts(model, tokenizer, [prompt], decoding, seed=seed))[0]


def generate_texts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    decoding: Decoding,
    *,
    batch_size: int = 1,
    seed: int = 0,
    assistant: Any = None,
    streamer: BaseStreamer | None = None,
) -> Iterator[list[str]]:
    """The texts of each prompt, prompt included; an empty prompt is the start of a document.

    A batch's shorter prompts are padded on the left, with a static cache to the longest of all prompts. The seed is
    set once: the tokens sampled for a prompt depend on the prompts before it and in its batch. `assistant`, a smaller
    model with the same vocabulary, and `streamer` work on one sequence at a time only.
    """
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, ids))
    torch.manual_seed(seed)
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        width = longest if decoding.static_cache else max(map(len, batch))
        # The mask marks the padding, so its tokens do not matter.
        rows = torch.tensor([[tokenizer.eos_token_id] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        generated = model.generate(
            rows.to(model.device),
            attention_mask=mask.to(model.device),
            pad_token_id=tokenizer.eos_token_id,
            assistant_model=assistant,
            streamer=streamer,
            **decoding.arguments(),
        )
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        per_prompt = decoding.num_return_sequences
        yield from (texts[row * per_prompt : (row + 1) * per_prompt] for row in range(len(batch)))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    return tokenizer(prompt or tokenizer.eos_token).input_ids
