"""nanoGPT's `ckpt.pt`, from a model and, if there is one, its training state."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from train.checkpoints import nanogpt, starting
from train.checkpoints import step_folder as checkpoints
from train.checkpoints.loading import TUNING_LEARNING_RATE, load_for_inference
from train.checkpoints.run_folder import STEPS_FILE, model_folder, read_steps
from train.config.run_config import RunConfig
from train.export.checks import check_logits, largest_difference, logits_of
from train.utils.errors import UserError


def write(checkpoint: str, folder: Path, model: Any, dtype: str) -> list[str]:
    """Write `ckpt.pt`, with the optimizer's moments if the checkpoint has AdamW's; return what to report."""
    nanogpt.check_writable(model.config)
    trained = find_training_state(checkpoint)
    settings = dataclasses.asdict(RunConfig(learning_rate=TUNING_LEARNING_RATE))
    moments, step, best = None, 0, nanogpt.NO_LOSS
    if trained is not None:
        settings |= trained.state.config
        step, best = trained.step, best_val_loss(trained) or best
        if trained.state.optimizer == "adamw":
            _, moments = checkpoints.read_tensors(trained, model)
    weights = {name: parameter.to(getattr(torch, dtype)) for name, parameter in model.named_parameters()}
    file = folder / "ckpt.pt"
    nanogpt.write(file, model.config, weights, moments, step=step, best_val_loss=best, settings=settings)
    read_back, expected = load_for_inference(file, "float32", device="cpu"), logits_of(model)
    with_exact_gelu = logits_of(read_back)
    for block in read_back.transformer.h:
        block.mlp.act = model.transformer.h[0].mlp.act
    notes = [
        f"ckpt.pt at iteration {step} {'with' if moments else 'without'} the optimizer's moments",
        f"train.py resumes it with --block_size={model.config.n_positions}",
        check_logits(logits_of(read_back), expected),
    ]
    if model.config.activation_function in nanogpt.TANH_GELU:
        change = largest_difference(with_exact_gelu, expected)
        notes.append(f"nanoGPT computes GELU exactly and not by tanh, which changes logits by up to {change:.1e}")
    return notes


def find_training_state(checkpoint: str) -> checkpoints.Checkpoint | None:
    """The training state beside the weights; None if there is none. A `UserError` names what is damaged."""
    folder = model_folder(Path(checkpoint))
    if not (folder / checkpoints.STATE).exists():
        return None
    trained, fault = starting.read_intact(folder)  # and no other step's, which would not fit the weights
    if trained is None:
        raise UserError(f"--checkpoint {checkpoint}: {fault}; export another step folder")
    return trained


def best_val_loss(trained: checkpoints.Checkpoint) -> float | None:
    """The lowest validation loss up to the checkpoint, in nats, from the run's metrics; None if there is none."""
    records, _ = read_steps(trained.folder.parent / STEPS_FILE)
    losses = [record.get("val_loss") for record in records if record["step"] <= trained.step]
    return min((loss for loss in losses if loss is not None), default=None)  # null: it was not a number
