"""Checkpoints: `step-N/` is both a Hugging Face model folder and a training state, either complete or absent.

    RUN/step-200/config.json, model.safetensors, tokenizer.json, ...   read by any GPT-2 tool
    RUN/step-200/optimizer.safetensors, training_state.json            read by training when it resumes
    RUN/latest, RUN/best                                               "step-200"
    RUN/config.json, model.safetensors, ...                            copies of the latest step folder's

A folder is written under a temporary name, flushed and renamed, and never changes then; after it `latest` is replaced.
Weights and moments are fp32 under GPT-2's names, whatever engine and layout wrote them, so that any other can read
them.
"""

import dataclasses
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.checkpoints.digests import (
    Digests,
    Fault,
    digest_of_file,
    digest_of_state,
    faults_of_files,
    faults_of_tensors,
    has_changed,
    unreadable,
)
from train.checkpoints.loading import load_config
from train.checkpoints.run_folder import BEST, LATEST
from train.checkpoints.safetensors_writer import TensorFile
from train.optim.parameter_groups import moments_of
from train.utils import lock
from train.utils.errors import UserError
from train.utils.files import (
    atomic_folder,
    atomic_write,
    delete_folder,
    delete_tree,
    from_json,
    parse_json,
    read_json,
    write_text,
)

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
    val_data: dict[str, Any] | None = None  # None in a checkpoint of an older version
    seed: int
    block_size: int
    document_mask: bool = False  # the default of a field is what was used before the field existed
    sequences_per_step: int
    optimizer: str = "adamw"
    guard: GuardState | None = None
    temporary: bool = False  # to be deleted when the next two checkpoints are complete
    stopped_by_guard: bool = False  # saved because the guard has refused the next update: its weights may diverge
    total_steps: int
    config: dict[str, Any]  # the flags of the run
    setting: dict[str, Any] = field(default_factory=dict)  # `config.changes.SETTING`
    digests: Digests | None = None  # None in a checkpoint from before there were any

    @property
    def facts(self) -> dict[str, Any]:
        """What `config.changes` compares."""
        facts = {**self.config, **self.setting, "max_steps": self.total_steps}
        if self.val_data is not None:
            digest = self.val_data["sha256"] or self.val_data["samples_sha256"]
            facts["val_data"] = f"{self.val_data['tokens']:,} tokens, digest {digest[:12]}"
        return facts


class DamagedState(UserError):
    """The training state of a checkpoint was read and is not what was written."""


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
    """Write `step-N`, point `latest` and the run folder at it, and `rotate`. Main process only.

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
        (folder / WEIGHTS).chmod((folder / WEIGHTS).stat().st_mode & ~0o222)  # `_publish` may give it another name
        state = dataclasses.replace(state, digests=Digests(tensors=digests, files=files))
        value = parse_json(json.dumps(dataclasses.asdict(state)), folder / STATE)  # as it will be read
        value["digests"]["state"] = digest_of_state(value)
        (folder / STATE).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    point_to(target)
    rotate(run_folder, keep)
    return target


def rotate(run_folder: Path, keep: int | None) -> None:
    """Delete the checkpoints that are no longer needed. Main process only.

    The newest `keep` that are not temporary stay (None: all), the best one, and the two newest as long as one of them
    is temporary, because a bit may flip in the newest. One that a stop of the guard has written does not count: while
    it is the newest, nothing is deleted. What is not a complete checkpoint is left alone. What cannot be deleted is
    said, and tried again the next time.
    """
    states = {folder: state for _, folder in step_folders(run_folder) if (state := _state_to_rotate(folder))}
    if states and not list(states.values())[-1].get("stopped_by_guard"):
        *older, newest = (folder for folder, state in states.items() if not state.get("stopped_by_guard"))
        kept = [folder for folder in older if not states[folder].get("temporary")]
        kept = kept if keep is None else kept[max(0, len(kept) + 1 - keep) :]
        kept += [folder for folder in older[-1:] if states[folder].get("temporary") or states[newest].get("temporary")]
        for folder in states:
            if folder not in (newest, *kept) and folder.name != best(run_folder):
                try:
                    delete_folder(folder)
                except OSError as error:
                    _say(f"{folder} cannot be deleted yet: {error.strerror}; tried again after the next checkpoint")
    for leftover in sorted(run_folder.glob(".step-*.old")):
        if sentence := delete_tree(leftover):
            _say(f"{sentence}; tried again after the next checkpoint")


def _state_to_rotate(folder: Path) -> dict[str, Any] | None:
    """The training state in a step folder; None if it cannot be read, or is of another step than the folder's name."""
    try:
        state = read_json(folder / STATE)
    except UserError:
        return None
    return state if isinstance(state, dict) and folder.name == f"step-{state.get('step')}" else None


def _say(sentence: str) -> None:
    """Print a sentence above the progress bar, if there is one."""
    tqdm.write(sentence, file=sys.stderr)


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


def point_to(folder: Path) -> None:
    """Point `latest` at a step folder, then copy its model files to the run folder. Main process only.

    A kill in between leaves the files of the step before. Our own tools do not read them: `model_folder`.
    """
    write_text(folder.parent / LATEST, folder.name + "\n")
    for file in model_files(folder):
        _publish(file, folder.parent / file.name)


def model_files(folder: Path) -> list[Path]:
    """The files of a step folder that make it a model folder."""
    return sorted(path for path in folder.iterdir() if path.name not in TRAINING_FILES)


def _publish(file: Path, name: Path) -> None:
    """Give the run folder's file `name` the content of a step folder's, which writing to `name` must not change.

    Weights are read-only, and become a second name of the same file where that protects them. A process that may write
    to them all the same (root), and every other file, gets a copy.
    """
    if file.name == WEIGHTS and not os.access(file, os.W_OK):
        if name.exists() and name.samefile(file):
            return  # to rename one name of a file to another does nothing, and would leave the temporary one
        lock.check(name)
        temporary = name.with_name(f".{name.name}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(file, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, temporary)
        temporary.replace(name)
        return
    with atomic_write(name) as temporary:
        shutil.copyfile(file, temporary)


def step_folders(run_folder: Path) -> list[tuple[int, Path]]:
    """The step folders and their steps, oldest first; a user's `step-8-copy` is not one of them.

    Raises:
        OSError: if the run folder cannot be read: it may have some then.
    """
    try:
        paths = [path for path in run_folder.iterdir() if path.name.startswith("step-") and path.name[5:].isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((int(path.name[5:]), path) for path in paths if _is_folder(path))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:  # a dangling link
        return False


def read_state(folder: Path) -> Checkpoint:
    """The checkpoint in a step folder, of which only the training state is read.

    Raises:
        DamagedState: if its content is not what was written.
        UserError: if it is missing, cannot be read, or is of another version, or another step than the folder's name.
    """
    path = folder / STATE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{folder} holds no complete checkpoint ({STATE} is missing)") from None
    except OSError as error:
        raise UserError(str(unreadable(path, error))) from None
    try:
        value = parse_json(content.decode(), path)
    except UnicodeDecodeError as error:
        raise DamagedState(f"{path} is not text: byte {error.start} is not UTF-8") from None
    except UserError as error:
        raise DamagedState(str(error)) from None
    if has_changed(value):
        raise DamagedState(f"{path} has changed since it was written")
    state = from_json(TrainingState, value, path, "training")
    if re.fullmatch(r"step-\d+", folder.name) and folder.name != f"step-{state.step}":
        raise UserError(
            f"{folder} holds the checkpoint of step {state.step} ({STATE}): rename it to step-{state.step}"
        )
    return Checkpoint(folder, state)


def faults(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Each fault of a checkpoint, which is read completely; none if it is intact.

    One that has no digests is checked for what its tensors have to be: their names, shapes, dtype and finite values.
    """
    folder, digests = checkpoint.folder, checkpoint.state.digests
    found = list(faults_of_files(folder, digests)) if digests else []
    yield from found
    if found:
        return  # the shapes of the tensors are read from config.json
    try:
        config = load_config(str(folder), flag="checkpoint")
    except UserError as error:  # of another version, for its digest is right
        yield Fault(str(error), is_damage=False)
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
