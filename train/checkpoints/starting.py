"""Where a run starts: the checkpoint that it resumes from, and a run folder that is free for it."""

import shutil
from pathlib import Path

from train.checkpoints.step_folder import LATEST, STATE, Checkpoint, TrainingState, latest, step_folders
from train.utils.errors import UserError
from train.utils.files import delete_folder, from_json, read_json, write_text

# Fields of the training state that a resumed run must share with its checkpoint, or its loss curve would be another.
SAME_IN_A_RUN = ("model", "train_data", "seed", "block_size", "document_mask", "sequences_per_step", "optimizer")


def find(requested: str, run_folder: Path) -> Checkpoint:
    """The checkpoint that `--resume_from_checkpoint` names: `latest` of the run folder, or a step or run folder.

    Raises:
        UserError: if there is none, or it is incomplete.
    """
    folder = run_folder if requested == "latest" else Path(requested)
    if not folder.exists():
        raise UserError(f"--resume_from_checkpoint {requested}: {folder} does not exist")
    if not (folder / STATE).exists() and (folder / LATEST).exists():
        folder = latest(folder)
    if not (folder / STATE).exists():
        raise UserError(
            f"--resume_from_checkpoint {requested}: {folder} holds no complete checkpoint ({STATE} is missing); "
            "name a step-N folder, or start a new run without the flag"
        )
    return Checkpoint(folder, from_json(TrainingState, read_json(folder / STATE), folder / STATE, "training"))


def check_same_run(checkpoint: Checkpoint, state: TrainingState) -> None:
    """Refuse to resume with another model, data or batch: the loss curve would not be the uninterrupted run's."""
    for key in SAME_IN_A_RUN:
        found, wanted = getattr(checkpoint.state, key), getattr(state, key)
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
