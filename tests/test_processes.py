"""A process that dies ends its job, whatever the launcher, and is the first thing on the screen."""

import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import command, free_port
from tests.jobs import END_SECONDS, Job, job, launcher, layout
from train.checkpoints.starting import find

CONSEQUENCES = ("closing signal", "Killing subprocess", "Traceback", "failed (exitcode")
ENDLESS = ["--max_steps=100000", "--warmup_steps=0", "--save_interval=4"]
# The command as it is, but for one rank whose seventh step fails.
FAILING = """
import os
from train.data import batches
from train import __main__ as command
from train.utils.command import run_command

original = batches.TrainBatches.micro_batch

def micro_batch(self, step, *rest):
    if step == 6 and os.environ["RANK"] == "1":
        raise RuntimeError("the disk of rank 1 is gone")
    return original(self, step, *rest)

batches.TrainBatches.micro_batch = micro_batch
run_command(command.main)
"""


def check_the_end(started: Job, processes: list[psutil.Process], first: str, run_folder: Path) -> None:
    assert started.end(END_SECONDS) != 0
    assert not psutil.wait_procs(processes, timeout=5)[1], "no process outlives the job"
    said = started.said()
    assert first in said, said
    assert all(said.index(first) < said.find(word) for word in CONSEQUENCES if word in said), said
    assert "Traceback" not in said.partition(first)[0], said
    folder = find("latest", run_folder).folder
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("torchrun", "baseline", marks=pytest.mark.faults),
        pytest.param("accelerate", "zero1", marks=pytest.mark.slow),
        pytest.param("deepspeed", "zero1", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_job_and_is_named_first(
    flags: list[str], tmp_path: Path, name: str, kind: str
) -> None:
    run_folder = tmp_path / ("baseline" if kind == "baseline" else "optimized")
    train = ["--module" if name == "deepspeed" else "-m", "train", *flags, *layout(kind), *ENDLESS]
    with job(*launcher(name), *train, f"--checkpoint_path={tmp_path}", cwd=tmp_path) as started:
        started.until_step(6, run_folder)
        started.until_saved(run_folder)
        processes = started.processes()
        started.worker(1).kill()
        check_the_end(started, processes, "rank 1 of 2: ended by SIGKILL", run_folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("torchrun", "baseline"),
        pytest.param("accelerate", "zero1", marks=pytest.mark.slow),
        pytest.param("deepspeed", "zero1", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_rank_comes_first(flags: list[str], tmp_path: Path, name: str, kind: str) -> None:
    run_folder = tmp_path / ("baseline" if kind == "baseline" else "optimized")
    (tmp_path / "failing.py").write_text(FAILING)
    train = ["failing.py", *flags, *layout(kind), *ENDLESS, f"--checkpoint_path={tmp_path}"]
    with job(*launcher(name), *train, cwd=tmp_path) as started:
        started.until_step(5, run_folder)
        started.until_saved(run_folder)
        processes = started.processes()
        check_the_end(started, processes, "rank 1 of 2: RuntimeError: the disk of rank 1 is gone", run_folder)
        if name != "deepspeed":
            summary = started.said().partition("Root Cause")[2]
            assert "rank      : 1 " in summary
            assert "RuntimeError: the disk of rank 1 is gone" in summary


@pytest.mark.slow
def test_without_a_launcher_the_survivor_ends_by_itself(flags: list[str], tmp_path: Path) -> None:
    port = str(free_port())
    train = [sys.executable, "-m", "train", *flags, *layout("baseline"), *ENDLESS, f"--checkpoint_path={tmp_path}"]
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with (
        job(*train, cwd=tmp_path, RANK="0", LOCAL_RANK="0", **alone) as survivor,
        job(*train, cwd=tmp_path, RANK="1", LOCAL_RANK="1", **alone) as victim,
    ):
        survivor.until_step(6, tmp_path / "baseline")
        survivor.until_saved(tmp_path / "baseline")
        victim.process.kill()
        check_the_end(survivor, [survivor.process], "rank 1 of 2: ended by SIGKILL", tmp_path / "baseline")
        assert "rank 0 of 2: lost another process of the job: RuntimeError" in survivor.said()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_workers_do_not_outlive_a_killed_launcher(flags: list[str], tmp_path: Path, name: str) -> None:
    kind = "baseline" if name == "torchrun" else "zero1"
    train = ["--module" if name == "deepspeed" else "-m", "train", *flags, *layout(kind), *ENDLESS]
    with job(*launcher(name), *train, f"--checkpoint_path={tmp_path}", cwd=tmp_path) as started:
        started.until_step(6, tmp_path / ("baseline" if kind == "baseline" else "optimized"))
        workers = [started.worker(0), started.worker(1)]
        workers[0].parent().kill()
        assert not psutil.wait_procs(workers, timeout=END_SECONDS)[1]
        assert "the launcher has exited" in started.said()


@pytest.mark.faults
def test_a_mistake_that_only_one_rank_sees_is_said(flags: list[str], tmp_path: Path) -> None:
    rank = ["env", "RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2"]
    done = command(*rank, sys.executable, "-m", "train", *flags, "--max_steps=0", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: rank 1: --max_steps: 0 must be at least 1\n"
