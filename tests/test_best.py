"""The checkpoint of the lowest validation loss, and the end of a run whose validations no longer get better."""

import json
import math
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import python, ranks, records, train
from tests.forks import SERVER, _run
from train.config.run_config import parse
from train.metrics.summary import Best, best_validation
from train.utils.errors import UserError

# The rate is far too high: the validation loss of step 3 is the lowest.
WORSENING = ["--learning_rate=0.1", "--lr_schedule=constant", "--eval_interval=1", "--save_total_limit=1"]


def validated(step: int, loss: float | None, tokens: int = 100) -> dict[str, Any]:
    return {"step": step, "val_loss": loss, "val_tokens": tokens}


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([], Best(0, math.inf, 0)),
        ([{"step": 1}], Best(0, math.inf, 0)),
        ([validated(1, 3.0), {"step": 2}, validated(3, 2.0), validated(4, 2.0), validated(5, 2.5)], Best(3, 2.0, 2)),
        ([validated(1, 3.0), validated(2, None), validated(3, math.nan)], Best(1, 3.0, 2)),
        ([validated(1, None)], Best(0, math.inf, 1)),
        ([validated(1, 1.0, tokens=10), validated(2, 3.0), validated(3, 4.0)], Best(2, 3.0, 1)),
    ],
)
def test_the_best_validation(found: list[dict[str, Any]], best: Best) -> None:
    assert best_validation(found) == best


@pytest.mark.parametrize("flag", ["--keep_best", "--early_stopping_patience=2"])
def test_one_validation_has_no_best(flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag.partition('=')[0]} .*--eval_interval"):
        parse([flag])
    parse([flag, "--eval_interval=5"])


def check_best(run: Path, last: int) -> int:
    """`best` names the step of the lowest loss, and only it and the last step are kept; returns that step."""
    found = records(run)
    step = min(found, key=lambda record: record["val_loss"])["step"]
    assert (run / "best").read_text() == f"step-{step}\n"
    assert {path.name for path in run.glob("step-*")} == {f"step-{step}", f"step-{last}"}
    assert (run / "latest").read_text() == f"step-{last}\n"
    summary = json.loads((run / "metrics.json").read_text())
    assert summary["steps"] == last == found[-1]["step"]
    assert summary["best_validation"] == {"step": step, "val_loss": min(record["val_loss"] for record in found)}
    return step


def test_the_best_checkpoint_is_kept_and_the_same_after_resuming(flags: list[str], tmp_path: Path) -> None:
    words = [*flags, *WORSENING, "--keep_best", "--save_interval=4"]
    train(*words, f"--checkpoint_path={tmp_path}/whole", cwd=tmp_path)
    whole = tmp_path / "whole" / "baseline"
    best = check_best(whole, 8)
    assert 1 <= best < 8
    assert best % 4, "its checkpoint was saved for its validation"
    python("-m", "train.checkpoints", "--verify", whole, cwd=tmp_path)

    # As if killed after the best validation, before `best` was written; and back from a later best, which is deleted.
    for start, newer in (("before", best), ("after", 8)):
        run = tmp_path / start / "baseline"
        shutil.copytree(whole, run)
        (run / "metrics.json").unlink()
        if newer == best:
            shutil.rmtree(run / "step-8")
            (run / "latest").write_text(f"step-{best}\n")
            (run / "best").unlink()
        else:
            (run / "best").write_text("step-99\n")
        train(*words, f"--checkpoint_path={tmp_path}/{start}", "--resume_from_checkpoint", cwd=tmp_path)
        assert check_best(run, 8) == best
        weights = f"step-{best}/model.safetensors"
        assert (run / weights).read_bytes() == (whole / weights).read_bytes()


def _train_before_it_writes(*run: Any) -> None:
    """Train, and let the checkpoint of each step be written only after the record of the next step."""
    log = run[3] / "baseline" / "metrics.jsonl"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        found = re.search(r"step-(\d+).*training_state\.json", str(arguments[0])) if event == "open" else None
        if found and arguments[2] & os.O_WRONLY and threading.current_thread().name == "checkpoint writer":
            deadline = time.monotonic() + 60
            while f'"step": {int(found[1]) + 1},' not in log.read_text():
                assert time.monotonic() < deadline, "training waits for the write"
                time.sleep(0.01)

    sys.addaudithook(hook)
    _run(*run)


@pytest.mark.faults
def test_training_does_not_wait_until_the_best_checkpoint_is_written(flags: list[str], tmp_path: Path) -> None:
    words = [*flags, "--eval_interval=1", "--keep_best", f"--checkpoint_path={tmp_path}"]
    output = tmp_path / "log"
    process = SERVER.Process(
        target=_train_before_it_writes, args=("train", words, dict(os.environ), tmp_path, output, output)
    )
    process.start()
    process.join(200)
    assert process.exitcode == 0, output.read_text()
    run = tmp_path / "baseline"
    validated = [record["val_loss"] for record in records(run)]
    assert validated == sorted(validated, reverse=True), "each is the best so far: its checkpoint is written"
    assert (run / "best").read_text() == "step-8\n"
    assert {path.name for path in run.glob("step-*")} == {"step-7", "step-8"}


@pytest.mark.faults
def test_a_run_ends_when_validations_no_longer_get_better(flags: list[str], tmp_path: Path) -> None:
    words = [*flags, *WORSENING, "--keep_best", f"--checkpoint_path={tmp_path}"]
    done = train(*words, "--early_stopping_patience=2", cwd=tmp_path)
    run = tmp_path / "baseline"
    last = records(run)[-1]["step"]
    best = check_best(run, last)
    assert last == best + 2 < 8
    assert f"the run ends after step {last} of 8" in done.stdout
    again = train(*words, "--early_stopping_patience=2", "--resume_from_checkpoint", cwd=tmp_path)
    assert f"the run ends after step {last} of 8" in again.stdout, "a requeued job has nothing left to do"
    assert check_best(run, last) == best
    train(*words, "--early_stopping_patience=3", "--resume_from_checkpoint", cwd=tmp_path)
    assert check_best(run, last + 1) == best


@pytest.mark.slow
def test_two_processes_keep_the_best_and_end_together(flags: list[str], tmp_path: Path) -> None:
    words = [*flags, *WORSENING, "--keep_best", "--early_stopping_patience=2", f"--checkpoint_path={tmp_path}"]
    ranks(*words, "--train_micro_batch_size_per_gpu=2", cwd=tmp_path)
    run = tmp_path / "baseline"
    last = records(run)[-1]["step"]
    assert check_best(run, last) == last - 2
