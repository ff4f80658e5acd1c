"""A folder has one owner: who else would write to it is refused, and the lock of a dead owner is taken over."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.run_folders import save_step
from train.checkpoints import step_folder
from train.run.log import StepsFile
from train.utils import files, lock
from train.utils.errors import UserError

HOLD = """
import sys
from pathlib import Path
from train.utils.command import run_command
from train.utils.lock import owned
def main():
    with owned(Path(sys.argv[1]), "--out"):
        print("owned", flush=True)
        sys.stdin.read()
run_command(main)
"""
ELSEWHERE = lock.Owner("node7", "another-boot", 4711, "2026-01-01T00:00:00+00:00", "python -m train")


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the folder until its standard input is closed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        try:
            yield process
        finally:
            process.kill()


def leave_lock(folder: Path, owner: lock.Owner) -> Path:
    file = folder / lock.LOCK
    file.write_text(json.dumps(dataclasses.asdict(owner)))
    return file


def test_the_second_process_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        done = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 2
        said = done.stderr
        assert f"--out: {tmp_path} is being written by process {first.pid} on {os.uname().nodename} since 20" in said
        assert "wait until it ends, stop it, or name another --out" in said
        assert "Traceback" not in said
        first.communicate()
        assert first.returncode == 0
    assert not list(tmp_path.iterdir()), "it has released the lock"


def test_the_lock_of_a_killed_process_is_taken_over_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
    assert (tmp_path / lock.LOCK).exists()
    with lock.owned(tmp_path, "--out"):
        lock.check(tmp_path)
    assert re.search(rf"process {first.pid} on \S+ since .* has ended without releasing it", capsys.readouterr().err)


def test_a_folder_that_was_made_for_the_lock_goes_with_it(tmp_path: Path) -> None:
    with lock.owned(tmp_path / "a" / "b", "--out"):
        pass
    with lock.owned(tmp_path / "c" / "d", "--out"):
        (tmp_path / "c" / "kept").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["c", "kept"]


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with lock.owned(tmp_path, "--out"):
        child = os.fork()
        if child == 0:
            os.read(reading, 1)  # until the second owner has been there
            os._exit(0)
    try:
        with lock.owned(tmp_path, "--out"):
            lock.check(tmp_path)
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.5)


@pytest.fixture(params=["a local flock", "no flock"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems that several machines share."""
    if request.param == "no flock":
        monkeypatch.setattr(lock, "_try_flock", lambda descriptor: "missing")


@pytest.mark.usefixtures("impatient", "file_system")
def test_the_lock_of_another_machine_is_taken_over_when_nothing_renews_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    leave_lock(tmp_path, ELSEWHERE)
    with lock.owned(tmp_path, "--out"):
        assert json.loads((tmp_path / lock.LOCK).read_text())["process"] == os.getpid()
    said = capsys.readouterr().err
    assert "is locked by process 4711 on node7 since 2026-01-01T00:00:00+00:00 (python -m train): waiting" in said
    assert "has ended without releasing it" in said


@pytest.mark.usefixtures("impatient", "file_system")
def test_the_lock_of_another_machine_is_respected_while_it_is_renewed(tmp_path: Path) -> None:
    file, ended = leave_lock(tmp_path, ELSEWHERE), threading.Event()

    def renew() -> None:
        while not ended.wait(0.05):
            os.utime(file)

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with (
            pytest.raises(UserError, match="is being written by process 4711 on node7"),
            lock.owned(tmp_path, "--out"),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert json.loads(file.read_text())["host"] == "node7"


@pytest.mark.usefixtures("file_system")
def test_a_restarted_job_does_not_wait_for_the_machine_that_it_was_on(tmp_path: Path) -> None:
    leave_lock(tmp_path, dataclasses.replace(ELSEWHERE, job="17"))
    with lock.owned(tmp_path, "--out", job="17", restarted=True):
        assert json.loads((tmp_path / lock.LOCK).read_text())["process"] == os.getpid()


@pytest.mark.usefixtures("impatient")
def test_a_restarted_job_waits_where_another_one_has_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_lock(tmp_path, dataclasses.replace(ELSEWHERE, job="18"))
    with lock.owned(tmp_path, "--out", job="17", restarted=True):
        pass
    assert "waiting up to" in capsys.readouterr().err


@pytest.mark.usefixtures("impatient")
def test_a_lock_that_a_file_server_keeps_for_a_dead_machine_is_explained(tmp_path: Path) -> None:
    with holder(tmp_path):
        file = leave_lock(tmp_path, ELSEWHERE)
        with pytest.raises(UserError, match="no sign of life") as error, lock.owned(tmp_path, "--out"):
            pass
        assert f"if it has ended, delete {file}" in str(error.value)


@pytest.mark.usefixtures("impatient")
def test_a_broken_lock_file_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / lock.LOCK).write_text('{"host": "no')
    with lock.owned(tmp_path, "--out"):
        lock.check(tmp_path)


def test_the_owner_renews_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with lock.owned(tmp_path, "--out"):
        os.utime(tmp_path / lock.LOCK, ns=(0, 0))
        renewed = threading.Event()
        for _ in range(1000):
            if (tmp_path / lock.LOCK).stat().st_mtime_ns > 0:
                renewed.set()
                break
            threading.Event().wait(0.01)
        assert renewed.is_set()


def test_what_happened_to_the_folder_meanwhile_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with lock.owned(folder, "--out"):
        (folder / lock.LOCK).unlink()
        lock.check(folder)
        assert (folder / lock.LOCK).exists(), "only the file was removed: it is there again"
        leave_lock(folder, ELSEWHERE)
        with pytest.raises(UserError, match="has been taken over by process 4711 on node7"):
            lock.check(folder)
        folder.rename(tmp_path / "renamed")
        with pytest.raises(UserError, match="run was removed or renamed"):
            lock.check(folder)
    assert not folder.exists()
    with lock.owned(folder, "--out"):
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="run was removed or renamed"):
            lock.check(folder)
    assert not folder.exists()


def test_a_lock_that_was_taken_over_is_left_to_its_new_owner(tmp_path: Path) -> None:
    """The new owner has written its name into the same file."""
    with lock.owned(tmp_path, "--out"):
        file = leave_lock(tmp_path, ELSEWHERE)
    assert json.loads(file.read_text())["host"] == "node7"


def deep_folder(folder: Path) -> None:
    with files.atomic_folder(folder / "step-3", replace=True) as new:
        (new / "file").touch()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: files.write_text(folder / "text", "mine"),
        lambda folder: files.write_json(folder / "inner" / "metrics.json", {}),
        deep_folder,
        lambda folder: save_step(folder, 3),
        lambda folder: step_folder.rotate(folder, keep=1),
        lambda folder: step_folder.point_best_to(folder / "step-2"),
        lambda folder: StepsFile(folder / "metrics.jsonl", []),
    ],
)
def test_nothing_in_a_folder_is_changed_after_it_was_taken_over(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    (tmp_path / "inner").mkdir()
    for step in (1, 2):
        save_step(tmp_path, step)
    with lock.owned(tmp_path, "--out"):
        leave_lock(tmp_path, ELSEWHERE)
        before = {path: path.stat().st_ino for path in tmp_path.rglob("*")}
        with pytest.raises(UserError, match="has been taken over by process 4711 on node7"):
            change(tmp_path)
        assert {path: path.stat().st_ino for path in tmp_path.rglob("*")} == before


def test_a_file_that_was_begun_before_the_folder_was_taken_over_gets_no_name(tmp_path: Path) -> None:
    def write() -> None:
        with files.atomic_write(tmp_path / "latest") as temporary:
            temporary.write_text("step-2")
            leave_lock(tmp_path, ELSEWHERE)

    with lock.owned(tmp_path, "--out"), pytest.raises(UserError, match="has been taken over"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == [lock.LOCK]


def test_a_folder_that_this_process_does_not_own_is_not_checked(tmp_path: Path) -> None:
    leave_lock(tmp_path, ELSEWHERE)
    lock.check(tmp_path)
    assert (tmp_path / lock.LOCK).exists()


def test_where_no_folder_can_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder, said in (
        (tmp_path / "file", f"{tmp_path}/file is a file"),
        (tmp_path / "file" / "run", f"{tmp_path}/file is a file"),
        (tmp_path / "link", f"{tmp_path}/link is a link to {tmp_path}/nowhere, where there is no folder"),
        (tmp_path / "link" / "run", f"{tmp_path}/link is a link to {tmp_path}/nowhere, where there is no folder"),
    ):
        with pytest.raises(UserError, match=re.escape(f"--out: {said}; name another folder")):
            lock.owned(folder, "--out").__enter__()


def test_a_folder_is_the_same_under_another_path(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with (
        holder(tmp_path / "run"),
        pytest.raises(UserError, match="link is being written"),
        lock.owned(tmp_path / "link", "--out"),
    ):
        pass
