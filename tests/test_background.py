"""Checkpoints written in the background are those of a save that training waits for, whatever happens meanwhile."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from tests.conftest import SMALL, losses, ranks, train
from tests.forks import SERVER, _run
from tests.jobs import layout
from tests.test_checkpoint import save, states_of
from train.checkpoints import __main__ as command
from train.checkpoints.background import BackgroundWriter, States

ENOSPC = os.strerror(errno.ENOSPC)


def contents(step_folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in step_folder.iterdir() if path.name != "training_state.json"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_does_not_change_what_is_being_written(tmp_path: Path, optimizer: str) -> None:
    torch.manual_seed(0)
    model = GPT2FlashForCausalLM(GPT2FlashConfig(**SMALL, vocab_size=101))
    trained = threading.Event()

    def write(step: int, states: States) -> None:
        assert trained.wait(60)
        save(tmp_path / "beside", model, step, optimizer=optimizer, states=states)

    with BackgroundWriter(print) as writer:
        for step in (1, 2):  # the second copy is in the memory of the first
            save(tmp_path / "waited", model, step, optimizer=optimizer)
            writer.start(states_of(model, step, optimizer), partial(write, step))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1.0
            trained.set()
            writer.wait()
            trained.clear()
            assert contents(tmp_path / "beside" / f"step-{step}") == contents(tmp_path / "waited" / f"step-{step}")


def test_one_save_at_a_time_and_the_wait_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.checkpoints import background

    monkeypatch.setattr(background, "NOTICEABLE_SECONDS", 0.0)
    said: list[str] = []
    at_once: list[int] = []

    def write(states: States) -> None:
        at_once.append(sum(thread.name == "checkpoint writer" for thread in threading.enumerate()))

    with BackgroundWriter(said.append) as writer:
        for _ in range(3):
            writer.start([], write)
    assert at_once == [1, 1, 1]
    assert "s until the last checkpoint was written" in said[0]


@pytest.mark.parametrize("then", ["check", "save", "end"])
def test_an_error_of_the_thread_surfaces(then: str) -> None:
    def fail(states: States) -> None:
        raise OSError(errno.ENOSPC, ENOSPC)

    writer = BackgroundWriter(print)
    writer.start([], fail)
    if then == "check":
        assert writer._thread is not None
        writer._thread.join()
    actions: dict[str, Callable[[], Any]] = {
        "check": writer.check,
        "save": lambda: writer.start([], fail),
        "end": lambda: writer.__exit__(None),
    }
    with pytest.raises(OSError, match=ENOSPC):
        actions[then]()
    writer.wait()  # once


@pytest.mark.parametrize(("available", "room"), [(124, False), (126, True)])
def test_a_copy_leaves_a_fifth_of_the_memory(monkeypatch: pytest.MonkeyPatch, available: int, room: bool) -> None:
    said: list[str] = []
    monkeypatch.setattr("train.utils.processes.available_memory", lambda: available * 10**9)
    pinned = 2 if torch.accelerator.is_available() else 1  # in powers of two
    assert BackgroundWriter(said.append).has_room(10**11 // pinned) == room
    assert room or "needs a copy of up to 100.0 GB, and 124.0 GB of memory are available" in said[0]


def test_what_follows_a_checkpoint_waits_for_it_in_the_background() -> None:
    may_write, done = threading.Event(), []

    def write(states: States) -> None:
        assert may_write.wait(60)
        done.append("written")

    writer = BackgroundWriter(print)
    writer.then(lambda: done.append("at once"))
    writer.start([], write)
    writer.then(lambda: done.append("then"))
    writer.then(lambda: done.append("and then"))
    assert done == ["at once"]
    may_write.set()
    writer.wait()
    assert done == ["at once", "written", "then", "and then"]


def test_nothing_follows_a_checkpoint_that_was_not_written() -> None:
    def fail(states: States) -> None:
        raise OSError(errno.ENOSPC, ENOSPC)

    done: list[str] = []
    writer = BackgroundWriter(print)
    writer.start([], fail)
    writer.then(lambda: done.append("then"))
    with pytest.raises(OSError, match=ENOSPC):
        writer.wait()
    assert not done


def test_an_error_of_training_is_not_hidden_by_one_of_the_thread() -> None:
    def fail(states: States) -> None:
        raise OSError(errno.ENOSPC, ENOSPC)

    said: list[str] = []
    writer = BackgroundWriter(said.append)
    writer.start([], fail)
    writer.__exit__(ZeroDivisionError)
    assert said == [f"the last checkpoint was not written: [Errno {errno.ENOSPC}] {ENOSPC}"]


def test_a_run_writes_the_same_checkpoints_beside_training(flags: list[str], tmp_path: Path) -> None:
    for name, value in (("beside", "true"), ("waited", "false")):
        words = ["--save_interval=1", "--save_total_limit=6", f"--async_save={value}"]
        train(*flags, *words, f"--checkpoint_path={tmp_path / name}", cwd=tmp_path)
    runs = [tmp_path / name / "baseline" for name in ("beside", "waited")]
    for step in range(3, 9):
        assert contents(runs[0] / f"step-{step}") == contents(runs[1] / f"step-{step}")
    assert not (runs[0] / "step-2").exists()
    assert {path.name for path in runs[0].iterdir()} == {path.name for path in runs[1].iterdir()}


LAYOUTS = ["baseline", "zero1", "zero2", "zero3", "pipeline", "fsdp2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_writes_the_same_checkpoints_beside_training(flags: list[str], tmp_path: Path, name: str) -> None:
    for way, value in (("beside", "true"), ("waited", "false")):
        words = [*flags, *layout("baseline" if name == "fsdp2" else name), "--save_interval=1", "--max_steps=4"]
        words += [f"--async_save={value}", f"--checkpoint_path={tmp_path / way}"]
        ranks(*words, cwd=tmp_path, fsdp2=name == "fsdp2")
    beside, waited = (next((tmp_path / way).glob("*/latest")).parent for way in ("beside", "waited"))
    for step in range(1, 5):
        assert contents(beside / f"step-{step}") == contents(waited / f"step-{step}")


def _train_until(change: int, error: int | None, *run: Any) -> None:
    """Train, and at the n-th change of the file system by the writer's thread be killed, or fail with `error`."""
    left, sync = change, os.fsync

    def count() -> None:
        nonlocal left
        if threading.current_thread().name != "checkpoint writer":
            return
        left -= 1
        if left == 0 and error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if left <= 0 and error is not None:
            raise OSError(error, os.strerror(error))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in ("os.mkdir", "os.rename", "os.link") or (error is None and event.startswith("os.rm")):
            count()

    def fsync(file: Any) -> None:
        count()
        sync(file)

    sys.addaudithook(hook)
    os.fsync = fsync
    _run(*run)


def train_until(change: int, words: list[str], cwd: Path, error: int | None = None) -> tuple[int | None, str]:
    log = cwd / "log"
    log.unlink(missing_ok=True)
    run = ("train", words, dict(os.environ), cwd, log, log)
    process = SERVER.Process(target=_train_until, args=(change, error, *run))
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    process.join()
    return code, log.read_text(errors="replace")


@pytest.fixture(scope="module")
def three_steps(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[float]]:
    """The flags of a run with two checkpoints in the background, one of which is kept, and its losses."""
    folder = tmp_path_factory.mktemp("three")
    words = [*flags, "--max_steps=3", "--save_interval=1", "--save_total_limit=1"]
    train(*words, f"--checkpoint_path={folder}", cwd=folder)
    return words, losses(folder / "baseline")


def is_killed_and_resumes(change: int, three_steps: tuple[list[str], list[float]], folder: Path) -> bool:
    """Whether the run is killed before its end; its checkpoints are complete then, and the same command resumes it."""
    words = [*three_steps[0], f"--checkpoint_path={folder}"]
    code, said = train_until(change, words, folder)
    if code == 0:
        return False
    assert code == -signal.SIGKILL, said
    run = folder / "baseline"
    saved = list(run.glob("step-*"))
    if saved:
        command.main(["--verify", *map(str, saved)])
    train(*words, *["--resume_from_checkpoint"] * bool(saved), cwd=folder)
    assert losses(run) == three_steps[1]
    return True


@pytest.mark.faults
@pytest.mark.parametrize("change", [1, 20, 45])
def test_a_kill_while_a_checkpoint_is_written(
    change: int, three_steps: tuple[list[str], list[float]], tmp_path: Path
) -> None:
    assert is_killed_and_resumes(change, three_steps, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_changes_of_the_file_system(three_steps: tuple[list[str], list[float]], tmp_path: Path) -> None:
    """At every twelfth, as each takes ten seconds; tests/test_starting.py kills at each change of a save."""
    for change in range(3, 500, 12):
        (tmp_path / str(change)).mkdir()
        if not is_killed_and_resumes(change, three_steps, tmp_path / str(change)):
            break
    assert change > 50


@pytest.mark.faults
@pytest.mark.parametrize("change", [5, 40])
def test_a_full_disk_ends_the_run(change: int, flags: list[str], tmp_path: Path) -> None:
    words = [*flags, "--save_interval=2", f"--checkpoint_path={tmp_path}"]
    code, said = train_until(change, words, tmp_path, error=errno.ENOSPC)
    assert code == 2, said
    assert ENOSPC in said
    assert "Traceback" not in said
    steps = list((tmp_path / "baseline").glob("step-*"))
    assert not steps or command.main(["--verify", *map(str, steps)]) is None
