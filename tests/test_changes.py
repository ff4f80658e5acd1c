"""What differs when a run is resumed: reported, refused where it would change the losses, allowed with a flag."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import half_finished, losses, train
from train.config.changes import CURVE, GUARD, MASKS, RATE, ROUNDING, SETTING, VALIDATION, changes, refusal
from train.config.run_config import RunConfig

# Flags whose change concerns no number of the training: files, times, what is measured and shown, how a run starts.
NOT_COMPARED = {
    "run_type", "val_data_path", "early_stopping_patience", "keep_best", "async_save", "epochs",
    "eval_interval", "prompt", "max_new_tokens",
    "checkpoint_path", "save_interval", "save_minutes", "max_time", "save_total_limit", "resume_from_checkpoint",
    "delete_newer_checkpoints", "allow_changes", "overwrite", "attn_implementation", "deepspeed_config", "timeout",
    "profile", "profile_steps", "memory_snapshot", "report_to", "push_to_hub",
}  # fmt: skip
# Flags of what must never change: `starting.SAME_IN_A_RUN`.
REFUSED = {"model", "block_size", "train_data_path", "document_mask", "optimizer", "seed"}


def facts(**own: Any) -> dict[str, Any]:
    return {
        "learning_rate": 1e-3, "lr_schedule": "cosine", "max_steps": 100, "warmup_steps": None,
        "min_learning_rate_ratio": 0.1, "weight_decay": 0.1, "dropout": 0.0, "processes": 1, "on_nonfinite": "stop",
        **own,
    }  # fmt: skip


def test_every_flag_is_compared_or_not_on_purpose() -> None:
    compared = [*RATE, *CURVE, *GUARD, *VALIDATION, *MASKS, *ROUNDING]
    assert len(compared) == len(set(compared))
    assert {field.name for field in fields(RunConfig)} == NOT_COMPARED | REFUSED | set(compared) - {
        *SETTING,
        "val_data",
    }


def test_nothing_differs() -> None:
    assert changes(facts(), facts(), 50) == []
    assert changes(facts(), facts(warmup_steps=5), 2) == [], "the default, given"


@pytest.mark.parametrize(
    ("step", "before", "after", "breaks"),
    [
        (50, {}, {"learning_rate": 2e-3}, True),
        (50, {}, {"lr_schedule": "linear"}, True),
        (50, {}, {"max_steps": 200}, True),
        (50, {}, {"max_steps": 60}, True),
        (100, {}, {"max_steps": 101}, True),
        (50, {}, {"min_learning_rate_ratio": 0.0}, True),
        (50, {"lr_schedule": "constant"}, {"lr_schedule": "constant", "max_steps": 10**5}, True),
        (
            2000,
            {"lr_schedule": "constant", "max_steps": 40_000},
            {"lr_schedule": "constant", "max_steps": 10**15},
            False,
        ),
        (100, {"lr_schedule": "constant"}, {"lr_schedule": "constant", "max_steps": 101}, False),
        (50, {"lr_schedule": "constant"}, {"lr_schedule": "constant", "min_learning_rate_ratio": 0.5}, False),
        (2, {"lr_schedule": "constant"}, {"lr_schedule": "constant", "max_steps": 200}, True),  # 10 steps of warm-up
        (4, {"lr_schedule": "constant"}, {"lr_schedule": "constant", "warmup_steps": 4}, False),
        (50, {"lr_schedule": "wsd"}, {"lr_schedule": "wsd", "max_steps": 200}, True),
        (50, {}, {"weight_decay": 0.0}, True),
        (50, {}, {"dropout": 0.1}, True),
        (50, {}, {"processes": 2}, False),
        (50, {}, {"on_nonfinite": "skip"}, False),
    ],
)
def test_what_makes_the_losses_others(step: int, before: dict, after: dict, breaks: bool) -> None:
    was, now = facts(**before), facts(**after)
    found = changes(was, now, step)
    assert found
    reason = refusal(found, was, now, step)
    assert (reason is not None) == breaks
    assert any(each.breaks_curve for each in found) == breaks
    if reason is not None:
        assert "--allow_changes" in reason
        for each in found:
            assert not each.breaks_curve or step == 100 or f"--{each.name} {each.before}" in reason


VALIDATED = {"val_data": "1,000 tokens, digest aa", "val_data_path": "val.bin", "eval_steps": None}


@pytest.mark.parametrize("choice", [{}, {"keep_best": True}, {"early_stopping_patience": 3}])
@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"val_data": "1,000 tokens, digest bb"}, "--val_data_path val.bin with its content"),
        ({"eval_steps": 5}, "no --eval_steps"),
    ],
)
def test_other_validations_need_a_flag_where_the_run_chooses_by_them(
    changed: dict[str, Any], remedy: str, choice: dict[str, Any]
) -> None:
    was, now = facts(**VALIDATED, **choice), facts(**VALIDATED | changed, **choice)
    found = changes(was, now, 50)
    assert [each.name for each in found] == list(changed)
    reason = refusal(found, was, now, 50)
    assert (reason is None) == (not choice)
    if reason is not None:
        assert f"give {remedy} as before, or --allow_changes" in reason
        assert "the validations could not be compared" in reason


def test_another_validation_file_is_noticed_by_its_content(
    flags: list[str], corpus: Path, finished: Path, tmp_path: Path
) -> None:
    run = half_finished(finished, tmp_path)
    val = tmp_path / "val.bin"
    words = [*flags, "--train_micro_batch_size_per_gpu=4", f"--checkpoint_path={tmp_path}", "--resume_from_checkpoint"]
    words += ["--eval_interval=4", f"--val_data_path={val}"]
    content = (corpus / "val.bin").read_bytes()
    val.write_bytes(content[2:] + content[:2])
    refused = train(*words, "--keep_best", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert f"--val_data_path {corpus / 'val.bin'} with its content as before, or --allow_changes" in refused.stderr
    said = train(*words, cwd=tmp_path).stderr
    assert "| val_data " in said
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "step-8")
    val.write_bytes(content)
    assert "differs" not in train(*words, "--keep_best", cwd=tmp_path).stderr, "elsewhere, and the same"


def test_a_run_resumes_with_other_losses_only_if_that_is_allowed(
    flags: list[str], finished: Path, tmp_path: Path
) -> None:
    run = half_finished(finished, tmp_path)
    words = [*flags, "--train_micro_batch_size_per_gpu=4", f"--checkpoint_path={tmp_path}", "--resume_from_checkpoint"]
    before = sorted(path.name for path in run.iterdir())
    refused = train(
        *words, "--learning_rate=0.02", "--adam_beta2=0.99", "--eval_interval=1", cwd=tmp_path, check=False
    )
    assert refused.returncode == 2
    for row in (["learning_rate", "0.01", "0.02"], ["adam_beta2", "0.95", "0.99"]):
        assert any(all(cell in line for cell in row) for line in refused.stderr.splitlines()), refused.stderr
    assert "eval_interval" not in refused.stderr
    assert "--learning_rate 0.01 --adam_beta2 0.95" in refused.stderr
    assert sorted(path.name for path in run.iterdir()) == before
    allowed = train(*words, "--learning_rate=0.02", "--allow_changes", cwd=tmp_path)
    assert "| learning_rate |" in allowed.stderr
    assert losses(run)[:5] == losses(finished)[:5], "the loss of step 5 is that of the weights after step 4"
    assert losses(run)[5] != losses(finished)[5]


def test_another_layout_is_reported_and_resumes(flags: list[str], finished: Path, tmp_path: Path) -> None:
    there = [f"--resume_from_checkpoint={finished}/step-4", f"--checkpoint_path={tmp_path}"]
    words = ["--train_micro_batch_size_per_gpu=2", "--gradient_accumulation_steps=2", "--attn_implementation=sdpa"]
    done = train(*flags, *there, *words, cwd=tmp_path)
    rows = [line.split() for line in done.stderr.splitlines() if line.startswith("| ")]
    assert ["|", "attention", "|", "eager", "|", "sdpa", "|", "rounding", "|"] in rows
    assert ["|", "gradient_accumulation_steps", "|", "1", "|", "2", "|", "rounding", "|"] in rows
    assert len(rows) == 4 + 1
    assert losses(tmp_path / "baseline") == pytest.approx(losses(finished), abs=1e-5)
    again = train(
        *flags, *there[1:], *words, "--resume_from_checkpoint", "--lr_schedule=linear", cwd=tmp_path, check=False
    )
    assert again.returncode == 2, "the run is finished"
