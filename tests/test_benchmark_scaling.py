"""The benchmarks of real runs: with 1, 2 and 4 processes, and from launch to the first step."""

import sys
from pathlib import Path

import pytest

from benchmarks import scaling, startup, training_runs
from benchmarks.scaling import layout_of
from train.checkpoints.run_folder import FinishedRun
from train.config.run_config import parse
from train.utils.errors import UserError


def test_layouts_are_started_as_people_start_them() -> None:
    for kind in scaling.KINDS:
        for number in (1, 2):
            layout = layout_of(kind, number, batch=4)
            words = [*layout.command, *training_runs.training_flags(Path("train.bin"), "tiny", 16, 3, "no")]
            config = parse(words[words.index("train") + 1 :])
            assert config.run_type == layout.run_type
            assert config.deepspeed_config == (None if kind == "ddp" else f"ds_configs/{kind}.json")
            assert config.train_micro_batch_size_per_gpu == 4 // number
            if (kind, number) != ("ddp", 1):
                assert words[words.index("--num_processes") + 1] == str(number)
    assert scaling.name_of(layout_of("ddp", 1, batch=4)) == "plain x 1"


def finished(seconds: list[float], memory: int = 0, losses: tuple[float, float] = (3.0, 2.0)) -> FinishedRun:
    """A run of two steps for the warm-up and a step for each of `seconds`."""
    steps = [{"step_time_seconds": 99.0, "loss": loss} for loss in losses]
    steps += [{"step_time_seconds": each, "loss": 1.0} for each in seconds]
    return FinishedRun("run", Path(), {"peak_memory_bytes": memory}, steps)


def test_efficiency_is_taken_round_by_round() -> None:
    base = [finished([1.0, 1.0, 9.0], 2**30), finished([2.0], 2**30)]
    runs = [finished([2.0], 2**29), finished([1.0], 2**29)]
    # 8 tokens: 8 and 4 a second alone, 4 and 8 shared.
    zero1 = layout_of("zero1", 2, batch=4)
    assert scaling.row(zero1, runs, base, tokens=8, devices=1) == [
        "zero1 x 2", "6 (4 to 8)", "1.25 (0.50 to 2.00)", "0.50",
    ]  # fmt: skip
    assert scaling.row(zero1, runs, base, tokens=8, devices=2)[2] == "0.62 (0.25 to 1.00)"


def test_runs_with_other_losses_end_the_comparison() -> None:
    found = {
        layout_of("ddp", 1, batch=4): [finished([1.0])],
        layout_of("zero2", 2, batch=4): [finished([1.0], losses=(3.0, 2.1))],
    }
    scaling.check_same(found, 0.1)
    with pytest.raises(SystemExit, match="zero2 x 2 does not train as the first does"):
        scaling.check_same(found, 1e-4)


@pytest.mark.parametrize(
    ("words", "message"), [("--batch 2", "--batch 2: not divisible by 4 processes"), ("--steps 2", "--steps 2")]
)
def test_what_cannot_be_is_refused(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling", *words.split()])
    with pytest.raises(UserError, match=message):
        scaling.main()


@pytest.mark.slow
def test_real_runs_are_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "scaling --size tiny --block 16 --batch 2 --processes 1 2 --kinds zero2 --steps 3 --rounds 1 --threads 2"
    monkeypatch.setattr(sys, "argv", argv.split())
    scaling.main()
    rows = capsys.readouterr().out.split("\n\n")[1].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["plain x 1", "zero2 x 1", "zero2 x 2"]


@pytest.mark.slow
@pytest.mark.parametrize("statement", startup.IMPORTS.values(), ids=startup.IMPORTS)
def test_what_is_imported_is_there_and_no_deepspeed(statement: str) -> None:
    startup.execute(statement)


@pytest.mark.slow
def test_the_first_step_is_timed(tmp_path: Path) -> None:
    training_runs.write_tokens(tmp_path / "train.bin", 33)
    flags = training_runs.training_flags(tmp_path / "train.bin", "tiny", 16, 2, "no")
    seconds = startup.first_step_seconds([*flags, "--train_micro_batch_size_per_gpu=1"], tmp_path)
    assert seconds > 0
    assert (tmp_path / "run" / "baseline" / "metrics.json").exists()
