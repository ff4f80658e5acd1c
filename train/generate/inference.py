"""A trained folder at work: load it, write texts, time it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import CompileConfig, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from modeling_gpt2flash import GPT2FlashForCausalLM
from train.checkpoints import nanogpt
from train.checkpoints.loading import build_model, check_shards, gpt2s_tokenizer, own_tokenizer
from train.generate.growing_cache import growing_cache
from train.utils.devices import device_type, peak_memory, reset_peak_memory
from train.utils.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """How texts are written; `temperature` 0 takes the likeliest token each time, `top_k` 0 draws from all."""

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int = 50
    num_return_sequences: int = 1
    growing_cache: bool = True  # False: transformers' own, which is copied at each token
    static_cache: bool = False
    compiled: bool = False  # the step of a static cache, by torch.compile

    def options(self) -> dict[str, Any]:
        """What `generate()` has to be told, once: a cache is filled by the call."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_return_sequences": self.num_return_sequences,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": self.top_k}
        if self.static_cache:
            options |= {"cache_implementation": "static", "disable_compile": not self.compiled}
        elif self.growing_cache:
            options["past_key_values"] = growing_cache()
        if self.compiled and device_type() == "cpu":
            options["compile_config"] = CompileConfig(mode="default")
            options["compile_config"]._compile_all_devices = True  # left to itself, generate() compiles on GPUs only
        return options


@dataclass(frozen=True)
class Latency:
    """Seconds to the first token (prompt included), and seconds for each further one."""

    first_token: float
    per_token: float


@dataclass(frozen=True)
class Latencies:
    """Seconds of every first token and of every further one that was timed, and the medians of the rounds."""

    first_tokens: list[float]
    further_tokens: list[float]
    median: Latency


@dataclass(frozen=True)
class Speed:
    """One batch size measured: medians of some rounds, and the memory in use while writing."""

    batch_size: int
    first_token_seconds: float
    tokens_per_second: float  # of all sequences together, prompt's time included
    memory_bytes: int


class Stopwatch(BaseStreamer):
    """Handed to `generate()`, it notes when the prompt went in and when each token came out."""

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
    def latency(self) -> Latency:
        began, first, *_, last = self.times
        return Latency(first - began, (last - first) / (len(self.times) - 2))


def load_model(
    folder: str | Path, dtype: str = "auto", *, device: str | None = None, flag: str = "--checkpoint"
) -> Any:
    """The model of any GPT-2 folder, a run's included, or of nanoGPT's ckpt.pt, in evaluation mode.

    Args:
        folder: the folder, or the file.
        dtype: a name of torch's, or "auto" for that of the file.
        device: None: this machine's accelerator if there is one.
        flag: by which it was named, for the messages.

    Raises:
        UserError: when the folder is not there or is no GPT-2.
    """
    path = Path(folder)
    device = device or device_type()
    if nanogpt.is_named(str(folder)):
        read: Any = build_model(str(folder), nanogpt.read_config(path), "sdpa")
        return read.to(device, getattr(torch, "float32" if dtype == "auto" else dtype)).eval()
    if not path.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder")
    if not (path / "config.json").exists():
        raise UserError(f"{flag} {folder}: has no config.json; name a step-N folder or a finished run's folder")
    check_shards(path)
    try:
        model: Any = GPT2FlashForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:  # a foreign or damaged folder fails in many ways
        raise UserError(f"{flag} {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    return model.to(device).eval()


def load_tokenizer(folder: str | Path, model: Any) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, else GPT-2's own if the model has its vocabulary.

    Raises:
        UserError: when there is none that fits.
    """
    tokenizer = own_tokenizer(str(folder), model.config.n_positions) or gpt2s_tokenizer(model.config)
    if tokenizer is None:
        raise UserError(
            f"--checkpoint {folder}: has no tokenizer, and its {model.config.vocab_size} tokens are not GPT-2's; "
            "save one into it"
        )
    return tokenizer


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
    decoding = Decoding(max_new_tokens, temperature, top_k, samples)
    return next(write(model, tokenizer, [prompt], decoding, seed=seed))


def write(
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
    """For each prompt its texts, prompt included; an empty prompt is the start of a document.

    Args:
        model: it writes.
        tokenizer: the model's.
        prompts: `batch_size` of them are written at a time, shorter ones padded on the left.
        decoding: how.
        batch_size: as said; in a static cache all batches have the length of the longest prompt of all.
        seed: of the drawing, set once: what is drawn for a prompt depends on those before it and in its batch.
        assistant: a smaller model of the same vocabulary that proposes tokens; one sequence at a time only.
        streamer: gets the tokens as they are chosen; one sequence at a time only.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, ids))
    torch.manual_seed(seed)
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size]
        width = longest if decoding.static_cache else max(map(len, batch))
        # Padding is what the mask says; any token can stand there.
        rows = torch.tensor([[tokenizer.eos_token_id] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        written = model.generate(
            rows.to(model.device),
            attention_mask=mask.to(model.device),
            pad_token_id=tokenizer.eos_token_id,
            assistant_model=assistant,
            streamer=streamer,
            **decoding.options(),
        )
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        per_prompt = decoding.num_return_sequences
        yield from (texts[row * per_prompt : (row + 1) * per_prompt] for row in range(len(batch)))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    return tokenizer(prompt or tokenizer.eos_token).input_ids


def measure_latency(
    model: Any, prompt_ids: torch.Tensor, new_tokens: int, rounds: int = 3, first_tokens: int = 20
) -> Latencies:
    """Greedy generation from `prompt_ids` (batch, length), `rounds` times after one that is not counted.

    The first token alone is timed `first_tokens` times more: of few values there is no 95th percentile.
    """
    decoding = Decoding(new_tokens, temperature=0)
    runs = [timed(model, prompt_ids, decoding) for _ in range(1 + rounds)][1:]
    alone = [timed(model, prompt_ids, Decoding(1, temperature=0)).times for _ in range(first_tokens)]
    latencies = [run.latency for run in runs]
    return Latencies(
        first_tokens=[each.first_token for each in latencies] + [first - began for began, first in alone],
        further_tokens=[after - before for run in runs for before, after in pairwise(run.times[1:])],
        median=Latency(median(each.first_token for each in latencies), median(each.per_token for each in latencies)),
    )


def measure_speed(model: Any, prompt_ids: torch.Tensor, decoding: Decoding, rounds: int = 3) -> Speed:
    """Generation from `prompt_ids` (batch, length), after a round that is not counted; `decoding` says how."""
    reset_peak_memory(prompt_ids.device)
    runs = [timed(model, prompt_ids, decoding) for _ in range(1 + rounds)][1:]
    peak = peak_memory(prompt_ids.device)
    tokens = len(prompt_ids) * decoding.max_new_tokens
    return Speed(
        batch_size=len(prompt_ids),
        first_token_seconds=median(each.latency.first_token for each in runs),
        tokens_per_second=median(tokens / (each.times[-1] - each.times[0]) for each in runs),
        # The peak of resident memory is that of loading the model.
        memory_bytes=max(each.memory_bytes for each in runs)
        if peak["peak_memory_kind"] == "rss"
        else peak["peak_memory_bytes"],
    )


def timed(model: Any, prompt_ids: torch.Tensor, decoding: Decoding) -> Stopwatch:
    """One run to the very end: no token stops it."""
    stopwatch = Stopwatch()
    model.generate(
        prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        streamer=stopwatch,
        eos_token_id=None,
        **decoding.options(),
    )
    return stopwatch
