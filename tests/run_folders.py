"""Run folders of a model of 400 parameters, all of which have the number of the step as their value."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.checkpoints import step_folder as checkpoints

SMALLEST = GPT2FlashConfig(
    n_layer=1, n_head=1, n_embd=4, n_positions=8, vocab_size=11, bos_token_id=10, eos_token_id=10
)


def save_step(run_folder: Path, step: int, keep: int | None = None, **facts: bool) -> Path:
    model = GPT2FlashForCausalLM(SMALLEST)
    tensors = (
        (name, {key: torch.full_like(parameter, step) for key in ("weight", "exp_avg", "exp_avg_sq")})
        for name, parameter in model.named_parameters()
    )
    state = checkpoints.TrainingState(
        step=step,
        tokens=step,
        model={},
        train_data={},
        seed=0,
        block_size=8,
        sequences_per_step=1,
        total_steps=10,
        config={},
        **facts,
    )
    return checkpoints.save(run_folder, SMALLEST, None, tensors, state, keep)


def step_of_weights(folder: Path) -> int:
    """The step at which the weights in `model.safetensors` were saved."""
    (value,) = {
        value for tensor in load_file(folder / "model.safetensors").values() for value in tensor.unique().tolist()
    }
    return int(value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
