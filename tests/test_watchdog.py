"""A job in which a rank stands still ends, in every layout: the rank is named, and the others show their stacks."""

import dataclasses
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore

from tests.conftest import free_port, losses
from tests.jobs import Job, job, launcher, layout
from train.job import watchdog
from train.job.watchdog import Silence, Status, describe

TIMEOUT = 6
ENDLESS = ["--max_steps=100000", "--warmup_steps=0"]
# The command as it is, but for one rank that does something else in its seventh step.
STUCK = """
import os, time
from train.data import batches
from train import __main__ as command
from train.utils.command import run_command

original = batches.TrainBatches.micro_batch

def stand_still():
    {code}

def micro_batch(self, step, *rest):
    if step == 6 and os.environ["RANK"] == "1":
        stand_still()
    return original(self, step, *rest)

batches.TrainBatches.micro_batch = micro_batch
run_command(command.main)
"""
# The command with calls of a rank that take longer than the timeout.
SLOW = """
import os, time
from train.checkpoints import step_folder
from train.run import loop
from train.run.log import StepsFile
from train import __main__ as command
from train.utils.command import run_command
def slow(owner, name, rank):
    function = getattr(owner, name)
    def slower(*arguments, **named):
        if os.environ["RANK"] == rank:
            time.sleep({seconds})
        return function(*arguments, **named)
    setattr(owner, name, slower)
{calls}
run_command(command.main)
"""


@contextmanager
def two_ranks(cwd: Path, *words: object) -> Iterator[list[Job]]:
    """Without a launcher, which would need half a minute to end a stopped process."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with ExitStack() as stack:
        yield [
            stack.enter_context(job(sys.executable, *words, cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), **shared))
            for rank in (0, 1)
        ]


def status(rank: int, beat: int, **changes: Any) -> Status:
    told = Status(rank, "node", 4711 + rank, 0.0, beat, beat, "step 7", "wait (x.py:1)", True, 5)
    return dataclasses.replace(told, **changes)


class Clock:
    """Looks of rank 0 at a job of two, a second after each other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("train.job.watchdog.time.monotonic", lambda: self.now)
        self.silence = Silence(2, looked=self.now)

    def look(self, *statuses: Status, own_marks: int = 0, after: float = 1.0) -> Silence:
        self.now += after
        self.silence.look({each.rank: each for each in statuses}, own_marks, 1.0)
        return self.silence


def test_only_a_job_without_progress_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for beat in range(20):  # rank 0 validates alone, batch by batch
        assert clock.look(status(0, beat), status(1, beat, marks=3), own_marks=beat).longest() <= 1
    for beat in range(20, 30):
        clock.look(status(0, beat, marks=19), status(1, beat, marks=3), own_marks=19)
    assert clock.silence.longest() == clock.silence.without_progress() == 10
    assert clock.silence.silent(2) == []


def test_a_rank_that_is_silent_is_found_while_the_others_make_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for beat in range(10):
        clock.look(status(0, beat), status(1, min(beat, 3)), own_marks=beat)
    assert clock.silence.without_progress() == 0
    assert clock.silence.longest() == 6
    assert clock.silence.silent(6) == [1]


def test_the_time_for_which_a_process_is_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.look(status(0, 1), status(1, 1))
    assert clock.look(status(0, 1), status(1, 1), after=3600).longest() == 2


def test_all_silent_is_rank_0_which_hosts_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    clock = Clock(monkeypatch)
    for _ in range(10):
        clock.look(status(0, 1), status(1, 1))
    assert clock.silence.silent(5) == [0]
    report = describe({0: status(0, 1)}, clock.silence, [0], 10)
    assert report.startswith("rank 0 of 2: no sign of life for 9 seconds: process 4711 on node, or the network to it;")


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({}, {"waits": False, "place": "read (y.py:2)"}, "rank 1 of 2: no progress for 0 seconds: process 4712"),
        ({"waits": False}, {"waits": False, "collectives": 4}, "rank 1 of 2: no progress"),
        ({"waits": False, "collectives": 4}, {"waits": False}, "rank 0 of 2: no progress"),
        ({}, {}, "no rank is known to be the cause"),
    ],
)
def test_the_rank_that_has_not_reached_the_collective_is_named(
    monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], second: dict[str, Any], named: str
) -> None:
    statuses = {0: status(0, 1, **first), 1: status(1, 1, **second)}
    report = describe(statuses, Clock(monkeypatch).silence, [], 10)
    assert named in report
    assert ("rank 0 of 2" in report) == (named.startswith("rank 0") or first == second)


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_by_the_other(flags: list[str], tmp_path: Path, victim: int) -> None:
    train = [*flags, *layout("baseline"), *ENDLESS, f"--timeout={TIMEOUT}", f"--checkpoint_path={tmp_path}"]
    with two_ranks(tmp_path, "-m", "train", *train) as ranks:
        ranks[victim].until_step(6, tmp_path / "baseline")
        survivor = ranks[1 - victim]
        ranks[victim].process.send_signal(signal.SIGSTOP)
        assert survivor.end(60) == 1
        said = survivor.said()
        assert f"rank {victim} of 2: no sign of life for" in said, said
        assert f"process {ranks[victim].process.pid} on " in said
        assert "is stopped" in said
        own = said.partition(f"rank {1 - victim} of 2 (process")[2]
        assert own.index("MainThread:") < own.index("in train_step") < own.index("read-ahead"), said


@pytest.mark.faults
@pytest.mark.parametrize("code", ["time.sleep(10000)", "while True: pass"])
def test_a_rank_that_is_stuck_in_python_is_named_and_shows_where(flags: list[str], tmp_path: Path, code: str) -> None:
    (tmp_path / "stuck.py").write_text(STUCK.format(code=code))
    train = [*flags, *layout("baseline"), *ENDLESS, f"--timeout={TIMEOUT}", f"--checkpoint_path={tmp_path}"]
    with two_ranks(tmp_path, "stuck.py", *train) as ranks:
        assert [rank.end(60) for rank in ranks] == [1, 1]
        first, second = (rank.said() for rank in ranks)
        assert "rank 1 of 2: no progress for" in first, first
        assert "rank 0 of 2: no" not in first, first
        assert "in stand_still" in second, second


@pytest.mark.faults
def test_work_of_one_rank_may_take_longer_than_the_timeout(flags: list[str], tmp_path: Path) -> None:
    calls = [
        'slow(loop, "load_model", "1")',
        'slow(StepsFile, "sync", "0")',
        'slow(step_folder, "write_text", "0")',  # after the last tensor of a checkpoint
        'slow(loop, "write_summary", "0")',  # after the other rank has exited
    ]
    (tmp_path / "slow.py").write_text(SLOW.format(calls="\n".join(calls), seconds=TIMEOUT + 2))
    train = [
        *flags,
        *layout("baseline"),
        "--async_save=false",
        f"--timeout={TIMEOUT}",
        f"--checkpoint_path={tmp_path}",
    ]
    with two_ranks(tmp_path, "slow.py", *train) as ranks:
        assert [rank.end(120) for rank in ranks] == [0, 0], "\n".join(rank.said() for rank in ranks)
    assert (tmp_path / "baseline" / "metrics.json").exists()


def test_a_rank_whose_watch_has_ended_is_expected_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for beat in range(20):
        clock.look(status(0, beat), status(1, min(beat, 3), ended=beat >= 3), own_marks=beat)
    assert clock.silence.longest() <= 1
    statuses = {0: status(0, 1), 1: status(1, 1, waits=False, ended=True)}
    assert "rank 1 of 2" not in describe(statuses, clock.silence, [], 10)


def test_work_that_shows_no_progress_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watch = watchdog.Watchdog(store, timeout=0.2)
    monkeypatch.setattr(watch, "threads", watch.threads[:1])  # the reporter
    watch.start()
    try:
        with watchdog.working("a download"):
            began = watchdog.PROGRESS.marks
            time.sleep(watchdog.WORK_TIMEOUTS * 0.2 / 2)
            amid = watchdog.PROGRESS.marks
            time.sleep(watchdog.WORK_TIMEOUTS * 0.2)
            late = watchdog.PROGRESS.marks
            time.sleep(0.2)
            assert began < amid < late == watchdog.PROGRESS.marks
    finally:
        watch.stop()


@pytest.mark.faults
def test_a_job_that_is_suspended_and_continued_goes_on(flags: list[str], tmp_path: Path) -> None:
    """One rank for less than the timeout, both for longer."""
    train = [*flags, *layout("baseline"), *ENDLESS, f"--timeout={TIMEOUT}", f"--checkpoint_path={tmp_path}"]
    with two_ranks(tmp_path, "-m", "train", *train) as ranks:
        ranks[0].until_step(6, tmp_path / "baseline")
        for suspended, seconds in ((ranks[:1], 1), (ranks[1:], 1), (ranks, TIMEOUT + 2)):
            for rank in suspended:
                rank.process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            done = len(losses(tmp_path / "baseline"))
            for rank in suspended:
                rank.process.send_signal(signal.SIGCONT)
            ranks[0].until_step(done + 6, tmp_path / "baseline")


@pytest.mark.faults
def test_a_rank_that_holds_the_gil_shows_its_stacks_too(flags: list[str], tmp_path: Path) -> None:
    """None of its threads runs, so that it looks stopped; a signal handler prints them."""
    (tmp_path / "stuck.py").write_text(STUCK.format(code="import ctypes; ctypes.PyDLL(None).sleep(10000)"))
    train = [*flags, *layout("baseline"), *ENDLESS, f"--timeout={TIMEOUT}", f"--checkpoint_path={tmp_path}"]
    with two_ranks(tmp_path, "stuck.py", *train) as (first, second):
        assert first.end(60) == 1
        assert "rank 1 of 2: no sign of life for" in first.said(), first.said()
        assert "is sleeping" in first.said()
        second.until(lambda: "in stand_still" in second.said(), 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "victim"),
    [
        ("torchrun", "baseline", 1),
        ("deepspeed", "zero2", 1),
        ("accelerate", "pipeline", 0),
    ],
)
def test_the_launcher_ends_a_job_with_a_stopped_rank(
    flags: list[str], tmp_path: Path, name: str, kind: str, victim: int
) -> None:
    train = ["--module" if name == "deepspeed" else "-m", "train", *flags, *layout(kind), *ENDLESS]
    train += [f"--timeout={TIMEOUT}", f"--checkpoint_path={tmp_path}"]
    with job(*launcher(name), *train, cwd=tmp_path) as started:
        started.until_step(6, tmp_path / ("baseline" if kind == "baseline" else "optimized"))
        processes = started.processes()
        started.worker(victim).send_signal(signal.SIGSTOP)
        assert started.end(120) != 0
        said = started.said()
        assert f"rank {victim} of 2: no sign of life for" in said, said
        assert f"rank {1 - victim} of 2 (process" in said
        assert "in train_step" in said
        assert not psutil.wait_procs(processes, timeout=5)[1], "no process outlives the job"
