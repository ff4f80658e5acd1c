"""Time and memory of generation: latency of the first and of each further token, tokens/s of a batch."""

import time
from itertools import pairwise
from statistics import median
from typing import Any

import psutil
import torch
from transformers.generation import BaseStreamer

from train.generate.decoding import Decoding
from train.metrics.peak_memory import peak_memory, reset_peak_memory
from train.metrics.summary import percentiles


class TokenTimer(BaseStreamer):
    """Streamer for `generate()` that records the time of the prompt and of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.memory_bytes = 0
        self._process = psutil.Process()

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.memory_bytes = max(self.memory_bytes, self._process.memory_info().rss)

    def end(self) -> None:
        pass

    @property
    def first_token_seconds(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def seconds_per_token(self) -> float:
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def measure_latency(
    model: Any, prompt_ids: torch.Tensor, new_tokens: int, rounds: int = 3, first_tokens: int = 20
) -> dict[str, Any]:
    """A run's metrics of inference: greedy generation from `prompt_ids` (B, T), `rounds` times after a warm-up.

    The latency is the median of the first tokens, prompt included; the time per further token is that of each round's
    mean. For the percentiles the first token alone is timed `first_tokens` times more, enough for the 95th.
    """
    runs = timed_rounds(model, prompt_ids, Decoding(new_tokens, temperature=0), rounds)
    alone = [timed(model, prompt_ids, Decoding(1, temperature=0)) for _ in range(first_tokens)]
    per_token = median(run.seconds_per_token for run in runs)
    first = [run.first_token_seconds for run in [*runs, *alone]]
    further = [after - before for run in runs for before, after in pairwise(run.times[1:])]
    return {
        "inference_latency_seconds": median(run.first_token_seconds for run in runs),
        "inference_seconds_per_token": per_token,
        "inference_tokens_per_second": 1 / per_token if per_token else None,
        "inference_percentiles": {
            "first_token": percentiles(first, p50=50, p95=95),
            "per_token": percentiles(further, p50=50, p95=95),
        },
    }


def measure_speed(model: Any, prompt_ids: torch.Tensor, decoding: Decoding, rounds: int = 3) -> dict[str, Any]:
    """Medians of generation from `prompt_ids` (B, T), `rounds` times after a warm-up, and its peak memory.

    Tokens per second are those of all sequences together, the prompt's time included.
    """
    reset_peak_memory(prompt_ids.device)
    runs = timed_rounds(model, prompt_ids, decoding, rounds)
    peak = peak_memory(prompt_ids.device)
    tokens = len(prompt_ids) * decoding.max_new_tokens
    # The peak of resident memory is that of loading the model.
    on_cpu = peak["peak_memory_kind"] == "rss"
    return {
        "batch_size": len(prompt_ids),
        "first_token_seconds": median(run.first_token_seconds for run in runs),
        "tokens_per_second": median(tokens / (run.times[-1] - run.times[0]) for run in runs),
        "memory_bytes": max(run.memory_bytes for run in runs) if on_cpu else peak["peak_memory_bytes"],
    }


def timed_rounds(model: Any, prompt_ids: torch.Tensor, decoding: Decoding, rounds: int) -> list[TokenTimer]:
    return [timed(model, prompt_ids, decoding) for _ in range(1 + rounds)][1:]


def timed(model: Any, prompt_ids: torch.Tensor, decoding: Decoding) -> TokenTimer:
    """One call of `generate()` that no end-of-text token ends early."""
    timer = TokenTimer()
    model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        streamer=timer,
        eos_token_id=None,
        **decoding.arguments(),
    )
    return timer
