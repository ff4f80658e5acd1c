"""Checkpoints: `step-N/` is a Hugging Face model folder and a training state at once, whole or not there.

    RUN/step-200/config.json, model.safetensors, tokenizer.json, ...   any GPT-2 tool reads these
    RUN/step-200/optimizer.safetensors, training_state.json            what training goes on from
    RUN/latest                                                         "step-200"
    RUN/config.json, model.safetensors, ...                            links into the latest step folder

A folder is written as `.step-200.tmp`, flushed and renamed; `latest` is renamed over after that. Weights and moments
are fp32 under GPT-2's names, whatever engine and layout wrote them, so that any other reads them.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.checkpoints.safetensors_writer import TensorFile
from train.optim.parameter_groups import moments_of
from train.utils.errors import UserError
from train.utils.files import fsync, write_text

STATE = "training_state.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
LATEST = "latest"
# What a checkpoint from before there was the flag was trained with.
BEFORE_THE_FLAG = {"document_mask": False, "optimizer": "adamw"}


@dataclass(frozen=True)
class Checkpoint:
    """A whole `step-N` folder and the state in it."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]


def save(
    run_folder: Path,
    model_config: GPT2FlashConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    tensors: Iterable[tuple[str, Mapping[str, torch.Tensor]]],
    state: dict[str, Any],
    keep: int | None,
) -> Path:
    """Write `step-N`, point `latest` and the run folder at it, drop all but the newest `keep`. Main process only.

    `tensors` gives every parameter once as (name, {"weight", and the moments that `state["optimizer"]` has of it}),
    fp32 on the CPU; each is written before the next is asked for.
    """
    target = run_folder / f"step-{state['step']}"
    temporary = run_folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model_files = _write(temporary, model_config, tokenizer, tensors, state)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk gets its room back
        raise
    _move_away(target)
    temporary.rename(target)
    fsync(run_folder)
    write_text(run_folder / LATEST, target.name + "\n")
    for name in model_files:
        _link(target / name, run_folder / name)
    if keep is not None:
        for old in _step_folders(run_folder)[:-keep]:
            _move_away(old)
    return target


def _write(
    folder: Path,
    model_config: GPT2FlashConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    tensors: Iterable[tuple[str, Mapping[str, torch.Tensor]]],
    state: dict[str, Any],
) -> list[str]:
    """Write and flush the files of a step folder; the names of those that make it a model folder."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shell = GPT2FlashForCausalLM(model_config)  # gives the folder its layout; the weights follow below
    shell.save_pretrained(folder, state_dict={})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    model_files = sorted({WEIGHTS, *(path.name for path in folder.iterdir())})
    shapes = {name: parameter.shape for name, parameter in shell.named_parameters()}
    kept = {name: moments_of(state["optimizer"], name) for name in shapes}
    moment_shapes = {f"{moment}.{name}": shape for name, shape in shapes.items() for moment in kept[name]}
    with TensorFile(folder / WEIGHTS, shapes) as weights, TensorFile(folder / OPTIMIZER, moment_shapes) as moments:
        for name, state_of in tensors:
            weights.write(name, state_of["weight"])
            for moment in kept[name]:
                moments.write(f"{moment}.{name}", state_of[moment])
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        fsync(file)
    fsync(folder)
    return model_files


def _move_away(folder: Path) -> None:
    """Delete a step folder; renamed first, so that no half of it is ever taken for a whole one."""
    if folder.exists():
        dying = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(dying, ignore_errors=True)
        folder.rename(dying)
        shutil.rmtree(dying)


def _link(source: Path, link: Path) -> None:
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    temporary.replace(link)


def _step_folders(run_folder: Path) -> list[Path]:
    """The step folders that are whole, oldest first; a user's `step-8-copy` is none."""
    return sorted((path for path in run_folder.glob("step-*") if path.name[5:].isdigit()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def latest(run_folder: Path) -> Path:
    """The step folder that the run folder's `latest` names.

    Raises:
        UserError: when it names something else.
    """
    name = (run_folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"step-\d+", name):
        raise UserError(
            f"{run_folder / LATEST}: names {name!r}; write the step-N folder in {run_folder} to go on from"
        )
    return run_folder / name


def find(asked: str, run_folder: Path) -> Checkpoint:
    """The checkpoint meant by `--resume_from_checkpoint`: `latest` of the run folder, or a step or run folder.

    Raises:
        UserError: when there is none, or it is not whole.
    """
    folder = run_folder if asked == "latest" else Path(asked)
    if not folder.exists():
        raise UserError(f"--resume_from_checkpoint {asked}: {folder} does not exist")
    if not (folder / STATE).exists() and (folder / LATEST).exists():
        folder = latest(folder)
    if not (folder / STATE).exists():
        raise UserError(
            f"--resume_from_checkpoint {asked}: {folder} holds no whole checkpoint ({STATE} is missing); "
            "name a step-N folder, or start anew without the flag"
        )
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return Checkpoint(folder, {**BEFORE_THE_FLAG, **state, "step": int(state["step"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / STATE} is not a training state of this trainer: {error}") from None


def check_same_run(checkpoint: Checkpoint, state: dict[str, Any]) -> None:
    """Refuse to go on with another model, data or batch: the loss curve would not be the uninterrupted run's."""
    if checkpoint.state.get("follow"):
        raise UserError(
            f"{checkpoint.folder}: was trained with --follow, whose order of the data is gone; start a new run "
            f"from its weights with --model {checkpoint.folder}"
        )
    for key in ("model", "train_data", "seed", "block_size", "document_mask", "sequences_per_step",
                "optimizer"):  # fmt: skip
        found = checkpoint.state.get(key)
        if found != state[key]:
            raise UserError(
                f"{checkpoint.folder}: was trained with {key} {found}, this run has {state[key]}; "
                f"give the same flags, or start a new run from its weights with --model {checkpoint.folder}"
            )


class _Tensors(dict):
    """Tensors of safetensors files, read one at a time."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        for file in files:
            handle = safe_open(file, framework="pt")
            self.update(dict.fromkeys(handle.keys(), handle))

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).get_tensor(name)


def read_tensors(checkpoint: Checkpoint, model: nn.Module) -> tuple[_Tensors, _Tensors]:
    """(weights, moments) of a checkpoint by name, all that `model` needs, read lazily.

    Raises:
        UserError: when a file or a tensor is missing or damaged.
    """
    try:
        weights = _Tensors(sorted(checkpoint.folder.glob("model*.safetensors")))
        moments = _Tensors([checkpoint.folder / OPTIMIZER])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint.folder}: damaged checkpoint: {error}") from None
    for name, _ in model.named_parameters():
        kept = [f"{moment}.{name}" for moment in moments_of(checkpoint.state["optimizer"], name)]
        for wanted, found in ((name, weights), *((moment, moments) for moment in kept)):
            if wanted not in found:
                raise UserError(f"{checkpoint.folder}: damaged checkpoint: {wanted} is missing")
    return weights, moments


def check_free(run_folder: Path, continuing: bool, overwrite: bool) -> None:
    """Refuse a run folder that holds a run, unless that is to be replaced or continued."""
    if overwrite and run_folder.exists() and any(run_folder.iterdir()) and not _holds_a_run(run_folder):
        raise UserError(f"--overwrite: {run_folder} holds files but no run; name another --checkpoint_path")
    if not continuing and not overwrite and _holds_a_run(run_folder):
        kind = "a finished run" if (run_folder / "metrics.json").exists() else "an unfinished run"
        raise UserError(
            f"{run_folder} already holds {kind}: --overwrite replaces it, --resume_from_checkpoint continues it, "
            "or name another --checkpoint_path"
        )


def claim(run_folder: Path, checkpoint: Checkpoint | None, overwrite: bool) -> None:
    """Make the run folder this run's, free of what an earlier one left after `checkpoint`. Main process only."""
    if overwrite and run_folder.exists():
        shutil.rmtree(run_folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*run_folder.glob(".step-*.tmp"), *run_folder.glob(".step-*.old")]:
        shutil.rmtree(leftover)
    (run_folder / "metrics.json").unlink(missing_ok=True)  # a run that goes on is not finished
    if checkpoint is not None and checkpoint.folder.parent.resolve() == run_folder.resolve():
        write_text(run_folder / LATEST, checkpoint.folder.name + "\n")
        for folder in _step_folders(run_folder):
            if _step_of(folder) > checkpoint.step:
                _move_away(folder)


def _holds_a_run(run_folder: Path) -> bool:
    return any((run_folder / name).exists() for name in (LATEST, "metrics.jsonl", "metrics.json"))
