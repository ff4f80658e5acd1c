"""A job restarted by its launcher resumes from its last checkpoint, with the losses of an uninterrupted one."""

import os
import signal
import sys
from pathlib import Path
from subprocess import PIPE, Popen, run

import pytest
from torch.distributed import TCPStore

from tests.conftest import command, losses, records
from tests.jobs import job, launcher, layout

STEPS = ["--max_steps=40", "--save_interval=10"]
RESTARTED = "restarted by the launcher: the run"


@pytest.mark.parametrize(
    ("name", "kind", "victim"),
    [
        pytest.param("torchrun", "baseline", 1, marks=pytest.mark.faults),
        pytest.param("accelerate", "zero1", 0, marks=pytest.mark.slow),
        pytest.param("accelerate", "pipeline", 1, marks=pytest.mark.slow),
    ],
)
def test_a_restarted_job_ends_with_the_losses_of_an_uninterrupted_one(
    flags: list[str], tmp_path: Path, name: str, kind: str, victim: int
) -> None:
    train = ["-m", "train", *flags, *layout(kind), *STEPS, "--overwrite"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command(*launcher(name), *train, f"--checkpoint_path={whole}", cwd=tmp_path)
    run = "baseline" if kind == "baseline" else "optimized"
    restarting = launcher(name, "--max_restarts=1")
    with job(*restarting, *train, f"--checkpoint_path={broken}", cwd=tmp_path) as started:
        started.until_step(13, broken / run)
        started.until_saved(broken / run)
        started.worker(victim).kill()
        assert started.end() == 0, started.said()
        said = started.said()
        assert f"rank {victim} of 2: ended by SIGKILL" in said
        assert said.count(RESTARTED) == 1
        assert f"{RESTARTED} resumes from {broken / run}/step-" in said
    assert losses(broken / run) == losses(whole / run)
    assert [record["step"] for record in records(broken / run)] == list(range(1, 41))
    assert (broken / run / "metrics.json").exists()
    assert not list((broken / run).glob(".step-*")), "nothing half-written is left"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "victim"), [("accelerate", "zero2", 0)])
def test_a_job_whose_rank_stands_still_is_restarted(
    flags: list[str], tmp_path: Path, name: str, kind: str, victim: int
) -> None:
    train = ["-m", "train", *flags, *layout(kind), *STEPS, "--max_steps=300", "--timeout=10"]
    run = tmp_path / ("baseline" if kind == "baseline" else "optimized")
    with job(*launcher(name, "--max_restarts=1"), *train, f"--checkpoint_path={tmp_path}", cwd=tmp_path) as started:
        started.until_step(13, run)
        started.until_saved(run)
        started.worker(victim).send_signal(signal.SIGSTOP)
        assert started.end() == 0, started.said()
        said = started.said()
        assert f"rank {victim} of 2: no sign of life for" in said
        assert f"{RESTARTED} resumes from {run}/step-" in said
    assert [record["step"] for record in records(run)] == list(range(1, 301))


@pytest.mark.slow
def test_a_job_without_a_checkpoint_starts_again(flags: list[str], finished: Path, tmp_path: Path) -> None:
    """From the checkpoint of another run, with which it was started."""
    train = ["-m", "train", *flags, *layout("baseline"), f"--checkpoint_path={tmp_path}"]
    train += ["--max_steps=100", "--allow_changes"]
    half = f"--resume_from_checkpoint={finished}/step-4"
    with job(*launcher("torchrun", "--max_restarts=1"), *train, half, cwd=tmp_path) as started:
        started.until_step(10, tmp_path / "baseline")
        started.worker(1).kill()
        assert started.end() == 0, started.said()
        assert f"{RESTARTED} resumes from {finished}/step-4" in started.said()
    assert [record["step"] for record in records(tmp_path / "baseline")] == list(range(1, 101))


@pytest.mark.slow
def test_a_restart_leaves_an_earlier_run_alone(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "metrics.json").write_text("{}")
    train = ["-m", "train", *flags, *layout("baseline"), f"--checkpoint_path={tmp_path}"]
    done = command(*launcher("torchrun", "--max_restarts=1"), *train, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert done.stderr.count("already holds a finished run") == 2, "at both attempts"
    assert RESTARTED not in done.stdout
    assert [path.name for path in (tmp_path / "baseline").iterdir()] == ["metrics.json"]


def test_a_restart_does_not_extend_the_time_limit(tmp_path: Path) -> None:
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "test", "GROUP_WORLD_SIZE": "2",
    }  # fmt: skip

    def starts(own: float, **environment: str) -> str:
        words = [sys.executable, "-c", f"from train.job.rendezvous import job_start; print(job_start({own}))"]
        return run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout

    assert starts(7.5) == "7.5\n"
    assert [starts(own, **shared) for own in (8.5, 99.0)] == ["8.5\n"] * 2


JOIN = """
import sys
from train.job.rendezvous import join
store = join(60, {})
print(store.port, flush=True)
store.add("came", 1)
sys.stdin.read()
"""


def test_processes_meet_in_the_store_of_their_own_attempt(tmp_path: Path) -> None:
    """However many earlier ones there were: dead, or still about when a part of the job has begun again."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "test", "GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "2",
    }  # fmt: skip

    def start(rank: int) -> Popen[str]:
        env = {**os.environ, **shared, "RANK": str(rank)}
        return Popen([sys.executable, "-c", JOIN], env=env, stdin=PIPE, stdout=PIPE, text=True, cwd=tmp_path)

    def port(process: Popen[str]) -> int:
        assert process.stdout is not None
        return int(process.stdout.readline())

    started: list[Popen[str]] = []
    try:
        for old_is_dead in (True, False):
            old = [start(rank) for rank in (0, 1)]
            started += old
            meeting = port(old[0])
            assert port(old[1]) == meeting
            for process in old[1:] if not old_is_dead else old:
                process.kill()
                process.wait()
            follower = start(1)  # comes first, and finds the old address
            started.append(follower)
            leader = start(0)
            started.append(leader)
            assert port(leader) == port(follower) != meeting
    finally:
        for process in started:
            process.kill()
            process.communicate()
