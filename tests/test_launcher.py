"""Accelerate's fields for DeepSpeed are honored or refused; the variables are those that `accelerate launch` sets."""

import dataclasses
import json

import pytest

from train.config import deepspeed_config as deepspeed_json
from train.config import launcher_env as launcher
from train.config.run_config import RunConfig
from train.utils.errors import UserError

OPTIMIZED = RunConfig(run_type="optimized")
STAGE = "DEEPSPEED_ZERO_STAGE"
OPTIMIZER, PARAM = "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "DEEPSPEED_OFFLOAD_PARAM_DEVICE"


def asked(monkeypatch: pytest.MonkeyPatch, **fields: str) -> None:
    for key, value in fields.items():
        monkeypatch.setenv(f"ACCELERATE_{key}", value)


def test_fields_arrive_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {STAGE: "3", OPTIMIZER: "cpu", PARAM: "cpu", "GRADIENT_ACCUMULATION_STEPS": "4",
              "GRADIENT_CLIPPING": "0.5", "MIXED_PRECISION": "bf16"}  # fmt: skip
    asked(monkeypatch, **fields)
    config, settings = deepspeed_json.resolve(OPTIMIZED, world_size=2, bf16_is_fast=False)
    assert (config.gradient_accumulation_steps, config.max_grad_norm, config.mixed_precision) == (4, 0.5, "bf16")
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (3, "cpu", "cpu")
    assert settings["train_batch_size"] == 4 * 4 * 2
    assert zero["reduce_bucket_size"] == 100_000_000, "as in the shipped JSON"
    assert "auto" not in json.dumps(settings)
    launcher.check(config, zero)


def test_what_the_fields_leave_open_the_flags_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, **{STAGE: "2", OPTIMIZER: "none", PARAM: "none", "MIXED_PRECISION": "no"})
    flags = dataclasses.replace(OPTIMIZED, gradient_accumulation_steps=3, max_grad_norm=2.0)
    config, settings = deepspeed_json.resolve(flags, 2, bf16_is_fast=True)
    assert (config.gradient_accumulation_steps, config.max_grad_norm) == (3, 2.0)
    assert settings["zero_optimization"]["stage"] == 2
    assert "offload_optimizer" not in settings["zero_optimization"]
    assert config.mixed_precision == "bf16", "nobody has written the launcher's no"
    asked(monkeypatch, CONFIG_DS_FIELDS="zero_stage,mixed_precision")
    assert deepspeed_json.resolve(flags, 2, bf16_is_fast=True)[0].mixed_precision == "no"


@pytest.mark.parametrize(
    ("fields", "flags", "words"),
    [
        ({STAGE: "4"}, {}, ["zero_stage is 4", "write 1, 2 or 3"]),
        ({STAGE: "3", OPTIMIZER: "nvme"}, {}, ["offload_optimizer_device is nvme", "--deepspeed_config"]),
        ({STAGE: "2", PARAM: "cpu"}, {}, ["offload_param_device is cpu", "zero_stage 3"]),
        ({STAGE: "2", "MIXED_PRECISION": "fp16"}, {}, ["mixed_precision is fp16", "bf16"]),
        ({STAGE: "2", "GRADIENT_ACCUMULATION_STEPS": "4"}, {"gradient_accumulation_steps": 2}, ["is 4 and", "is 2"]),
        ({STAGE: "2", "MIXED_PRECISION": "bf16"}, {"mixed_precision": "no"}, ["bf16.enabled", "is no"]),
        ({STAGE: "2"}, {"pipeline_stages": 2}, ["ZeRO stage 2 with 2 pipeline stages"]),
        ({}, {}, ["name its JSON", "ds_configs/zero2.json"]),
    ],
)
def test_what_cannot_be_honored_is_refused(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], flags: dict[str, object], words: list[str]
) -> None:
    asked(monkeypatch, **fields)
    with pytest.raises(UserError) as error:
        deepspeed_json.resolve(dataclasses.replace(OPTIMIZED, **flags), 2, bf16_is_fast=False)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DYNAMO_BACKEND", "INDUCTOR", ["dynamo_backend is INDUCTOR", "--torch_compile"]),
        ("USE_MEGATRON_LM", "true", ["megatron_lm", "--pipeline_stages"]),
        ("USE_PARALLELISM_CONFIG", "true", ["parallelism_config"]),
        (OPTIMIZER, "none", ["offload_optimizer_device is none", "the run's is cpu"]),
        ("GRADIENT_CLIPPING", "0", ["gradient_clipping is 0", "the run's is 0.5"]),
    ],
)
def test_what_would_overrule_the_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: list[str]
) -> None:
    asked(monkeypatch, **{variable: value})
    resolved = dataclasses.replace(OPTIMIZED, mixed_precision="no", gradient_accumulation_steps=1, max_grad_norm=0.5)
    with pytest.raises(UserError) as error:
        launcher.check(resolved, {"stage": 2, "offload_optimizer": {"device": "cpu"}})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_same_number_written_otherwise_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch, GRADIENT_CLIPPING="1", DYNAMO_BACKEND="NO", MIXED_PRECISION="no")
    resolved = dataclasses.replace(OPTIMIZED, mixed_precision="bf16", gradient_accumulation_steps=1, max_grad_norm=1.0)
    launcher.check(resolved, {"stage": 2})
