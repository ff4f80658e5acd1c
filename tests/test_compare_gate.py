import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, python
from tests.finished_runs import write_run
from train.checkpoints.run_folder import read_runs
from train.compare import __main__ as compare
from train.compare.figures import differences
from train.compare.gate import EXAMPLE, check, parse_gate
from train.utils.errors import UserError


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "draw", lambda runs: [])


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """The second twice as fast, in a quarter of the memory, with 0.004 more loss."""
    return [
        write_run(tmp_path / "baseline"),
        write_run(tmp_path / "optimized", step_time=0.5, peak=2**28, val_loss=2.004),
    ]


def sentences(gate: str, folders: list[Path]) -> list[str]:
    runs = read_runs(folders)
    return [result.sentence for result in check(parse_gate(gate), runs, differences(runs))]


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("tokens_per_second>=1.2x", "met: tokens_per_second>=1.2x: optimized 2x"),
        ("tokens_per_second>=2x", "met: tokens_per_second>=2x: optimized 2x"),
        ("tokens_per_second>=2.01x", "MISSED: tokens_per_second>=2.01x: optimized 2x"),
        ("tokens_per_second<=1.9e3", "MISSED: tokens_per_second<=1.9e3: optimized 2000"),
        ("tokens_per_second >= +1000", "met: tokens_per_second >= +1000: optimized +1000"),
        ("val_loss<=+0.02", "met: val_loss<=+0.02: optimized +0.004"),
        ("val_loss<=+0.003", "MISSED: val_loss<=+0.003: optimized +0.004"),
        ("val_loss<=-0.1", "MISSED: val_loss<=-0.1: optimized +0.004"),
        ("val_loss<=2.5", "met: val_loss<=2.5: optimized 2.004"),
        ("peak_memory<=0.8x", "met: peak_memory<=0.8x: optimized 0.25x"),
        ("peak_memory_bytes<=0.2x", "MISSED: peak_memory_bytes<=0.2x: optimized 0.25x"),
        ("step_time_seconds.median<=0.5x", "met: step_time_seconds.median<=0.5x: optimized 0.5x"),
        ("mfu>=0.3", "MISSED: mfu>=0.3: optimized has no mfu"),
    ],
)
def test_conditions_by_hand(two: list[Path], condition: str, said: str) -> None:
    assert sentences(condition, two) == [f"gate {said}"]


def test_every_run_but_the_first_is_held_to_every_condition(two: list[Path], tmp_path: Path) -> None:
    slow = write_run(tmp_path / "slow", step_time=3.0)
    assert sentences("tokens_per_second>=1.2x,val_loss<=+0.02", [*two, slow]) == [
        "gate met: tokens_per_second>=1.2x: optimized 2x",
        "gate met: val_loss<=+0.02: optimized +0.004",
        "gate MISSED: tokens_per_second>=1.2x: slow 0.333333x",
        "gate met: val_loss<=+0.02: slow +0",
    ]


def test_what_cannot_be_compared_is_missed(tmp_path: Path) -> None:
    memory = {"peak_memory_bytes": 2**20, "peak_memory_kind": "cuda_allocated", "peak_memory_reserved_bytes": None}
    data = {"train": {"path": "t", "tokens": 1, "sha256": "a" * 64}, "val": {"path": "v", "sha256": "d" * 64}}
    other: dict[str, Any] = {"measured": memory, "data": data}
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **other)]
    assert sentences("peak_memory<=0.8x,val_loss<=+9,val_loss<=9,mfu>=1x", folders) == [
        "gate MISSED: peak_memory<=0.8x: b cannot be compared: peak_memory_kind is rss and cuda_allocated",
        "gate MISSED: val_loss<=+9: b cannot be compared: the validation data differ",
        "gate met: val_loss<=9: b 2",
        "gate MISSED: mfu>=1x: b has no mfu",
    ]


@pytest.mark.parametrize(
    "gate",
    [
        "", ",", "tokens_per_second>=1.2x,", "tokens_per_second", "tokens_per_second>1.2x", "tokens_per_second==1.2x",
        "tokens_per_second>=", "tokens_per_second>=x", "tokens_per_second>=fast", "tokens_per_second>=+1.2x",
        "tokens_per_second>=1.2%", "tokens_per_second>=nan", ">=1.2x", "1.2x<=tokens_per_second", "a>=1x;b>=1x",
    ],
)  # fmt: skip
def test_bad_syntax_is_named(gate: str) -> None:
    with pytest.raises(UserError, match=r"is not a condition: write METRIC>=BOUND") as caught:
        parse_gate(gate)
    assert EXAMPLE in str(caught.value)


@pytest.mark.parametrize("metric", ["speed", "run_type", "precision", "tokens_per_second.median", "config"])
def test_an_unknown_metric_is_named_with_those_that_there_are(metric: str) -> None:
    with pytest.raises(UserError, match=f"^--gate: {metric} is not a metric") as caught:
        parse_gate(f"val_loss<=+1,{metric}>=1x")
    assert "peak_memory, time_per_epoch, tokens_per_second, step_time_seconds.median" in str(caught.value)


def test_a_bound_beyond_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="beyond what a number can hold"):
        parse_gate("val_loss<=1e999")


def test_a_gate_that_is_met(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main([*map(str, two), "--out", str(tmp_path / "out"), "--gate", EXAMPLE])
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "gate met: tokens_per_second>=1.2x: optimized 2x",
        "gate met: val_loss<=+0.02: optimized +0.004",
        "gate met: peak_memory<=0.8x: optimized 0.25x",
    ]


def test_a_gate_that_is_missed_ends_with_exit_code_1_after_everything_is_written(
    two: list[Path], tmp_path: Path
) -> None:
    words = ["-m", "train.compare", *two, "--out", tmp_path / "out", "--gate", "tokens_per_second>=3x"]
    done = python(*words, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.endswith("gate MISSED: tokens_per_second>=3x: optimized 2x\n")
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert data["gate"] == [{"condition": "tokens_per_second>=3x", "run": "optimized", "found": 2.0, "met": False}]
    for name in ("report.md", "report.html"):
        assert "MISSED" in (tmp_path / "out" / name).read_text()


def test_a_gate_that_is_none_is_refused_before_anything_is_written(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--gate: speed is not a metric"):
        compare.main([*map(str, two), "--out", str(tmp_path / "out"), "--gate", "speed>=3x"])
    assert not (tmp_path / "out").exists()


def test_help_names_the_gate(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--help"])
    assert EXAMPLE in capsys.readouterr().out
