import dataclasses
from pathlib import Path

import pytest

from tests.conftest import ROOT, python
from train.config.run_config import GROUPS, RunConfig, parse
from train.utils.errors import UserError


def from_yaml(folder: Path, text: str, *argv: str) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(text)
    return parse(["--config", str(file), *argv])


def test_defaults_are_the_baseline_of_gpt2() -> None:
    assert parse([]) == RunConfig()
    assert (RunConfig().run_type, RunConfig().model) == ("baseline", "gpt2")


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "learning_rate: 1.0e-3\nmax_steps: 7\ntorch_compile: true\n", "--max_steps", "9")
    assert (config.learning_rate, config.max_steps, config.torch_compile) == (1e-3, 9, True)


def test_every_flag_can_stand_in_yaml(tmp_path: Path) -> None:
    import yaml

    every = {**dataclasses.asdict(RunConfig()), "block_size": 64, "mixed_precision": "no", "warmup_steps": 3}
    assert dataclasses.asdict(from_yaml(tmp_path, yaml.safe_dump(every))) == every
    assert from_yaml(tmp_path, "mixed_precision: no\n").mixed_precision == "no"
    assert from_yaml(tmp_path, "") == RunConfig()


def test_yaml_takes_whole_numbers_for_floats(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "epochs: 2\n").epochs == 2.0


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("learning_rate: fast", ["learning_rate", "'fast'", "number"]),
        ("lerning_rate: 1.0", ["lerning_rate", "did you mean learning_rate?", "--help"]),
        ("optimisation:\n  learning_rate: 1.0", ["optimisation", "did you mean optimization?"]),
        ("data:\n  learning_rate: 1.0", ["learning_rate", "group data"]),
        ("max_steps: 1.5", ["max_steps", "'1.5'", "whole number"]),
        ("max_steps: 0", ["max_steps", "0 must be at least 1"]),
        ("max_steps: [1, 2]", ["max_steps", "list", "one value"]),
        ("max_steps: -5", ["max_steps", "-5", "at least 1"]),
        ("torch_compile: maybe", ["torch_compile", "'maybe'", "neither true nor false"]),
        ("activation_checkpointing: true", ["activation_checkpointing", "true", "none", "full", "selective"]),
        ("run_type: fast", ["run_type", "'fast'", "baseline", "optimized"]),
        ("lr_schedule: cosin", ["lr_schedule", "'cosin'", "cosine"]),
        ("- a\n- b", ["list", "flag: value"]),
        ("a: [", ["YAML"]),
    ],
)
def test_yaml_mistakes_name_key_value_and_remedy(tmp_path: Path, text: str, names: list[str]) -> None:
    with pytest.raises(UserError) as error:
        from_yaml(tmp_path, text)
    assert all(name in str(error.value) for name in [*names, "run.yaml"]), str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_may_be_grouped_by_topic(tmp_path: Path) -> None:
    text = "model:\n  model: tiny\n  block_size: 64\noptimization:\n  learning_rate: 6e-4\nrun_type: baseline\n"
    flat = "model: tiny\nblock_size: 64\nlearning_rate: 6e-4\nrun_type: baseline\n"
    assert (
        from_yaml(tmp_path, text)
        == from_yaml(tmp_path, flat)
        == RunConfig(model="tiny", block_size=64, learning_rate=6e-4)
    )


def test_yaml_values_are_read_as_the_flags_are(tmp_path: Path) -> None:
    text = "learning_rate: 6e-4\nmixed_precision: no\nprompt: 12\nmax_steps: '10'\ntorch_compile: yes\nseed:\n"
    with pytest.raises(UserError, match=r"run.yaml: --seed: '' is not a whole number"):
        from_yaml(tmp_path, text)
    config = from_yaml(tmp_path, text.replace("seed:", "eval_steps:"))
    assert (config.learning_rate, config.mixed_precision, config.prompt) == (6e-4, "no", "12")
    assert (config.max_steps, config.torch_compile, config.eval_steps) == (10, True, None)


def test_an_unknown_flag_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown flag --lerning_rate; did you mean --learning_rate\?"):
        parse(["--lerning_rate=1"])
    assert parse(["--learning-rate", "1e-3"]).learning_rate == 1e-3
    assert parse(["--prompt=--some-text"]).prompt == "--some-text"


def test_every_flag_is_in_one_group() -> None:
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert names == [field.name for field in dataclasses.fields(RunConfig)]


@pytest.mark.parametrize(
    "argv",
    [
        ["--max_steps", "0"],
        ["--epochs", "nan"],
        ["--learning_rate", "-1"],
        ["--dropout", "1"],
        ["--seed", "-1"],
        ["--seed", "4294967296"],
        ["--resume_from_checkpoint", ""],
        ["--train_micro_batch_size_per_gpu", "0"],
        ["--max_grad_norm", "-1"],
        ["--min_learning_rate_ratio", "2"],
        ["--report_to", "tensorbord"],
        ["--resume_from_checkpoint", "--overwrite"],
        ["--deepspeed_config", "ds_configs/zero2.json"],
        ["--run_type", "optimized", "--pipeline_stages", "0"],
        ["--run_type", "optimized", "--optimizer", "muon"],
        ["--pipeline_stages", "2"],
        ["--activation_checkpointing=full", "--activation_checkpointing_interval", "0"],
        ["--activation_checkpointing_interval", "2"],
        ["--config", "missing.yaml"],
    ],
)
def test_what_cannot_be_is_refused_by_name(argv: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(argv)
    named = [word.removeprefix("--") for word in argv if word.startswith("--") and word != "--run_type"]
    assert any(name in str(error.value) for name in named), str(error.value)


def test_resume_without_a_value_means_latest() -> None:
    assert parse(["--resume_from_checkpoint"]).resume_from_checkpoint == "latest"


def test_launchers_local_rank_is_taken_and_ignored() -> None:
    assert parse(["--local_rank=3"]) == RunConfig()


def test_help_teaches_and_lists_every_flag(tmp_path: Path) -> None:
    text = python("-m", "train", "--help", cwd=tmp_path).stdout
    assert all(f"--{field.name}" in text for field in dataclasses.fields(RunConfig))
    assert "accelerate launch" in text
    assert "(default: 0.95)" in text


@pytest.mark.parametrize(
    "argv", [["--nonsense", "1"], ["--max_steps", "many"], ["--dropout", "2"], ["--max_step", "3"]]
)
def test_a_mistake_is_exit_code_2_and_no_traceback(tmp_path: Path, argv: list[str]) -> None:
    done = python("-m", "train", *argv, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert argv[0] in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_flag_is_read_somewhere() -> None:
    source = "".join(path.read_text() for path in (ROOT / "train").rglob("*.py") if path.name != "run_config.py")
    unread = [f.name for f in dataclasses.fields(RunConfig) if f"config.{f.name}" not in source]
    assert set(unread) <= {"run_type", "checkpoint_path", "pipeline_stages", "report_to"}, "flags that nothing reads"
