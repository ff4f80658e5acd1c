"""One training step as each tool takes it (forward, backward, clipping, AdamW), from the same weights.

    baseline           ours as `--run_type baseline`: eager attention, fp32, full logits, AdamW not fused
    optimized          ours: attention `auto`, loss in chunks, AdamW and GELU as one kernel each, freed memory kept
                       (`train/allocator.py`), blocks compiled as by `--torch_compile`
    uncompiled         the same without compilation
    checkpointed       optimized, with `--activation_checkpointing full`
    lean               the same with `--activation_checkpointing selective`
    hf-eager, hf-sdpa  stock `GPT2LMHeadModel`, fused AdamW, the default of transformers' Trainer
    hf-compiled        hf-sdpa under `torch.compile`
    nanogpt            `model.py` of a nanoGPT checkout and its `configure_optimizers`; its vocabulary has 50,304 words
    nanogpt-compiled   the same under `torch.compile`, as its `train.py` does

`NAME:float32` and `NAME:bfloat16` (autocast) choose a side's precision. All have no dropout, the same parameter groups
and the same gradient norm to clip to.
"""

import argparse
import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from modeling_gpt2flash.attention import choose_attention
from train.checkpoints.loading import SIZES
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

SHAPES = SIZES | {"small": (4, 4, 256, 0.035)}  # 16M parameters, of which 12.9M are the vocabulary's
VOCABULARY = 50257
DTYPES = ("float32", "bfloat16")
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0
# One step of each side is the first with everything in place; the later ones show whether the update was the same.
WARM_UP_STEPS = 3
# Of the loss in those steps, relative. Sums in another order; in bf16 8 bits of mantissa, and AdamW's first step makes
# a whole step of the learning rate out of every gradient's sign.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-3}


@dataclass(frozen=True)
class Case:
    """What all sides train: `batch` sequences of `block` tokens."""

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
        """Random input ids and the tokens that follow each, both (batch, block)."""
        drawn = torch.randint(VOCABULARY, (self.batch, self.block + 1), generator=torch.Generator().manual_seed(1))
        drawn = drawn.to(self.device)
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


@dataclass(frozen=True)
class Side:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]  # ids and the tokens that follow them, (B, T) -> the mean, ()
    dtype: torch.dtype
    padded_words: int = 0  # in the vocabulary

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
    recompute: str = "none",
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
        compile_blocks(model, checkpoint_arguments(recompute) if recompute == "selective" else None)
    if recompute == "full":
        checkpoint_blocks(model, checkpoint_arguments(recompute))

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
    words = own["transformer.wte.weight"].shape[0]
    for name, weight in given.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T  # Conv1D's layout to Linear's
        own[name].zero_()[: len(weight)].copy_(weight)
    model.to(case.device).train()
    with contextlib.redirect_stdout(None):
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LEARNING_RATE, BETAS, torch.device(case.device).type)
    if compiled:
        model.compile()
    return Side(model, optimizer, lambda ids, targets: model(ids, targets)[1], dtype, words - VOCABULARY)


def _adamw(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    return build_optimizer(
        model, "adamw", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=fused
    )


def _nanogpt_module(folder: Path | None) -> Any:
    if folder is None:
        raise UserError("a nanogpt side needs a checkout of nanoGPT: name its folder with --nanogpt")
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    if spec is None or spec.loader is None or not (folder / "model.py").exists():
        raise UserError(f"--nanogpt {folder}: there is no model.py in it; give a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


OPTIMIZED: dict[str, Any] = {"attention": "auto", "loss_chunk_size": GPT2FlashConfig.loss_chunk_size, "fused": True}
SIDES: dict[str, Callable[[Case, torch.dtype], Side]] = {
    "baseline": partial(ours, attention="eager", loss_chunk_size=0, fused=False),
    "optimized": partial(ours, **OPTIMIZED, compiled=True),
    "uncompiled": partial(ours, **OPTIMIZED),
    "checkpointed": partial(ours, **OPTIMIZED, compiled=True, recompute="full"),
    "lean": partial(ours, **OPTIMIZED, compiled=True, recompute="selective"),
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


def named(side: str, default: str) -> str:
    """A side's name with its precision: its own, else `default`; the baseline is fp32 unless it says otherwise.

    Raises:
        UserError: when there is no such side or precision.
    """
    name, _, dtype = side.partition(":")
    dtype = dtype or ("float32" if name == "baseline" else default)
    if name not in SIDES or dtype not in DTYPES:
        raise UserError(
            f"--sides {side}: choose from {', '.join(SIDES)}, with :{' or :'.join(DTYPES)} behind it or nothing"
        )
    return f"{name}:{dtype}"


@dataclass(frozen=True)
class WarmedUp:
    """What a side's first steps have shown."""

    losses: list[float]
    dtype: torch.dtype
    padded_words: int


def warm_up(side: Side, case: Case) -> WarmedUp:
    """Some steps: the first loss is that of the weights, the others show gradients, clipping and update."""
    ids, targets = case.tokens()
    return WarmedUp([side.step(ids, targets).item() for _ in range(WARM_UP_STEPS)], side.dtype, side.padded_words)


def check_same(found: Mapping[str, WarmedUp]) -> str:
    """The sides' first losses; ends with a message where one's are not the first one's.

    A padded vocabulary's words, whose logits are 0 at first, take a share of the probability.
    """
    first, *_ = found
    expected = found[first].losses
    lines = []
    for name, side in found.items():
        excess = [loss / wanted - 1 for loss, wanted in zip(side.losses, expected, strict=True)]
        tolerance = max(TOLERANCES[side.dtype], TOLERANCES[found[first].dtype])
        padding = max(math.log1p(each.padded_words / VOCABULARY) / min(expected) for each in (side, found[first]))
        if not all(abs(each) <= tolerance + padding for each in excess):
            raise SystemExit(
                f"{name} does not train as {first} does: its losses are {side.losses}, not {expected}; nothing was "
                "timed"
            )
        lines.append(f"{name}: {' '.join(f'{loss:.5f}' for loss in side.losses)}")
    return "\n".join(["losses of the first steps", *lines])


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=list(SHAPES), default="gpt2")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the sides that do not name their own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default=device_type())
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT, for the sides named so")
