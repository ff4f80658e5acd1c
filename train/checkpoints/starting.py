"""Where a run starts: the checkpoint that it resumes from, and what an earlier run left in its folder.

A run may be killed at any moment, also while it replaces an earlier one or before its first checkpoint, and the same
command must then find a way on. `decide` is the table of what is done for each content of the run folder.
"""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from train.checkpoints.digests import Fault
from train.checkpoints.run_folder import BEST, LATEST, STEPS_FILE, SUMMARY_FILE, latest
from train.checkpoints.step_folder import (
    STATE,
    Checkpoint,
    DamagedState,
    TrainingState,
    best,
    faults,
    model_files,
    point_to,
    read_state,
    step_folders,
)
from train.config import changes
from train.utils import lock, processes
from train.utils.errors import UserError
from train.utils.files import delete_folder, delete_tree

# Fields of the training state that a resumed run must share with its checkpoint, or its loss curve would be another.
SAME_IN_A_RUN = ("model", "train_data", "seed", "block_size", "document_mask", "sequences_per_step", "optimizer")
# What a run writes apart from its checkpoints; records of trackers come last, as the log is the run's own.
LOGS = (
    SUMMARY_FILE,
    LATEST,
    BEST,
    STEPS_FILE,
    "profile",
    "trackers.json",
    "tensorboard",
    "wandb",
    "trackio",
    "mlflow.db",
)
# Temporary names of `train.utils.files` and of links: what a kill leaves behind.
TEMPORARY = re.compile(r"\.(step-\d+|latest|best|.+\.(jsonl?|safetensors|py|txt|jinja|md))(\..+)?\.tmp")
DELETE_NEWER = "--delete_newer_checkpoints"
DAMAGED = ".damaged"  # step-3.damaged: a checkpoint that a resumed run has put out of its way


@dataclass(frozen=True)
class Start:
    """How a run starts. `delete` is in the order in which a kill leaves a folder that the same command accepts.

    `damaged` are step folders newer than the checkpoint, which get another name.
    """

    checkpoint: Checkpoint | None
    delete: tuple[Path, ...] = ()
    note: str | None = None
    damaged: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What is in a run folder; everything else in it belongs to someone else."""

    run_folder: Path
    checkpoints: list[Path]  # complete step folders, oldest first
    leftovers: list[Path]  # half-written, half-deleted, without weights: of no value
    weights: list[Path]  # safetensors in the run folder and its step folders
    logs: list[Path]

    @property
    def is_finished(self) -> bool:
        return self.run_folder / SUMMARY_FILE in self.logs

    @property
    def is_a_run(self) -> bool:
        return bool(self.logs or step_folders(self.run_folder) or self.leftovers)

    @property
    def is_of_value(self) -> bool:
        """Whether it has what the same command would not write again."""
        return bool(self.checkpoints or self.weights or self.is_finished)

    @property
    def everything(self) -> tuple[Path, ...]:
        """All that a run wrote. The logs come last: as long as one is left, the folder is known to hold a run."""
        steps = [folder for _, folder in step_folders(self.run_folder)]
        links = {self.run_folder / file.name for folder in steps for file in model_files(folder)}
        links |= {file for file in self.weights if file.parent == self.run_folder}
        summary = [path for path in self.logs if path.name == SUMMARY_FILE]
        damaged = sorted(self.run_folder.glob(f"step-*{DAMAGED}*"))
        first = [*summary, *sorted(link for link in links if link.is_file()), *self.leftovers, *damaged, *steps]
        return tuple(dict.fromkeys([*first, *self.logs]))

    def __str__(self) -> str:
        if self.is_finished:
            return "a finished run"
        return "an unfinished run" if self.checkpoints else "weights of a run, but no complete checkpoint"


def look(run_folder: Path) -> Contents:
    steps = [folder for _, folder in step_folders(run_folder)]
    files = {folder: _files(folder) for folder in steps}
    incomplete = [folder for folder in steps if not any(name.endswith(".safetensors") for name in files[folder])]
    return Contents(
        run_folder,
        checkpoints=[folder for folder in steps if STATE in files[folder]],
        leftovers=[*incomplete, *sorted(filter(is_leftover, run_folder.glob(".*")))],
        weights=sorted([*run_folder.glob("*.safetensors"), *run_folder.glob("step-*/*.safetensors")]),
        logs=[run_folder / name for name in LOGS if (run_folder / name).exists()],
    )


def _files(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:  # a disk or file server that fails at the moment: it may be a checkpoint
        return [STATE, "unknown.safetensors"]


def is_leftover(path: Path) -> bool:
    return bool(TEMPORARY.fullmatch(path.name) or re.fullmatch(r"\.step-\d+(\.\d+)?\.old", path.name))


def decide(run_folder: Path, resume: str | None, overwrite: bool, delete_newer: bool = False) -> Start:
    """How a run starts in `run_folder`: nothing is changed yet.

    | it holds            | no flag       | --resume_from_checkpoint | the same, of another folder | --overwrite   |
    | ------------------- | ------------- | ------------------------ | --------------------------- | ------------- |
    | nothing of a run    | starts        | starts, says so          | starts from there           | starts        |
    | logs and leftovers  | starts anew   | starts anew, says so     | starts from there, anew     | replaces them |
    | checkpoints         | refused       | resumes                  | refused                     | replaces them |
    | only weights, or a summary | refused | refused                | refused                     | replaces them |
    | a model, no run     | refused       | refused                  | refused                     | refused       |

    Resuming from a step folder that has newer ones beside it is refused unless they are to be deleted. So is resuming
    from the newest that is intact, unless the newer ones are known to be damaged: these get another name.

    Raises:
        UserError: where it is refused, or if the named checkpoint does not exist or is not complete.
    """
    found = look(run_folder)
    if not found.is_a_run and (found.weights or (run_folder / "config.json").exists()):
        raise UserError(f"{run_folder} holds a model, which a run would replace; name another --checkpoint_path")
    if overwrite:
        return Start(None, found.everything)
    if resume is not None and not _is_latest_of(resume, run_folder):
        checkpoint = find(resume, run_folder)
        if checkpoint.is_in(run_folder):
            return _resume_from(checkpoint, found, delete_newer)
    elif resume is not None and found.checkpoints:
        return _resume_from_newest(resume, found, delete_newer)
    else:
        checkpoint = None
    if found.is_of_value:
        raise UserError(f"{run_folder} already holds {found}: {_remedies(found, resume)}")
    note = None
    if resume is not None and checkpoint is None:
        note = f"--resume_from_checkpoint {resume}: {run_folder} has no checkpoint yet: the run starts from step 0"
    elif found.logs:
        note = f"{run_folder} has the log of a run without a checkpoint: the run starts anew"
    stale = [path for path in found.logs if path.name in (LATEST, BEST)]
    return Start(checkpoint, (*found.leftovers, *stale), note)


def _is_latest_of(resume: str, run_folder: Path) -> bool:
    return resume == "latest" or Path(resume).resolve() == run_folder.resolve()


def _remedies(found: Contents, resume: str | None) -> str:
    ways = ["--overwrite replaces it"]
    if found.checkpoints and resume is None:
        ways.append("--resume_from_checkpoint resumes it")
    elif found.weights and not found.checkpoints:
        ways.append(f"--model {found.weights[-1].parent} starts from its weights elsewhere")
    return f"{', '.join(ways)}, or name another --checkpoint_path"


def _resume_from_newest(resume: str, found: Contents, delete_newer: bool) -> Start:
    newest = _newest(resume, found.run_folder)
    checkpoint = newest.checkpoint
    skipped = {folder: fault for folder, fault in newest.skipped.items() if folder not in found.leftovers}
    if delete_newer:
        return Start(checkpoint, (*skipped, *found.leftovers), newest.note)
    unread = [str(fault) for fault in skipped.values() if not fault.is_damage]
    if unread:
        raise UserError(
            f"--resume_from_checkpoint {resume}: {unread[0]}. It is newer than {checkpoint.folder}, the newest "
            f"checkpoint that is intact, and may be intact itself: mend that or try again; {DELETE_NEWER} deletes "
            f"what is newer and resumes from there, --resume_from_checkpoint {checkpoint.folder} with another "
            "--checkpoint_path keeps it"
        )
    return Start(checkpoint, tuple(found.leftovers), newest.note, damaged=tuple(skipped))


def _resume_from(checkpoint: Checkpoint, found: Contents, delete_newer: bool) -> Start:
    newer = [folder for step, folder in step_folders(found.run_folder) if step > checkpoint.step][::-1]
    of_value = ", ".join(folder.name for folder in newer if folder not in found.leftovers)
    if of_value and not delete_newer:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint.folder}: {found.run_folder} has newer checkpoints "
            f"({of_value}): {DELETE_NEWER} deletes them, another --checkpoint_path keeps them, and "
            "--resume_from_checkpoint without a value resumes from the newest"
        )
    note = f"{DELETE_NEWER}: deleting {of_value} of {found.run_folder}" if of_value else None
    return Start(checkpoint, (*newer, *(path for path in found.leftovers if path not in newer)), note)


def prepare_run_folder(run_folder: Path, start: Start) -> None:
    """Create the run folder, and delete what does not belong to the run that starts. Main process only.

    Every step of it can be repeated after a kill in the middle of it.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    if start.note is not None:
        _say(start.note)
    (run_folder / SUMMARY_FILE).unlink(missing_ok=True)  # a resumed run is not finished
    if start.checkpoint is not None and start.checkpoint.is_in(run_folder):
        point_to(run_folder / start.checkpoint.folder.name)  # the links may be of another step
    for path in start.damaged:
        _put_aside(path)
    for path in start.delete:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        elif is_leftover(path) or path.name.startswith("step-"):
            if sentence := delete_tree(path) if is_leftover(path) else delete_folder(path):
                _say(sentence)
        else:
            shutil.rmtree(path)
    if (named := best(run_folder)) is not None and not (run_folder / named).is_dir():
        (run_folder / BEST).unlink()  # of a later step than the run resumes from


def _put_aside(folder: Path) -> None:
    """Give a damaged step folder a name under which nothing reads or deletes it."""
    names = (folder.with_name(f"{folder.name}{DAMAGED}{f'-{number}' * (number > 1)}") for number in range(1, 10**6))
    name = next(name for name in names if not os.path.lexists(name))
    lock.check(folder)
    folder.rename(name)
    _say(f"{folder} is {name} now: delete it when it is of no use to you")


def has_checkpoint(run_folder: Path) -> bool:
    return bool(look(run_folder).checkpoints)


def find(requested: str, run_folder: Path) -> Checkpoint:
    """The checkpoint that `--resume_from_checkpoint` names: `latest` of the run folder, or a step or run folder.

    It is read and checked completely, by each process for itself: all of them see the same files, so all take the same
    one, before they can talk to each other. If the last one of a run is damaged, it is the newest that is intact, and
    the main process says so.

    Raises:
        UserError: if there is none, or the named step is damaged.
    """
    folder = run_folder if requested == "latest" else Path(requested)
    if not folder.exists():
        raise UserError(f"--resume_from_checkpoint {requested}: {folder} does not exist")
    if not _is_run_folder(folder):
        checkpoint, fault = read_intact(folder)
        if checkpoint is not None:
            return checkpoint
        instead = _newest_intact(folder.parent)[0]
        remedy = f"resume from {instead.folder}" if instead else "start a new run without the flag"
        raise UserError(f"--resume_from_checkpoint {requested}: {fault}; {remedy}")
    newest = _newest(requested, folder)
    if newest.note is not None:
        _say(newest.note)
    return newest.checkpoint


def read_intact(folder: Path) -> tuple[Checkpoint | None, Fault | None]:
    """The checkpoint in a step folder and None, or None and the first fault of it."""
    try:
        checkpoint = read_state(folder)
        fault = next(faults(checkpoint), None)
    except UserError as error:
        return None, Fault(str(error), is_damage=isinstance(error, DamagedState))
    if fault is not None:
        return None, fault
    if checkpoint.state.digests is None:
        _say(f"{folder} was written by an older version, without digests: only names, shapes and values are checked")
    return checkpoint, None


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint of a run that is intact.

    `note` is the sentence to say if it is not the one that `latest` names; `skipped` are the newer step folders.
    """

    checkpoint: Checkpoint
    note: str | None
    skipped: dict[Path, Fault]


def _newest(requested: str, run_folder: Path) -> Newest:
    checkpoint, reason, skipped = _newest_intact(run_folder)
    if checkpoint is None:
        again = "" if all(fault.is_damage for fault in skipped.values()) else "try again, or "
        raise UserError(
            f"--resume_from_checkpoint {requested}: {reason}, and no other checkpoint there is intact; {again}start a "
            "new run, with another --checkpoint_path, or with --overwrite, which deletes this one"
        )
    note = f"{reason}; resuming from {checkpoint.folder}, the newest checkpoint that is intact"
    return Newest(checkpoint, None if reason is None else note, skipped)


def _newest_intact(run_folder: Path) -> tuple[Checkpoint | None, str | None, dict[Path, Fault]]:
    """The newest checkpoint that is intact, why it is not the one that `latest` names, and the newer step folders.

    A kill between the two leaves a complete step folder newer than `latest`; the damaged ones are computed again.
    """
    folders, named, reason = [folder for _, folder in step_folders(run_folder)], None, None
    skipped: dict[Path, Fault] = {}
    try:
        named = latest(run_folder)
    except FileNotFoundError:
        reason = f"{run_folder / LATEST} is missing"
    except UserError as error:
        reason = str(error)
    if named is not None and named not in folders:
        reason = f"{run_folder / LATEST} names {named.name}, which is missing"
    for folder in reversed(folders):
        checkpoint, fault = read_intact(folder)
        if checkpoint is not None:
            if reason is None and named is not None and folder != named:
                reason = f"{run_folder / LATEST} names {named.name}"
            return checkpoint, reason, skipped
        assert fault is not None
        skipped[folder] = fault
        reason = reason or str(fault)
    return None, reason, skipped


def _is_run_folder(folder: Path) -> bool:
    return not (folder / STATE).exists() and ((folder / LATEST).exists() or bool(step_folders(folder)))


def _say(sentence: str) -> None:
    if processes.rank() == 0:
        print(sentence, file=sys.stderr, flush=True)


def check_same_run(checkpoint: Checkpoint, state: TrainingState) -> None:
    """Refuse to resume with another model, data or batch: the loss curve would not be the uninterrupted run's."""
    for key in SAME_IN_A_RUN:
        found, wanted = getattr(checkpoint.state, key), getattr(state, key)
        if key == "train_data":  # older versions recorded less of it
            wanted = {fact: wanted.get(fact) for fact in found}
        if found != wanted:
            raise UserError(
                f"{checkpoint.folder}: was trained with {key} {found}, and this run has {wanted}; "
                f"give the same flags, or start a new run from its weights with --model {checkpoint.folder}"
            )


def check_changes(checkpoint: Checkpoint, state: TrainingState, allowed: bool) -> None:
    """Report what differs from the checkpoint's run; refuse what would change its losses, unless that is `allowed`."""
    before, after = checkpoint.state.facts, state.facts
    before = after | before  # what an older version did not record is not compared
    found = changes.changes(before, after, checkpoint.step)
    if not allowed and (reason := changes.refusal(found, before, after, checkpoint.step)) is not None:
        raise UserError(f"{checkpoint.folder}: {reason}")
    if found:
        _say(f"this run differs from that of {checkpoint.folder}:\n{changes.table(found)}")
