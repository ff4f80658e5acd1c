"""Settings of the launcher that contradict the run are refused; each variable is what `accelerate launch` sets."""

import dataclasses

import pytest

from tests.conftest import ROOT
from train.config.run_config import parse
from train.engines.accelerate_setup import deepspeed_accelerator, plain_accelerator
from train.run.setup import resolve
from train.utils.errors import UserError


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", ["mixed_precision is bf16", "the run's is no"]),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", ["gradient_accumulation_steps is 4", "the run's is 1"]),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", ["gradient_clipping is 0.5", "the run's is 1.0"]),
        ("ACCELERATE_USE_DEEPSPEED", "true", ["the launcher asks for DeepSpeed"]),
    ],
)
def test_a_baseline_is_not_overruled(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: list[str]
) -> None:
    run = resolve(parse(flags))
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as error:
        plain_accelerator(run.config)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", ["zero_stage is 3", "the run's is 2"]),
        ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", ["offload_optimizer_device is cpu", "is none"]),
        ("ACCELERATE_GRADIENT_CLIPPING", "2", ["gradient_clipping is 2", "the run's is 1.0"]),
        ("ACCELERATE_USE_FSDP", "true", ["the launcher asks for FSDP"]),
    ],
)
def test_an_optimized_run_is_not_overruled(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: list[str]
) -> None:
    config = dataclasses.replace(
        parse(flags), run_type="optimized", deepspeed_config=f"{ROOT}/ds_configs/zero2.json", mixed_precision="no"
    )
    run = resolve(config)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as error:
        deepspeed_accelerator(run.config, run.deepspeed)
    assert all(word in str(error.value) for word in words), str(error.value)
