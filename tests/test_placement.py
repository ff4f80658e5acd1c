"""A layout that is not what was asked for is refused: real launchers, and the table that a right one gives."""

import os
from itertools import product
from pathlib import Path

import pytest

from tests.conftest import command, train
from train.engines.placement import RankPlacement, check_launch, check_placements
from train.utils.errors import UserError


def placements(stages: int, data_parallel: int, hosts: int = 1) -> list[RankPlacement]:
    count = stages * data_parallel
    return [
        RankPlacement(rank, f"host{rank * hosts // count}", "cpu", "ZeRO-1", stage, data_rank)
        for rank, (stage, data_rank) in enumerate(product(range(stages), range(data_parallel)))
    ]


def pairs(
    actual: list[RankPlacement], requested: list[RankPlacement] | None = None
) -> list[tuple[RankPlacement, RankPlacement]]:
    return list(zip(actual, requested or actual, strict=True))


def test_the_table_has_a_line_for_each_host_and_stage() -> None:
    table = check_placements(pairs(placements(2, 4, hosts=2))).splitlines()
    assert table[0] == "ZeRO-1 on 8 processes"
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table[3:]] == [
        ["host0", "cpu", "0", "0, 1, 2, 3", "0, 1, 2, 3"],
        ["host1", "cpu", "1", "4, 5, 6, 7", "0, 1, 2, 3"],
    ]
    assert check_placements(pairs(placements(1, 1))).startswith("ZeRO-1 on 1 process\n")


@pytest.mark.parametrize(
    ("field", "value"), [("wrapping", "plain"), ("stage", 0), ("data_rank", 0), ("rank", 0), ("device", "cuda")]
)
def test_every_process_has_to_be_what_was_asked(field: str, value: object) -> None:
    asked = placements(2, 2)
    found = [*asked[:3], asked[3]._replace(**{field: value})]  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"rank 3 of 4: {field} is {value}, not {getattr(asked[3], field)}"):
        check_placements(pairs(found, asked))


def test_slurm_tasks_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    check_launch(8)
    check_launch(16)  # one launcher a task, two processes each
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS is 8, but this process is one of 1"):
        check_launch(1)


def test_machines_that_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    check_placements(pairs(placements(1, 4, hosts=2)))
    with pytest.raises(UserError, match="SLURM_STEP_NUM_NODES is 2, but the processes of this job are on 1"):
        check_placements(pairs(placements(1, 4)))


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (["--cpu", "--num_processes", "2"], ["asked for 2 processes and started 1", "ddp.yaml"]),
        pytest.param(
            ["--use_deepspeed", "--num_machines", "2", "--num_processes", "2", "--machine_rank", "0",
             "--main_process_ip", "127.0.0.1", "--main_process_port", "0"],
            ["asked for 2 processes and started 1", "--deepspeed_multinode_launcher standard"],
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_launcher_that_starts_fewer_than_asked_is_refused(
    flags: list[str], tmp_path: Path, launch: list[str], words: list[str]
) -> None:
    optimized = ["--run_type=optimized", "--deepspeed_config=ds_configs/zero2.json"] if len(launch) > 3 else []
    done = command(
        "accelerate", "launch", *launch, "-m", "train", *flags, *optimized, f"--checkpoint_path={tmp_path}/out",
        cwd=Path(__file__).parent.parent, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_process_prints_its_layout(flags: list[str], tmp_path: Path) -> None:
    done = train(*flags, "--max_steps=1", f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    assert "plain on 1 process" in done.stdout + done.stderr
    assert os.uname().nodename in done.stdout + done.stderr
