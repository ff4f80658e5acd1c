"""Upload a finished run to the Hugging Face Hub, with its model card."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from train.checkpoints.run_folder import model_folder, read_run
from train.checkpoints.step_folder import model_files
from train.compare.run_charts import training_loss_chart
from train.hub.card import CHART, card
from train.utils.errors import UserError, first_line
from train.utils.files import write_text


def check(repo: str, flag: str = "--push_to_hub") -> None:
    """Refuse a `repo` that is not owner/name, or a user who is not logged in; messages name it by `flag`."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{flag} {repo}: {error}") from None
    if "/" not in repo:
        raise UserError(f"{flag} {repo}: write owner/name")
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network: each its own class
        raise UserError(
            f"{flag} {repo}: not logged in to the Hub ({first_line(error)}); run `hf auth login`"
        ) from None


def push(run_folder: Path, repo: str, flag: str = "--push_to_hub") -> str:
    """Write the card and its chart into the run folder, upload them with the latest model, and return its address.

    The weights are those of the step that the card describes: the run folder's own files may be of an earlier one.
    """
    run = read_run(run_folder, repo.rpartition("/")[2])
    folder, wanted = model_folder(run_folder), f"step-{run.summary['steps']}"
    if folder.name != wanted:
        there = f"the latest checkpoint is {folder.name}" if folder != run_folder else f"there is no {wanted}"
        raise UserError(
            f"{run_folder}: its metrics.json has {run.summary['steps']} steps, and {there}: the card would describe "
            "other weights; let the run finish, or resume it"
        )
    write_text(run_folder / "README.md", str(card(run, repo)))
    (run_folder / CHART).write_bytes(training_loss_chart([run]).png())
    # Nothing else of the folder: metrics and traces name paths of this machine.
    files = [*model_files(folder), run_folder / "README.md", run_folder / CHART]
    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        done = api.create_commit(
            repo,
            [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in files],
            commit_message=f"{run.summary['steps']} steps",
        )
    except Exception as error:  # each its own class
        raise UserError(
            f"{flag} {repo}: {first_line(error)}; the run in {run_folder} is complete: "
            f"python -m train.hub {run_folder} {repo} tries again"
        ) from None
    return done.repo_url.url
