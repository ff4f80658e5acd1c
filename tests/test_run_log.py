"""A run outlives its log: records that cannot be written, damaged files, trackers that fail."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import records, train
from train.checkpoints.run_folder import missing_steps, read_steps
from train.run.log import StepsFile


def record(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "tokens": 8, "loss": 2.0, "tokens_per_second": 1.0, "step_time_seconds": 1.0, **more}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_that_could_not_be_written_is_written_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = [record(1)]
    file = StepsFile(path, kept)
    with largest_file(path.stat().st_size + 10):
        for step in (2, 3):  # of the first line ten bytes are taken
            kept.append(record(step))
            with pytest.raises(OSError, match="File too large"):
                file.append(kept[-1])
    assert read_steps(path)[0] == kept[:1]
    kept.append(record(4))
    assert "can be written again" in file.append(kept[-1])
    assert file.sync(kept) == ""
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept


@pytest.mark.parametrize("damage", ["removed", "truncated", "replaced", "written to"])
def test_a_file_that_something_else_changed_is_written_again(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = [record(1), record(2)]
    file = StepsFile(path, kept[:1])
    file.append(kept[1])
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, 20)
    elif damage == "replaced":
        shutil.copy(path, tmp_path / "copy")
        (tmp_path / "copy").replace(path)
    else:
        with path.open("a") as other:
            other.write("something else\n")
    assert "written again, 2 records" in file.sync(kept)
    kept.append(record(3))
    file.append(kept[-1])
    assert file.sync(kept) == ""
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == kept


def test_what_can_be_read_of_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record(step)).encode() for step in range(1, 10)]
    again = json.dumps(record(9, val_loss=3.0)).encode()
    path.write_bytes(b"\n".join([lines[0], lines[1][:9], *lines[3:6], b"\xff", lines[8], b"\0\0" + again, b"\0" * 99]))
    found, fault = read_steps(path)
    assert [each["step"] for each in found] == [1, 4, 5, 6, 9]
    assert found[-1]["val_loss"] == 3.0, "of two lines the later counts"
    assert fault.startswith("line 2, column ")
    assert missing_steps(found, 10) == "5 of 10 steps (2 to 3, 7 to 8, 10)"
    assert missing_steps([record(step) for step in range(2, 99, 2)], 99) == "50 of 99 steps (1, 3, 5, 7, … 99)"
    assert missing_steps(found[:1], 1) == ""
    assert read_steps(tmp_path) == ([], "there is no such file")


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_run_resumes_with_the_records_that_there_are(
    damage: str, finished: Path, flags: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "baseline"
    shutil.copytree(finished, run)
    whole = records(run)
    if damage == "cut":  # in step 3, and the rest of the block is zeros, as after a power failure
        lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:9] + b"\0" * 4000)
    else:
        (run / "metrics.jsonl").unlink()
    resume = [f"--resume_from_checkpoint={run}/step-4", "--delete_newer_checkpoints"]
    done = train(*flags, f"--checkpoint_path={tmp_path}", *resume, cwd=tmp_path)
    missing = "2 of 4 steps (3 to 4)" if damage == "cut" else "4 of 4 steps (1 to 4)"
    assert f"{run}/metrics.jsonl: {missing} cannot be read" in done.stdout
    kept = records(run)
    assert [each["step"] for each in kept] == [1, 2, 5, 6, 7, 8][2 * (damage == "removed") :]
    assert kept[-1]["loss"] == whole[-1]["loss"]
    summary = json.loads((run / "metrics.json").read_text())
    assert (summary["steps"], summary["training_time_seconds"]) == (8, None)
