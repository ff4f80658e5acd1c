"""A job in which a rank stands still ends, in every layout: the rank is named, and the others show their stacks."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port, losses
from tests.jobs import Job, job, launcher, layout

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


@contextmanager
def two_ranks(cwd: Path, *words: object) -> Iterator[list[Job]]:
    """Without a launcher, which would need half a minute to end a stopped process."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with ExitStack() as stack:
        yield [
            stack.enter_context(job(sys.executable, *words, cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), **shared))
            for rank in (0, 1)
        ]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "victim"),
    [
        ("torchrun", "baseline", 1),
        ("accelerate", "zero2", 0),
        ("deepspeed", "zero2", 1),
        ("accelerate", "pipeline", 1),
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
