"""What keeps the processes of a job from finding each other is said in a sentence, by each process that waits."""

import json
import os
import socket
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from tests.conftest import free_port
from tests.forks import run_ranks

JOIN = """
import json, sys
from train.job.rendezvous import join
from train.utils.command import run_command

def main():
    join(float(sys.argv[1]), json.loads(sys.argv[2]))
    print("joined", flush=True)
    sys.stdin.read()

run_command(main)
"""


def ends(
    cwd: Path, *ranks: dict[str, str], timeout: float = 30, facts: tuple[dict[str, object], ...] = ()
) -> list[tuple[int, str]]:
    """The exit code and the error of each process, which has the environment `ranks` and the `facts`."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    started = []
    try:
        for index, rank in enumerate(ranks):
            words = [sys.executable, "-c", JOIN, str(timeout), json.dumps(facts[index] if facts else {})]
            env = {**os.environ, **shared, **rank}
            started.append(Popen(words, env=env, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, cwd=cwd))
        return [(each.wait(60), each.communicate()[1]) for each in started]
    finally:
        for each in started:
            each.kill()
            each.communicate()


def sentence(error: str) -> str:
    """The last line, below PyTorch's own warnings."""
    assert "Traceback" not in error, error
    return error.strip().splitlines()[-1]


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    [(code, error)] = ends(tmp_path, {"RANK": "0"}, timeout=1)
    assert code == 2
    assert sentence(error).startswith("error: rank 1 of 2 has not joined within 1 seconds; start the same command")


@pytest.mark.faults
def test_ranks_that_do_not_come_are_named_by_all(tmp_path: Path) -> None:
    jobs = ends(tmp_path, *({"RANK": str(rank), "WORLD_SIZE": "4"} for rank in (0, 2)), timeout=5)
    for code, error in jobs:
        assert code == 2
        assert "ranks 1, 3 of 4 have not joined within 5 seconds" in sentence(error)


@pytest.mark.faults
def test_a_rank_that_comes_twice_is_refused(tmp_path: Path) -> None:
    jobs = ends(tmp_path, *({"RANK": rank, "WORLD_SIZE": "3"} for rank in ("0", "1", "1")))
    for code, error in jobs:
        assert code == 2
        assert "rank 1 of 3 has joined twice: process " in sentence(error)
        assert f" on {socket.gethostname()}, and process " in sentence(error)


@pytest.mark.faults
def test_a_second_rank_0_finds_the_port_taken(tmp_path: Path) -> None:
    (first, one), (second, two) = ends(tmp_path, {"RANK": "0"}, {"RANK": "0"}, timeout=3)
    assert first == second == 2
    assert any("cannot host the job's store at MASTER_ADDR 127.0.0.1" in sentence(each) for each in (one, two))


@pytest.mark.faults
def test_jobs_of_different_sizes_do_not_mix(tmp_path: Path) -> None:
    jobs = ends(tmp_path, {"RANK": "0", "WORLD_SIZE": "3"}, {"RANK": "1", "WORLD_SIZE": "2"})
    assert [code for code, _ in jobs] == [2, 2]
    assert any("belongs to a job of" in sentence(error) for _, error in jobs)


@pytest.mark.faults
def test_a_main_machine_that_does_not_answer_is_named(tmp_path: Path) -> None:
    [(code, error)] = ends(tmp_path, {"RANK": "1"}, timeout=2)
    assert code == 2
    assert "rank 1 of 2: rank 0 cannot be reached at 127.0.0.1, port " in sentence(error)
    assert "--machine_rank" in sentence(error)


@pytest.mark.parametrize("variable", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_names_no_main_machine_is_refused(tmp_path: Path, variable: str) -> None:
    [(code, error)] = ends(tmp_path, {"RANK": "1", variable: ""})
    assert code == 2
    assert f"{variable} is ''" in sentence(error)


def test_what_the_processes_run_must_agree(tmp_path: Path) -> None:
    ranks = [{"RANK": "0"}, {"RANK": "1"}]
    jobs = ends(tmp_path, *ranks, facts=({"--seed": 1, "torch": "2.13"}, {"--seed": 2, "torch": "2.12"}))
    for code, error in jobs:
        assert code == 2
        assert "--seed is 1 on rank 0 (process " in sentence(error)
        assert ") and 2 on rank 1 (process " in sentence(error)
        assert "torch is 2.13 on rank 0" in sentence(error)


@pytest.mark.faults
def test_a_launcher_that_is_gone_before_its_processes_join_is_named(tmp_path: Path) -> None:
    """Within a minute: a store that a launcher hosts is there before its processes are."""
    own = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "gone", "RANK": "0", "WORLD_SIZE": "2"}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = run_ranks("train", ["--model=tiny", f"--checkpoint_path={tmp_path}/out"], tmp_path, 1, check=False, own=own)
    assert done.returncode == 2, done.stdout
    assert "does not answer" in done.stdout
    assert "start the job again" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "out").exists()
