"""Check the checkpoints of a run: that each tensor and file is as it was written.

    python -m train.checkpoints --verify checkpoint/baseline

Names every tensor and file that is missing or damaged, and exits with 2 if there is one.
"""

from collections.abc import Iterator
from pathlib import Path

from train.checkpoints.run_folder import LATEST, latest
from train.checkpoints.step_folder import STATE, Checkpoint, faults, read_state, step_folders
from train.config.arguments import ArgumentParser
from train.utils.command import run_command
from train.utils.errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m train.checkpoints", description=__doc__)
    parser.add_argument(
        "--verify",
        metavar="FOLDER",
        type=Path,
        nargs="+",
        required=True,
        help="run folders, whose checkpoints are all checked, or step folders",
    )
    found = [fault for folder in parser.parse_args(argv).verify for fault in verify(folder)]
    if found:
        raise UserError("\n".join(found))


def verify(folder: Path) -> Iterator[str]:
    """A sentence for each fault of the checkpoints in a run or step folder; print which are intact."""
    if (folder / STATE).exists():
        yield from _verify_step(folder)
        return
    steps = [step for _, step in step_folders(folder)]
    if not steps:
        yield f"{folder} holds no checkpoint: give a run folder, or a step-N folder in one"
        return
    for step in steps:
        yield from _verify_step(step)
    try:
        if latest(folder) not in steps:
            yield f"{folder / LATEST} names {latest(folder).name}, which is missing: write {steps[-1].name} into it"
    except FileNotFoundError:
        yield f"{folder / LATEST} is missing: write {steps[-1].name} into it"
    except UserError as error:
        yield str(error)


def _verify_step(folder: Path) -> Iterator[str]:
    try:
        checkpoint = read_state(folder)
    except UserError as error:
        yield str(error)
        return
    found = [str(fault) for fault in faults(checkpoint)]
    yield from (f"{fault}; delete {folder}, or restore it from a copy" for fault in found)
    if not found:
        print(f"{folder}: {_description(checkpoint)}")


def _description(checkpoint: Checkpoint) -> str:
    digests = checkpoint.state.digests
    if digests is None:
        return "names, shapes and values are right; written by an older version, without digests"
    return f"{len(digests.tensors)} tensors and {len(digests.files)} other files are as they were written"


if __name__ == "__main__":
    run_command(main)
