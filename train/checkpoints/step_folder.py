"""Checkpoints: `step-N/` is both a Hugging Face model folder and a training state, either complete or absent.

    RUN/step-200/config.json, model.safetensors, tokenizer.json, ...   read by any GPT-2 tool
    RUN/step-200/optimizer.safetensors, training_state.json            read by training when it resumes
    RUN/latest, RUN/best                                               "step-200"
    RUN/config.json, model.safetensors, ...                            links to the latest step folder's

A folder is written under a temporary name, flushed and renamed; then `latest` is replaced. Weights and moments are
fp32 under GPT-2's names, whatever engine and layout wrote them, so that any other can read them.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.checkpoints.digests import Digests, digest_of_file, faults_of_files, faults_of_tensors
from train.checkpoints.loading import load_config
from train.checkpoints.run_folder import BEST, LATEST
from train.checkpoints.safetensors_writer import TensorFile
from train.optim.parameter_groups import moments_of
from train.utils.errors import UserError
from train.utils.files import atomic_folder, delete_folder, from_json, read_json, write_text

STATE = "training_state.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINING_FILES = {STATE, OPTIMIZER}  # all other files of a step folder are the model's


@dataclass(frozen=True)
class GuardState:
    """What a resumed run needs in order to judge its updates as the uninterrupted one does."""

    updates: int  # steps that have updated the weights
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)  # of the last steps, where spikes are looked for; oldest first
    grad_norms: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Schema of `training_state.json`: the run of a checkpoint, besides weights and moments."""

    step: int  # optimizer steps done
    tokens: int  # tokens trained on so far
    model: dict[str, int | None]  # sizes, under GPT-2's names
    train_data: dict[str, Any]
    seed: int
    block_size: int
    document_mask: bool = False  # the default of a field is what was used before the field existed
    sequences_per_step: int
    optimizer: str = "adamw"
    guard: GuardState | None = None
    temporary: bool = False  # to be deleted when the next checkpoint is complete
    total_steps: int
    config: dict[str, Any]  # the flags of the run
    setting: dict[str, Any] = field(default_factory=dict)  # `config.changes.SETTING`
    digests: Digests | None = None  # None in a checkpoint from before there were any


@dataclass(frozen=True)
class Checkpoint:
    """A complete `step-N` folder and its training state."""

    folder: Path
    state: TrainingState

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def guard(self) -> GuardState:
        return self.state.guard or GuardState(self.step)

    def is_in(self, run_folder: Path) -> bool:
        return self.folder.parent.resolve() == run_folder.resolve()


def save(
    run_folder: Path,
    model_config: GPT2FlashConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    tensors: Iterable[tuple[str, Mapping[str, torch.Tensor]]],
    state: TrainingState,
    keep: int | None,
) -> Path:
    """Write `step-N`, point `latest` and the run folder at it, delete all but the newest `keep`. Main process only.

    `tensors` yields every parameter once as (name, {"weight", and the moments of `state.optimizer`}), fp32 on the CPU;
    each is written before the next is requested.

    Raises:
        UserError: if a tensor is not finite: nothing is written then.
    """
    target = run_folder / f"step-{state.step}"
    with torch.device("meta"):
        shell = GPT2FlashForCausalLM(model_config)
    shapes = tensor_shapes(shell, state.optimizer)
    digests: dict[str, str] = {}

    def write(file: TensorFile, name: str, tensor: torch.Tensor) -> None:
        digest = file.write(name, tensor)
        if not digest.finite:
            raise UserError(
                f"{name} holds NaN or infinity after step {state.step}: no checkpoint is written; resume from an "
                "earlier one with a lower --learning_rate"
            )
        digests[name] = digest.hexdigest()

    with atomic_folder(target, replace=True) as folder:
        shell.save_pretrained(folder, state_dict={})  # every file but the weights
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        written = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {str(path.relative_to(folder)): digest_of_file(path) for path in written}
        with (
            TensorFile(folder / WEIGHTS, shapes[WEIGHTS]) as weights,
            TensorFile(folder / OPTIMIZER, shapes[OPTIMIZER]) as moments,
        ):
            for name, state_of in tensors:
                write(weights, name, state_of["weight"])
                for kind in moments_of(state.optimizer, name):
                    write(moments, f"{kind}.{name}", state_of[kind])
        state = dataclasses.replace(state, digests=Digests(tensors=digests, files=files))
        (folder / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n", encoding="utf-8")
    point_to(target)
    rotate(run_folder, keep)
    return target


def rotate(run_folder: Path, keep: int | None) -> None:
    """Delete all step folders but the best and the newest `keep`, and temporary ones. Main process only."""
    older = [folder for _, folder in step_folders(run_folder)[:-1]]
    kept = [folder for folder in older if not _is_temporary(folder)]
    kept = kept if keep is None else kept[max(0, len(kept) + 1 - keep) :]
    for folder in older:
        if folder not in kept and folder.name != best(run_folder):
            delete_folder(folder)


def best(run_folder: Path) -> str | None:
    """The name of the step folder that the run folder's `best` names; None if there is none."""
    try:
        return (run_folder / BEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def point_best_to(folder: Path) -> None:
    """Point `best` at a step folder, unless it is not there or not complete. Main process only."""
    if (folder / STATE).exists() and best(folder.parent) != folder.name:
        write_text(folder.parent / BEST, folder.name + "\n")


def tensor_shapes(model: nn.Module, optimizer: str) -> dict[str, dict[str, torch.Size]]:
    """The tensors of a checkpoint of a model and its optimizer, by file and name."""
    weights = {name: parameter.shape for name, parameter in model.named_parameters()}
    moments = {f"{kind}.{name}": shape for name, shape in weights.items() for kind in moments_of(optimizer, name)}
    return {WEIGHTS: weights, OPTIMIZER: moments}


def _is_temporary(folder: Path) -> bool:
    try:
        return bool(read_json(folder / STATE).get("temporary"))
    except UserError:
        return False  # a damaged checkpoint is no reason to fail after a good one was written


def point_to(folder: Path) -> None:
    """Point `latest`, then the run folder's links, at a step folder. Main process only.

    A kill in between leaves links to the files of the step before. Our own tools do not read them: `model_folder`.
    """
    write_text(folder.parent / LATEST, folder.name + "\n")
    for file in model_files(folder):
        _link(file, folder.parent / file.name)


def model_files(folder: Path) -> list[Path]:
    """The files of a step folder that make it a model folder."""
    return sorted(path for path in folder.iterdir() if path.name not in TRAINING_FILES)


def _link(source: Path, link: Path) -> None:
    if link.exists() and link.samefile(source):
        return  # to rename one name of a file to another does nothing, and would leave the temporary one
    temporary = link.with_name(f".{link.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    temporary.replace(link)


def step_folders(run_folder: Path) -> list[tuple[int, Path]]:
    """The step folders and their steps, oldest first; a user's `step-8-copy` is not one of them."""
    folders = [path for path in run_folder.glob("step-*") if path.name[5:].isdecimal() and path.is_dir()]
    return sorted((int(path.name[5:]), path) for path in folders)


def read_state(folder: Path) -> Checkpoint:
    """The checkpoint in a step folder, of which only the training state is read.

    Raises:
        UserError: if that is missing, damaged, or of another step than the folder's name says.
    """
    if not (folder / STATE).exists():
        raise UserError(f"{folder} holds no complete checkpoint ({STATE} is missing)")
    state = from_json(TrainingState, read_json(folder / STATE), folder / STATE, "training")
    if re.fullmatch(r"step-\d+", folder.name) and folder.name != f"step-{state.step}":
        raise UserError(
            f"{folder} holds the checkpoint of step {state.step} ({STATE}): rename it to step-{state.step}"
        )
    return Checkpoint(folder, state)


def faults(checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence for each fault of a checkpoint, which is read completely; none if it is intact.

    One that has no digests is checked for what its tensors have to be: their names, shapes, dtype and finite values.
    """
    folder, digests = checkpoint.folder, checkpoint.state.digests
    found = list(faults_of_files(folder, digests)) if digests else []
    yield from found
    if found:
        return  # the shapes of the tensors are read from config.json
    try:
        config = load_config(str(folder), flag="checkpoint")
    except UserError as error:
        yield str(error)
        return
    with torch.device("meta"):
        shell = GPT2FlashForCausalLM(config)
    for name, shapes in tensor_shapes(shell, checkpoint.state.optimizer).items():
        yield from faults_of_tensors(folder / name, shapes, digests)


def read_tensors(checkpoint: Checkpoint, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, moments) of a checkpoint by name, mapped and not read, with everything that `model` needs.

    Raises:
        UserError: if a file cannot be read, or a tensor is missing or of another shape than the model's.
    """
    read = {}
    for file, shapes in tensor_shapes(model, checkpoint.state.optimizer).items():
        path = checkpoint.folder / file
        try:
            read[file] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: damaged checkpoint: {error}") from None
        for name, shape in shapes.items():
            if name not in read[file]:
                raise UserError(f"{path}: damaged checkpoint: {name} is missing")
            if (found := read[file][name].shape) != shape:
                raise UserError(f"{path}: {name} has shape {list(found)}, and the model needs {list(shape)}")
    return read[WEIGHTS], read[OPTIMIZER]
