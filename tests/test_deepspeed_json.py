import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from train.config import deepspeed_config as deepspeed_json
from train.config.run_config import RunConfig
from train.utils.errors import UserError


def resolve(folder: Path, settings: dict, world_size: int = 2, bf16_is_fast: bool = False, **flags: object) -> tuple:
    file = folder / "ds.json"
    file.write_text(json.dumps(settings))
    config = dataclasses.replace(RunConfig(run_type="optimized", deepspeed_config=str(file)), **flags)
    return deepspeed_json.resolve(config, world_size, bf16_is_fast)


def test_auto_is_filled_from_the_flags(tmp_path: Path) -> None:
    settings = dict.fromkeys(
        ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"],
        "auto",
    )
    settings |= {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}
    config, filled = resolve(
        tmp_path,
        settings,
        train_micro_batch_size_per_gpu=3,
        gradient_accumulation_steps=5,
        max_grad_norm=0.5,
        mixed_precision="bf16",
    )
    assert filled["train_batch_size"] == 3 * 5 * 2
    assert filled["train_micro_batch_size_per_gpu"] == 3
    assert filled["gradient_clipping"] == 0.5
    assert filled["bf16"] == {"enabled": True}
    assert "auto" not in json.dumps(filled)
    assert config.mixed_precision == "bf16"


def test_numbers_in_the_json_hold_where_no_flag_is_given(tmp_path: Path) -> None:
    settings = {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2, "gradient_clipping": 0.25}
    config, filled = resolve(tmp_path, {**settings, "zero_optimization": {"stage": 1}})
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (6, 2)
    assert (config.max_grad_norm, filled["train_batch_size"]) == (0.25, 24)


def test_defaults_hold_where_neither_says(tmp_path: Path) -> None:
    config, filled = resolve(tmp_path, {})
    assert (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (4, 1)
    assert (config.max_grad_norm, filled["gradient_clipping"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("asked", "fast", "expected"), [(None, True, True), (None, False, False), ("no", True, False)]
)
def test_bf16_follows_flag_then_hardware(tmp_path: Path, asked: str | None, fast: bool, expected: bool) -> None:
    settings = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": "auto"}}
    config, filled = resolve(tmp_path, settings, bf16_is_fast=fast, mixed_precision=asked)
    assert filled["bf16"]["enabled"] is expected
    assert config.mixed_precision == ("bf16" if expected else "no")


@pytest.mark.parametrize(
    ("settings", "flags", "names"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, {"train_micro_batch_size_per_gpu": 4}, ["8", "4", "per_gpu", "auto"]),
        ({"gradient_accumulation_steps": 8}, {"gradient_accumulation_steps": 2}, ["8", "2", "accumulation"]),
        ({"gradient_clipping": 2.0}, {"max_grad_norm": 1.0}, ["gradient_clipping", "max_grad_norm"]),
        ({"train_batch_size": 7}, {}, ["train_batch_size", "7", "= 8"]),
        ({"train_micro_batch_size_per_gpu": "eight"}, {}, ["train_micro_batch_size_per_gpu", "'eight'"]),
        ({"gradient_clipping": "much"}, {}, ["gradient_clipping", "'much'"]),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, {"mixed_precision": "no"}, ["bf16.enabled"]),
        ({"bf16": {"enabled": "yes"}}, {}, ["bf16.enabled", "'yes'"]),
        ({"bf16": True}, {}, ["bf16"]),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}, {}, ["stage 0", "stage 1"]),
        ({"fp16": {"enabled": True}}, {}, ["fp16", "bf16"]),
        ({"zero_optimisation": {"stage": 2}}, {}, ["zero_optimisation", "spelling"]),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, {}, ["zero_optimization.overlap_com"]),
        ({"zero_optimization": {"stage": 4}}, {}, ["stage"]),
        ({"bf16": {"enabld": True}}, {}, ["enabld"]),
        ({"flops_profiler": {"enabledd": True}}, {}, ["flops_profiler.enabledd"]),
        ({"flops_profiler": True}, {}, ["flops_profiler"]),
        ({"tensorboard": {"enabledd": 1}}, {}, ["enabledd"]),
        ({"gradient_clipping": float("inf")}, {}, ["gradient_clipping"]),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, {}, ["data_types", "remove"]),
        ({"optimizer": {"type": "AdamW"}}, {}, ["optimizer", "--learning_rate"]),
        ({"scheduler": {}}, {}, ["scheduler", "--lr_schedule"]),
        ({"pipeline": 2}, {}, ["pipeline", "stages"]),
        ({"pipeline": {"stages": 2, "seed_layers": True}}, {}, ["pipeline.seed_layers", "not supported"]),
        ({"pipeline": {"stages": 0}}, {}, ["pipeline.stages", "0"]),
        ({"pipeline": {"stages": 2, "activation_checkpoint_interval": -1}}, {}, ["checkpoint_interval", "-1"]),
        ({"pipeline": {"stages": 2, "activation_checkpoint_interval": True}}, {}, ["checkpoint_interval", "True"]),
        (
            {"pipeline": {"stages": 2, "activation_checkpoint_interval": 2}},
            {"activation_checkpointing": "none"},
            ["activation_checkpoint_interval", "is 2", "--activation_checkpointing is none"],
        ),
        (
            {"pipeline": {"stages": 2, "activation_checkpoint_interval": 2}},
            {"activation_checkpointing": "full", "activation_checkpointing_interval": 3},
            ["activation_checkpoint_interval", "is 2", "--activation_checkpointing_interval is 3"],
        ),
        ({"pipeline": {"stages": 2, "partition": 5}}, {}, ["pipeline.partition", "5"]),
        ({"pipeline": {"stages": 2}}, {"pipeline_stages": 1}, ["pipeline.stages", "2", "--pipeline_stages is 1"]),
        ({"pipeline": {"partition": "cost"}}, {}, ["number of stages", "--pipeline_stages"]),
        ({"pipeline": {"stages": 1, "partition": [5]}}, {}, ["pipeline.partition", "[5]", "one stage"]),
        ({}, {"pipeline_stages": 3}, ["3 pipeline stages", "3, 6, 9", "there are 2"]),
        ({}, {"pipeline_stages": 4}, ["4 pipeline stages", "4, 8, 12", "there are 2"]),
        ({"zero_optimization": {"stage": 0}}, {"pipeline_stages": 2}, ["ZeRO stage 0", "first stage", '"stage": 1']),
        ({"zero_optimization": {"stage": 2}}, {"pipeline_stages": 2}, ["ZeRO stage 2", "micro-batches"]),
        ({"zero_optimization": {"stage": 3}}, {"pipeline_stages": 2}, ["ZeRO stage 3", "full layers"]),
        ({"wall_clock_breakdown": True}, {"pipeline_stages": 2}, ["wall_clock_breakdown", "remove it"]),
        ({"flops_profiler": {"enabled": True}}, {"pipeline_stages": 2}, ["flops_profiler", "remove it"]),
        ({"train_batch_size": 8, "pipeline": {"stages": 2}}, {}, ["8", "1 data-parallel", "= 4"]),
    ],
)
def test_contradictions_and_unknown_keys_are_named(tmp_path: Path, settings: dict, flags: dict, names: list) -> None:
    with pytest.raises(UserError) as error:
        resolve(tmp_path, settings, **flags)
    assert all(name in str(error.value) for name in names), str(error.value)


@pytest.mark.parametrize(
    ("settings", "asked"),
    [({}, 2), ({"pipeline": {"stages": 2}}, None), ({"pipeline": {"stages": 2}}, 2), ({"pipeline": {}}, 2)],
)
@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": "auto"}}])
def test_stages_come_from_flag_or_json_and_zero_1_with_them(
    tmp_path: Path, settings: dict, asked: int | None, zero: dict
) -> None:
    config, filled = resolve(tmp_path, settings | zero, world_size=6, pipeline_stages=asked)
    assert config.pipeline_stages == 2
    assert filled["pipeline"] == {"stages": 2, "partition": "cost", "activation_checkpoint_interval": 0}
    assert filled["zero_optimization"]["stage"] == 1
    assert filled["train_batch_size"] == 4 * 1 * 3  # data-parallel processes, not all six


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    ("written", "asked", "expected"),
    [
        (None, (None, None), ("none", 0)),
        (None, ("full", 3), ("full", 3)),
        (None, ("selective", None), ("selective", 1)),
        (3, (None, None), ("full", 3)),
        (3, ("selective", 3), ("selective", 3)),
        ("auto", ("full", 3), ("full", 3)),
        (0, (None, None), ("none", 0)),
        (0, ("none", None), ("none", 0)),
    ],
)
def test_activation_checkpointing_comes_from_flags_or_json(
    tmp_path: Path, stages: int, written: Any, asked: tuple[Any, Any], expected: tuple[str, int]
) -> None:
    block = {"stages": stages} | ({} if written is None else {"activation_checkpoint_interval": written})
    flags = dict(zip(("activation_checkpointing", "activation_checkpointing_interval"), asked, strict=True))
    config, filled = resolve(tmp_path, {"pipeline": block}, **flags)
    mode, interval = expected
    assert (config.activation_checkpointing, config.activation_checkpointing_interval) == (mode, max(1, interval))
    if stages > 1:
        assert filled["pipeline"]["activation_checkpoint_interval"] == interval


def test_one_stage_is_no_pipeline(tmp_path: Path) -> None:
    config, filled = resolve(tmp_path, {"pipeline": {"stages": 1}})
    assert config.pipeline_stages == 1
    assert "pipeline" not in filled
    assert resolve(tmp_path, {})[0].pipeline_stages == 1


def test_offload_keeps_our_optimizer(tmp_path: Path) -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert resolve(tmp_path, {"zero_optimization": zero})[1]["zero_force_ds_cpu_optimizer"] is False


def test_broken_files_are_named_with_the_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{\n  "bf16": }')
    with pytest.raises(UserError, match=r"broken\.json: line 2"):
        deepspeed_json.read(broken)
    with pytest.raises(UserError, match="no such file"):
        deepspeed_json.read(tmp_path / "missing.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        deepspeed_json.read(tmp_path / "list.json")


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda file: file.name)
def test_shipped_files_resolve(file: Path) -> None:
    stages = 2 if file.stem == "pipeline" else None
    config = RunConfig(run_type="optimized", deepspeed_config=str(file), pipeline_stages=stages)
    _, filled = deepspeed_json.resolve(config, 2, True)
    assert "auto" not in json.dumps(filled)


def test_every_key_that_is_let_through_is_one_deepspeed_reads() -> None:
    import deepspeed

    source = "".join(path.read_text() for path in (Path(deepspeed.__file__).parent).rglob("*.py"))
    assert [key for key in deepspeed_json.ENGINE_KEYS if f'"{key}"' not in source and f"'{key}'" not in source] == []
