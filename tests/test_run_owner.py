"""Runs that meet in one run folder, and run folders that are gone in mid-run: real processes of `python -m train`."""

import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import command, losses, python, records
from tests.jobs import job, launcher, layout
from tests.run_folders import names
from tests.test_lock import ELSEWHERE, leave_lock
from train.utils import lock


@pytest.mark.faults
@pytest.mark.parametrize("way", [[], ["--resume_from_checkpoint"]])
def test_a_second_run_is_refused_and_a_killed_one_begins_anew_by_the_same_command(
    flags: list[str], finished: Path, tmp_path: Path, way: list[str]
) -> None:
    run = tmp_path / "baseline"
    # No checkpoint before the end.
    words = ["-m", "train", *flags, "--eval_interval=4", f"--checkpoint_path={tmp_path}", *way]
    with job("python", *words, "--max_steps=400", cwd=tmp_path) as first:
        first.until_step(2, run)
        first.process.send_signal(signal.SIGSTOP)
        before = (run / "metrics.jsonl").read_bytes()
        for more in (["--overwrite"] if not way else [], []):
            second = python(*words, *more, cwd=tmp_path, check=False)
            assert second.returncode == 2
            assert f"{run} is being written by process {first.process.pid} on" in second.stderr
            assert "--max_steps=400" in second.stderr, "the command that holds it"
            assert "Traceback" not in second.stderr
        assert (run / "metrics.jsonl").read_bytes() == before
        first.process.kill()
        first.process.wait()
    third = python(*words, cwd=tmp_path)
    assert f"process {first.process.pid} on" in third.stderr
    assert "has ended without releasing it" in third.stderr
    assert ("the run starts from step 0" if way else "the run starts anew") in third.stderr
    assert losses(run) == losses(finished)
    assert lock.LOCK not in names(run)


@pytest.mark.parametrize("what", ["renamed", pytest.param("deleted", marks=pytest.mark.slow)])
def test_a_run_folder_that_is_gone_ends_the_run_at_the_next_save(flags: list[str], tmp_path: Path, what: str) -> None:
    run, elsewhere = tmp_path / "out" / "baseline", tmp_path / "elsewhere"
    words = ["python", "-m", "train", *flags, "--max_steps=400", "--save_interval=40"]
    with job(*words, f"--checkpoint_path={tmp_path}/out", cwd=tmp_path) as started:
        started.until_step(2, run)
        started.process.send_signal(signal.SIGSTOP)
        run.rename(elsewhere)
        if what == "deleted":
            shutil.rmtree(elsewhere)
        started.process.send_signal(signal.SIGCONT)
        assert started.end() == 2, started.said()
        assert f"{run} was removed or renamed while this process was writing to it" in started.said()
        assert "Traceback" not in started.said()
    assert not list((tmp_path / "out").iterdir()), "nothing is written elsewhere"
    assert not list(tmp_path.rglob("*step*"))


@pytest.mark.faults
def test_a_run_that_wakes_after_its_folder_was_taken_over_changes_nothing_in_it(
    flags: list[str], tmp_path: Path
) -> None:
    """As a machine that was suspended: the other one has written its name into the lock, and a log of its own."""
    run = tmp_path / "baseline"
    words = ["python", "-m", "train", *flags, "--max_steps=400", "--save_interval=40", f"--checkpoint_path={tmp_path}"]
    with job(*words, cwd=tmp_path) as started:
        started.until_step(2, run)
        started.process.send_signal(signal.SIGSTOP)
        leave_lock(run, ELSEWHERE)
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").write_text("of the other run\n")
        before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
        started.process.send_signal(signal.SIGCONT)
        assert started.end() == 2, started.said()
        assert f"{run} has been taken over by process 4711 on node7" in started.said()
        assert "Traceback" not in started.said()
    assert {path: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.slow
def test_a_job_of_two_processes_is_refused_by_its_main_one(flags: list[str], tmp_path: Path) -> None:
    words = ["-m", "train", *flags, *layout("baseline"), f"--checkpoint_path={tmp_path}"]
    with lock.owned(tmp_path / "baseline", "--checkpoint_path"):
        done = command(*launcher("torchrun"), *words, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert done.stderr.count("is being written by") == 1
    assert not (tmp_path / "baseline").exists()


@pytest.mark.slow
def test_a_restarted_job_does_not_begin_anew_where_its_folder_is_gone(flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "out" / "baseline"
    words = ["-m", "train", *flags, *layout("baseline"), "--max_steps=400", "--save_interval=60"]
    restarting = launcher("torchrun", "--max_restarts=1")
    with job(*restarting, *words, f"--checkpoint_path={tmp_path}/out", cwd=tmp_path) as started:
        started.until_step(2, run)
        run.rename(tmp_path / "elsewhere")
        assert started.end() != 0
        said = started.said()
    assert f"{run} was removed or renamed while this process was writing to it" in said
    assert f"{run} was removed or renamed while this job was writing to it" in said
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.faults
def test_a_run_writes_through_a_link_to_its_folder(flags: list[str], finished: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "baseline").symlink_to(disk)
    words = ["-m", "train", *flags, "--eval_interval=4", f"--checkpoint_path={tmp_path}"]
    python(*words, "--max_steps=4", cwd=tmp_path)
    python(*words, "--overwrite", cwd=tmp_path)
    assert (tmp_path / "baseline").is_symlink()
    assert losses(disk) == losses(finished)
    assert len(records(disk)) == 8


def test_a_run_folder_that_cannot_be_is_a_sentence(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "baseline").touch()
    done = python("-m", "train", *flags, f"--checkpoint_path={tmp_path}", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert f"--checkpoint_path: {tmp_path}/baseline is a file" in done.stderr
    assert "Traceback" not in done.stderr
