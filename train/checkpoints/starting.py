"""Where a run starts: the checkpoint that it resumes from, and a run folder that is free for it."""

import shutil
import sys
from pathlib import Path

from train.checkpoints.step_folder import (
    LATEST,
    STATE,
    Checkpoint,
    TrainingState,
    faults,
    latest,
    read_state,
    step_folders,
)
from train.utils import processes
from train.utils.errors import UserError
from train.utils.files import delete_folder, write_text

# Fields of the training state that a resumed run must share with its checkpoint, or its loss curve would be another.
SAME_IN_A_RUN = ("model", "train_data", "seed", "block_size", "document_mask", "sequences_per_step", "optimizer")


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
        instead, _ = _newest_intact(folder.parent)
        remedy = f"resume from {instead.folder}" if instead else "start a new run without the flag"
        raise UserError(f"--resume_from_checkpoint {requested}: {fault}; {remedy}")
    checkpoint, fault = _newest_intact(folder)
    if checkpoint is None:
        raise UserError(
            f"--resume_from_checkpoint {requested}: {fault}, and no other checkpoint there is intact; start a new "
            "run, with --overwrite or another --checkpoint_path"
        )
    if fault is not None:
        _say(f"{fault}; resuming from {checkpoint.folder}, the newest checkpoint that is intact")
    return checkpoint


def read_intact(folder: Path) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint in a step folder and None, or None and the first fault of it."""
    try:
        checkpoint = read_state(folder)
        fault = next(faults(checkpoint), None)
    except UserError as error:
        return None, str(error)
    if fault is not None:
        return None, fault
    if checkpoint.state.digests is None:
        _say(f"{folder} is of an older version, without digests: only names, shapes and finite values are checked")
    return checkpoint, None


def _newest_intact(run_folder: Path) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint that `latest` names, or else the newest that is intact; and the fault of the one named."""
    folders = [folder for _, folder in reversed(step_folders(run_folder))]
    fault = None
    try:
        named = latest(run_folder)
        folders = [named, *(folder for folder in folders if folder != named)]
    except FileNotFoundError:
        fault = f"{run_folder / LATEST} is missing"
    except UserError as error:
        fault = str(error)
    for folder in folders:
        checkpoint, found = read_intact(folder)
        if checkpoint is not None:
            return checkpoint, fault
        fault = fault or found
    return None, fault


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
                f"{checkpoint.folder}: was trained with {key} {found}, this run has {wanted}; "
                f"give the same flags, or start a new run from its weights with --model {checkpoint.folder}"
            )


def check_free(run_folder: Path, resuming: bool, overwrite: bool) -> None:
    """Refuse a run folder that holds a run, unless that run is to be resumed or replaced."""
    if overwrite and run_folder.exists() and any(run_folder.iterdir()) and not _holds_a_run(run_folder):
        raise UserError(f"--overwrite: {run_folder} holds files but no run; name another --checkpoint_path")
    if not resuming and not overwrite and _holds_a_run(run_folder):
        kind = "a finished run" if (run_folder / "metrics.json").exists() else "an unfinished run"
        raise UserError(
            f"{run_folder} already holds {kind}: --overwrite replaces it, --resume_from_checkpoint resumes it, "
            "or name another --checkpoint_path"
        )


def prepare_run_folder(run_folder: Path, checkpoint: Checkpoint | None, overwrite: bool) -> None:
    """Create the run folder, and delete what an earlier run wrote to it after `checkpoint`. Main process only."""
    if overwrite and run_folder.exists():
        shutil.rmtree(run_folder)
    run_folder.mkdir(parents=True, exist_ok=True)
    for leftover in [*run_folder.glob(".step-*.tmp"), *run_folder.glob(".step-*.old")]:
        shutil.rmtree(leftover)
    (run_folder / "metrics.json").unlink(missing_ok=True)  # a resumed run is not finished
    if checkpoint is not None and checkpoint.is_in(run_folder):
        write_text(run_folder / LATEST, checkpoint.folder.name + "\n")
        for step, folder in step_folders(run_folder):
            if step > checkpoint.step:
                delete_folder(folder)


def _holds_a_run(run_folder: Path) -> bool:
    return any((run_folder / name).exists() for name in (LATEST, "metrics.jsonl", "metrics.json"))
