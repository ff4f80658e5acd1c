"""One training step of each tool (forward, backward, clipping, AdamW), from the same weights.

    baseline           ours as `--run_type baseline`: eager attention, fp32, full logits, AdamW not fused
    optimized          ours with attention `auto`, the chunked loss, fused AdamW and GELU, freed memory kept, and
                       blocks compiled as by `--torch_compile`
    uncompiled         the same without compilation
    checkpointed       optimized with full activation checkpointing
    selective          optimized with selective activation checkpointing
    hf-eager, hf-sdpa  stock `GPT2LMHeadModel` with fused AdamW, the default of transformers' Trainer
    hf-compiled        hf-sdpa with `torch.compile`
    nanogpt            `model.py` of a nanoGPT checkout with its own optimizer; its vocabulary has 50,304 tokens
    nanogpt-compiled   the same with `torch.compile`, as in its `train.py`

`NAME:float32` and `NAME:bfloat16` (autocast) choose a side's precision. No side has dropout; parameter groups and the
gradient norm of clipping are the same in all.
"""

import contextlib
import importlib.util
import math
import resource
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.arguments import make_parser
from benchmarks.rounds import Round, measure
from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from modeling_gpt2flash.attention import choose_attention
from train.checkpoints.loading import SIZES
from train.config.arguments import ArgumentParser
from train.engines.transforms import (
    checkpoint_arguments,
    checkpoint_blocks,
    compile_blocks,
    fuse_gelu,
    keep_freed_memory,
)
from train.optim.parameter_groups import build_optimizer
from train.utils.devices import device_type
from train.utils.errors import UserError
from train.utils.third_party_warnings import silence_third_party_warnings

SHAPES = SIZES | {"small": (4, 4, 256, 0.035)}  # 16M parameters, of which 12.9M are the vocabulary's
VOCABULARY = 50257
DTYPES = ("float32", "bfloat16")
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0
WARM_UP_STEPS = 3  # the first allocates and compiles; the losses of the others depend on the first update
# Relative, of the losses in those steps. The order of sums differs; bf16 has 8 bits of mantissa, and AdamW's first
# step turns the sign of every gradient into a step of the learning rate.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-3}


@dataclass(frozen=True)
class Case:
    """The model and the batch of all sides: `batch` sequences of `block` tokens."""

    size: str
    block: int
    batch: int
    device: str
    nanogpt: Path | None

    @property
    def shape(self) -> dict[str, Any]:
        n_layer, n_head, n_embd, deviation = SHAPES[self.size]
        dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": max(1024, self.block)}
        return {**sizes, "initializer_range": deviation, **dropout}

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Random input ids and the next token of each, both (batch, block)."""
        drawn = torch.randint(VOCABULARY, (self.batch, self.block + 1), generator=torch.Generator().manual_seed(1))
        drawn = drawn.to(self.device)
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


@dataclass(frozen=True)
class Side:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]  # input ids and next tokens, (B, T) -> the mean, ()
    dtype: torch.dtype
    padding: int = 0  # tokens of the vocabulary beyond GPT-2's

    def step(self, ids: Tensor, targets: Tensor) -> Tensor:
        """One optimizer update; the loss before it."""
        with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(ids, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def stock_model(case: Case, attention: str) -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel._from_config(GPT2Config(**case.shape), attn_implementation=attention)


def ours(
    case: Case,
    dtype: torch.dtype,
    attention: str,
    loss_chunk_size: int,
    fused: bool,
    compiled: bool = False,
    activation_checkpointing: str = "none",
) -> Side:
    config = GPT2FlashConfig(**case.shape, loss_chunk_size=loss_chunk_size)
    chosen, _ = choose_attention(attention, torch.device(case.device).type, dtype, config.n_embd // config.n_head)
    model = GPT2FlashForCausalLM._from_config(config, attn_implementation=chosen)
    model.load_state_dict(stock_model(case, "eager").state_dict())
    model.to(case.device).train()
    if fused:
        fuse_gelu(model)
        if torch.device(case.device).type == "cpu":
            keep_freed_memory()
    if compiled:
        selective = activation_checkpointing == "selective"
        compile_blocks(model, checkpoint_arguments("selective") if selective else None)
    if activation_checkpointing == "full":
        checkpoint_blocks(model, checkpoint_arguments("full"))

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return model(ids, shift_labels=targets, use_cache=False, skip_logits=True).loss

    return Side(model, _adamw(model, fused), loss, dtype)


def stock(case: Case, dtype: torch.dtype, attention: str, compiled: bool = False) -> Side:
    model = stock_model(case, attention).to(case.device).train()
    if compiled:
        model.compile()

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return model(ids, labels=targets, shift_labels=targets, use_cache=False).loss

    return Side(model, _adamw(model, fused=True), loss, dtype)


def nanogpt(case: Case, dtype: torch.dtype, compiled: bool = False) -> Side:
    module = _nanogpt_module(case.nanogpt)
    n_layer, n_head, n_embd, _ = SHAPES[case.size]
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": case.shape["n_positions"]}
    with contextlib.redirect_stdout(None):
        model = module.GPT(module.GPTConfig(**shape))
    own, given = model.state_dict(), stock_model(case, "eager").state_dict()
    for name, weight in given.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T  # Conv1D's layout to Linear's
        own[name].zero_()[: len(weight)].copy_(weight)
    model.to(case.device).train()
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, torch.device(case.device).type)
    if compiled:
        model.compile()
    padding = len(own["transformer.wte.weight"]) - VOCABULARY
    return Side(model, optimizer, lambda ids, targets: model(ids, targets)[1], dtype, padding)


def _adamw(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    return build_optimizer(
        model, "adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=fused
    )


def _nanogpt_module(folder: Path | None) -> Any:
    if folder is None:
        raise UserError("a nanogpt side needs a checkout of nanoGPT: name its folder with --nanogpt")
    if not (folder / "model.py").exists():
        raise UserError(f"--nanogpt {folder}: there is no model.py in it; give a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


OPTIMIZED: dict[str, Any] = {"attention": "auto", "loss_chunk_size": GPT2FlashConfig.loss_chunk_size, "fused": True}
SIDES: dict[str, Callable[[Case, torch.dtype], Side]] = {
    "baseline": partial(ours, attention="eager", loss_chunk_size=0, fused=False),
    "optimized": partial(ours, **OPTIMIZED, compiled=True),
    "uncompiled": partial(ours, **OPTIMIZED),
    "checkpointed": partial(ours, **OPTIMIZED, compiled=True, activation_checkpointing="full"),
    "selective": partial(ours, **OPTIMIZED, compiled=True, activation_checkpointing="selective"),
    "hf-eager": partial(stock, attention="eager"),
    "hf-sdpa": partial(stock, attention="sdpa"),
    "hf-compiled": partial(stock, attention="sdpa", compiled=True),
    "nanogpt": nanogpt,
    "nanogpt-compiled": partial(nanogpt, compiled=True),
}


def build(name: str, case: Case) -> Side:
    """The side called "NAME:DTYPE"."""
    side, _, dtype = name.partition(":")
    return SIDES[side](case, getattr(torch, dtype))


def resolve_name(side: str, default: str) -> str:
    """A side's name with its precision: its own, else `default`. The baseline's default is fp32."""
    name, _, dtype = side.partition(":")
    dtype = dtype or ("float32" if name == "baseline" else default)
    if name not in SIDES or dtype not in DTYPES:
        raise UserError(f"--sides {side}: choose from {', '.join(SIDES)}, each alone or with :{' or :'.join(DTYPES)}")
    return f"{name}:{dtype}"


@dataclass(frozen=True)
class WarmedUp:
    """The result of a side's first steps."""

    losses: list[float]
    dtype: torch.dtype
    padding: int


def warm_up(side: Side, case: Case) -> WarmedUp:
    """Take some steps: the first loss depends on the weights, the others on gradients, clipping and update."""
    ids, targets = case.tokens()
    return WarmedUp([side.step(ids, targets).item() for _ in range(WARM_UP_STEPS)], side.dtype, side.padding)


# A process for each side: some keep freed memory, and others do not


def side_process(threads: int, memory_limit: int | None = None) -> ProcessPoolExecutor:
    """A new process for the functions of one side, with that many threads and at most that many bytes of memory."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=(threads, memory_limit))


def first_steps(name: str, case: Case) -> WarmedUp:
    return warm_up(_side(name, case), case)


def further_step(name: str, case: Case) -> Round:
    return measure(partial(_side(name, case).step, *case.tokens()))


@cache
def _side(name: str, case: Case) -> Side:
    return build(name, case)


def _prepare(threads: int, memory_limit: int | None) -> None:
    silence_third_party_warnings()
    torch.set_num_threads(threads)
    if memory_limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))


def check_same(found: Mapping[str, WarmedUp]) -> str:
    """The losses of the sides' first steps, as text; exit with a message unless they are equal.

    The padding of a vocabulary, whose logits are 0 at first, takes a share of the probability.
    """
    first, *_ = found
    expected = found[first].losses
    lines = []
    for name, side in found.items():
        excess = [loss / wanted - 1 for loss, wanted in zip(side.losses, expected, strict=True)]
        tolerance = max(TOLERANCES[side.dtype], TOLERANCES[found[first].dtype])
        padding = max(math.log1p(each.padding / VOCABULARY) / min(expected) for each in (side, found[first]))
        if not all(abs(each) <= tolerance + padding for each in excess):
            raise SystemExit(f"{name} does not train as {first} does: its losses are {side.losses}, not {expected}")
        lines.append(f"{name}: {' '.join(f'{loss:.5f}' for loss in side.losses)}")
    return "\n".join(["losses of the first steps", *lines])


def make_side_parser(description: str | None, **defaults: Any) -> ArgumentParser:
    """`make_parser` with the flags of a `Case` and of its sides' precision."""
    defaults |= {"size": "gpt2", "threads": torch.get_num_threads(), "device": device_type()}
    parser = make_parser(description, SHAPES, **defaults)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the sides that name none")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, for its sides")
    return parser
