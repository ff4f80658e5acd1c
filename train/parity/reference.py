"""The reference implementation of the parity test: stock GPT-2 trained in float64 in one process.

It shares only the order of the data (`train.data.batches`) with the trainer: the model is transformers' own, and the
loss, clipping and AdamW are torch's on float64 tensors. Every hyperparameter of the compared runs is defined here.
"""

import argparse
import inspect
import json
import math
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from train.data.batches import TrainBatches
from train.data.token_file import open_tokens, write_token_file

STEPS = 5
SEQUENCES = 32  # in a global batch
VOCABULARY = 256  # a token is a byte
POSITIONS = 64
SEED = 1337
LEARNING_RATE = 3e-5  # one update changes a norm's weight, which is about 1, by three times the tolerance
WEIGHT_DECAY = 0.1
BETA1, BETA2 = 0.9, 0.95
CLIP = 0.5  # below the gradient's norm at each of the steps
PROBES = 2  # sequences whose logits show the effect of weights without a gradient
SPREAD = 0.02  # standard deviation of the noise added to every initial weight, biases and norms included


@dataclass(frozen=True)
class Step:
    """The results of one optimizer step in float64; tensors under GPT-2's names."""

    loss: float  # mean nats per token of the global batch
    grad_norm: float  # before clipping
    gradients: dict[str, torch.Tensor]  # after clipping
    weights: dict[str, torch.Tensor]  # after the step
    logits: torch.Tensor  # (PROBES, positions, vocabulary), of the probes, after the step


@dataclass(frozen=True)
class Reference:
    """The expected results."""

    model: GPT2LMHeadModel
    probes: torch.Tensor  # (PROBES, positions), token ids
    steps: list[Step]

    @torch.no_grad()
    def logits_with(self, step: int, replaced: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`steps[step].logits` with some of the weights `replaced`."""
        self.model.load_state_dict({**self.steps[step].weights, **replaced}, strict=False)
        return self.model(self.probes, use_cache=False).logits


def write_problem(folder: Path) -> None:
    """`model/`, a small stock GPT-2, and the token files `train.bin` and `val.bin`: bytes of Python's own source."""
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=64, n_positions=POSITIONS, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(SEED)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        # Small weights would be of the size of the updates, and relative differences of weights as large as theirs.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    model.save_pretrained(folder / "model")
    text = "".join(map(inspect.getsource, (argparse, subprocess, json))).encode()
    ids = np.frombuffer(text, dtype=np.uint8)
    # Fewer than the steps need, so that they continue into a second epoch.
    end = (STEPS - 1) * SEQUENCES * POSITIONS + 1
    for name, part in (("train.bin", ids[:end]), ("val.bin", ids[end : end + 4 * POSITIONS])):
        write_token_file(folder / name, [(part, 1)], VOCABULARY, {})


def flags(folder: Path, max_grad_norm: float) -> list[str]:
    """The flags with which `python -m train` computes the same as `train_reference`, without those of the layout."""
    return [
        f"--model={folder}/model",
        f"--train_data_path={folder}/train.bin",
        f"--val_data_path={folder}/val.bin",
        f"--max_steps={STEPS}",
        f"--seed={SEED}",
        f"--learning_rate={LEARNING_RATE}",
        "--lr_schedule=constant",
        "--warmup_steps=0",
        f"--weight_decay={WEIGHT_DECAY}",
        f"--adam_beta1={BETA1}",
        f"--adam_beta2={BETA2}",
        f"--max_grad_norm={max_grad_norm}",
        "--mixed_precision=no",
        "--save_interval=1",
        "--eval_steps=1",
        "--report_to=none",
        "--max_new_tokens=0",
    ]


def train_reference(folder: Path, max_grad_norm: float) -> Reference:
    """Train the model of `write_problem` in float64, with gradients clipped at `max_grad_norm` (0: not clipped)."""
    model = GPT2LMHeadModel.from_pretrained(folder / "model", dtype=torch.float64, attn_implementation="eager")
    model.eval()  # no dropout
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(BETA1, BETA2),
        eps=1e-8,
    )
    tokens = open_tokens(folder / "train.bin", VOCABULARY)
    batches = TrainBatches(tokens, POSITIONS, SEQUENCES, SEED)
    probes = batches.micro_batch(0, 0, 0, 1, PROBES)["input_ids"]
    steps = []
    for index in range(STEPS):
        batch = batches.micro_batch(index, 0, 0, 1, SEQUENCES)
        logits = model(batch["input_ids"], use_cache=False).logits  # transformers' own loss is computed in float32
        loss = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        assert gradients.keys() == named.keys()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), max_grad_norm or math.inf).item()
        assert max_grad_norm == 0 or norm > max_grad_norm, f"a norm of {norm} is not clipped at {max_grad_norm}"
        optimizer.step()
        weights = {name: p.detach().clone() for name, p in named.items()}
        with torch.no_grad():
            steps.append(Step(loss.item(), norm, gradients, weights, model(probes, use_cache=False).logits))
    return Reference(model, probes, steps)
