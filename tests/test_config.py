import dataclasses
from pathlib import Path

import pytest

from tests.conftest import ROOT, python
from train.config.run_config import RunConfig, parse
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
        ("learning_rate: 6e-4", ["learning_rate", "'6e-4'", "6.0e-4"]),
        ("lerning_rate: 1.0", ["lerning_rate", "--help"]),
        ("max_steps: 1.5", ["max_steps", "1.5", "int"]),
        ("max_steps: '10'", ["max_steps", "'10'", "write 10"]),
        ("torch_compile: 'yes'", ["torch_compile", "'yes'", "bool"]),
        ("activation_checkpointing: true", ["activation_checkpointing", "True", "none, full, selective"]),
        ("run_type: fast", ["run_type", "'fast'", "baseline, optimized"]),
        ("prompt: 12", ["prompt", "12", '"12"']),
        ("- a\n- b", ["list", "flag: value"]),
        ("a: [", ["YAML"]),
    ],
)
def test_yaml_mistakes_name_key_value_and_remedy(tmp_path: Path, text: str, names: list[str]) -> None:
    with pytest.raises(UserError) as error:
        from_yaml(tmp_path, text)
    assert all(name in str(error.value) for name in names), str(error.value)
    assert "\n" not in str(error.value)


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
    assert set(unread) <= {"run_type", "checkpoint_path", "pipeline_stages"}, "flags that nothing reads"
