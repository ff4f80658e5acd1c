"""The DeepSpeed JSON of an optimized run: read, checked against the flags, and every "auto" in it filled in."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.config import launcher_env as launcher
from train.config import packaged
from train.config.run_config import ENGINE_DEFAULTS, RunConfig
from train.utils.errors import UserError
from train.utils.files import read_text

# The blocks that DeepSpeed 0.19 reads at the top level and that this trainer leaves to it.
ENGINE_KEYS = frozenset({
    "aio", "bf16", "comms_logger", "communication_data_type", "csv_monitor",
    "disable_allgather", "disable_python_gc", "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps",
    "gradient_clipping", "gradient_predivide_factor", "log_level", "memory_breakdown", "pipeline",
    "prescale_gradients", "steps_per_print", "tensorboard", "timers",
    "train_batch_size", "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
})  # fmt: skip
PIPELINE_KEYS = ("stages", "partition", "activation_checkpoint_interval")
BLOCKS = {  # that are read here, and what to write for one that is not an object
    "bf16": '{"enabled": "auto"}',
    "fp16": '{"enabled": false}',
    "pipeline": '{"stages": "auto", "partition": "cost"}',
    "zero_optimization": '{"stage": 2}',
    "flops_profiler": '{"enabled": true}',
    "aio": "an object",
}
NOT_WITH_STAGES = {  # stage of ZeRO: why not in a pipeline
    0: "without ZeRO, DeepSpeed clips by the norm of the first stage's gradients alone",
    2: "a stage adds up the gradients of many micro-batches, and ZeRO-2 would shard them at each",
    3: "a stage holds its full layers, and ZeRO-3 would shard them again",
}
ELSEWHERE = {
    "optimizer": "the optimizer is set by --optimizer, --learning_rate, --weight_decay, --adam_beta1 and --adam_beta2",
    "scheduler": "the schedule is set by --learning_rate, --lr_schedule and --warmup_steps",
    "activation_checkpointing": "use --activation_checkpointing",
    "amp": "apex is not supported; use bf16",
    "torch_autocast": "the precision is set by bf16",
    "data_types": "weights, moments and sums are fp32",
    "checkpoint": "checkpoints are written by the trainer",
    "compile": "use --torch_compile",
}


def resolve(config: RunConfig, world_size: int, bf16_is_fast: bool) -> tuple[RunConfig, dict[str, Any]]:
    """An optimized run's flags with every number that the JSON sets, and the JSON without any "auto".

    A number is in the flag, in the JSON, in both if they agree, or in neither (then the flag's default holds). Where
    no JSON is named, the fields of Accelerate's file stand for one.

    Raises:
        UserError: for an unreadable file, an unknown key, or a number that contradicts a flag.
    """
    file, settings = _settings(config.deepspeed_config)

    def number(key: str, kind: str, flag: str) -> Any:
        given = getattr(config, flag)
        value = _agree(file, key, settings.get(key, "auto"), kind, given, f"{flag} is {given}")
        return ENGINE_DEFAULTS[flag] if value is None else value

    micro_batch = number("train_micro_batch_size_per_gpu", "count", "train_micro_batch_size_per_gpu")
    accumulation = number("gradient_accumulation_steps", "count", "gradient_accumulation_steps")
    clipping = float(number("gradient_clipping", "norm", "max_grad_norm"))
    bf16 = _bf16(config, settings, file, bf16_is_fast)
    stages, mode, interval = _pipeline(config, settings, file, world_size)
    product = micro_batch * accumulation * (world_size // stages)
    if settings.get("train_batch_size", "auto") not in ("auto", product):
        raise UserError(
            f'{file}: "train_batch_size" is {settings["train_batch_size"]}, but {micro_batch} per process x '
            f"{accumulation} accumulated x {world_size // stages} {'data-parallel ' if stages > 1 else ''}processes = "
            f'{product}; make them agree or write "auto"'
        )
    settings |= {
        "train_batch_size": product,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clipping,
        "bf16": {**settings.get("bf16", {}), "enabled": bf16},
        "fp16": {"enabled": False},
    }
    _check_zero(settings, file, bf16)
    _check_with_deepspeed(settings, file)
    config = replace(
        config,
        train_micro_batch_size_per_gpu=micro_batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=clipping,
        pipeline_stages=stages,
        activation_checkpointing=mode,
        activation_checkpointing_interval=interval or 1,
        mixed_precision="bf16" if bf16 else "no",
    )
    return config, settings


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
    "interval": (lambda value: type(value) is int and value >= 0, "a whole number of at least 0"),
    "norm": (lambda value: type(value) in (int, float) and 0 <= value < float("inf"), "a number of at least 0"),
    "switch": (lambda value: type(value) is bool, "true, false"),
}


def _agree(file: str, key: str, written: Any, kind: str, given: Any, flag: str) -> Any:
    """The one rule for every key that is a flag too: the JSON's value, or the flag's if that is "auto".

    Refuses a value that is not of its kind, and two values that differ. `flag` is the flag and its value for messages.
    None where neither has a value.
    """
    if written == "auto":
        return given
    is_valid, expected = KINDS[kind]
    if not is_valid(written):
        raise UserError(f'{file}: "{key}" is {written!r}; write {expected}, or "auto"')
    if given is not None and given != written:
        raise UserError(f'{file}: "{key}" is {json.dumps(written)} and --{flag}; make them agree or write "auto"')
    return written


def _settings(name: str | None) -> tuple[str, dict[str, Any]]:
    """The name of the settings' source, for messages, and the settings."""
    if name is not None:
        file = packaged.here_or_shipped(name, packaged.DEEPSPEED)
        return str(file), read(file)
    fields = launcher.deepspeed_fields()
    if fields is None:
        raise UserError(
            "--run_type optimized: trains through DeepSpeed; name its JSON, for example --deepspeed_config "
            "ds_configs/zero2.json"
        )
    return launcher.FIELDS, fields


def read(file: Path) -> dict[str, Any]:
    """The JSON's top level, whose keys are all supported."""
    if not file.exists():
        raise UserError(f"--deepspeed_config {file}: there is no such file")
    try:
        settings = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {error.lineno} is not JSON: {error.msg}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file}: holds a {type(settings).__name__}; a DeepSpeed configuration is an object")
    for key in settings:
        if key in ELSEWHERE:
            raise UserError(f'{file}: "{key}" is not supported; {ELSEWHERE[key]}, and remove the block')
        if key not in ENGINE_KEYS:
            raise UserError(f'{file}: nothing reads the key "{key}"; correct its spelling or remove it')
    for block, example in BLOCKS.items():
        if not isinstance(settings.get(block, {}), dict):
            raise UserError(f'{file}: "{block}" is {settings[block]!r}; write {example}')
    return settings


def _pipeline(config: RunConfig, settings: dict[str, Any], file: str, world_size: int) -> tuple[int, Any, int]:
    """The number of stages, the mode of activation checkpointing, and how many layers are recomputed together.

    With more than one stage, the block is filled in and ZeRO is at the stage that goes with it.
    """
    has_block = "pipeline" in settings
    block = settings.pop("pipeline", {})
    stages = _stages(config.pipeline_stages, block, file) if has_block else config.pipeline_stages or 1
    mode, interval = _activation_checkpointing(config, block, file)
    if stages == 1:
        return 1, mode, interval
    if world_size % stages != 0:
        raise UserError(
            f"{stages} pipeline stages need {stages}, {2 * stages}, {3 * stages}, ... processes, but there are "
            f"{world_size}; start that many, or ask for a number of stages that divides {world_size}"
        )
    method = block.get("partition", "auto")
    settings["pipeline"] = {
        "stages": stages,
        "partition": "cost" if method == "auto" else method,
        "activation_checkpoint_interval": interval,
    }
    for key, is_on in (
        ("wall_clock_breakdown", settings.get("wall_clock_breakdown")),
        ("flops_profiler", settings.get("flops_profiler", {}).get("enabled")),
    ):
        if is_on:
            raise UserError(f'{file}: "{key}" crashes DeepSpeed\'s pipeline of several stages; remove it')
    zero = settings.setdefault("zero_optimization", {})
    if zero.get("stage") in (None, "auto"):
        zero["stage"] = 1
    for stage, reason in NOT_WITH_STAGES.items():
        if zero["stage"] == stage:
            raise UserError(f'{file}: ZeRO stage {stage} with {stages} pipeline stages: {reason}; write "stage": 1')
    return stages, mode, interval


def _stages(given: int | None, block: dict[str, Any], file: str) -> int:
    """From --pipeline_stages or the JSON's "pipeline" block, whose keys are checked."""
    for key in block:
        if key not in PIPELINE_KEYS:
            raise UserError(
                f'{file}: "pipeline.{key}" is not supported; {", ".join(PIPELINE_KEYS)} are; remove the other keys'
            )
    flag = f"pipeline_stages is {given}"
    stages = _agree(file, "pipeline.stages", block.get("stages", "auto"), "count", given, flag)
    if stages is None:
        raise UserError(
            f'{file}: has a "pipeline" block without a number of stages; give --pipeline_stages, or write "stages"'
        )
    method = block.get("partition", "auto")
    if not isinstance(method, str | list):
        raise UserError(f'{file}: "pipeline.partition" is {method!r}; write "cost" or a list of layers for each stage')
    if stages == 1 and isinstance(method, list):
        raise UserError(f'{file}: "pipeline.partition" is {method}, but there is one stage; give --pipeline_stages')
    return stages


def _activation_checkpointing(config: RunConfig, block: dict[str, Any], file: str) -> tuple[Any, int]:
    """The mode and the interval, from the flags or the JSON's "pipeline" block; an interval of 0 there is "none"."""
    mode, given = config.activation_checkpointing, config.activation_checkpointing_interval
    key, flag = "pipeline.activation_checkpoint_interval", f"activation_checkpointing_interval is {given}"
    if mode == "none":
        given, flag = 0, "activation_checkpointing is none"
    interval = _agree(file, key, block.get("activation_checkpoint_interval", "auto"), "interval", given, flag)
    if interval is None:
        interval = 0 if mode is None else 1
    if interval == 0 and mode not in (None, "none"):
        raise UserError(f'{file}: "{key}" is 0 and --activation_checkpointing is {mode}; write "auto"')
    return mode or ("full" if interval else "none"), interval


def _bf16(config: RunConfig, settings: dict[str, Any], file: str, bf16_is_fast: bool) -> bool:
    if settings.get("fp16", {}).get("enabled", False) not in (False, "auto"):
        raise UserError(f'{file}: "fp16" is not supported, its loss scale would break exact resuming; use "bf16"')
    given = {"bf16": True, "no": False}.get(config.mixed_precision or "auto")
    written = settings.get("bf16", {}).get("enabled", "auto")
    flag = f"mixed_precision is {config.mixed_precision}"
    bf16 = _agree(file, "bf16.enabled", written, "switch", given, flag)
    return bf16_is_fast if bf16 is None else bf16


def _check_zero(settings: dict[str, Any], file: str, bf16: bool) -> None:
    zero = settings.setdefault("zero_optimization", {"stage": 0})
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f'{file}: "zero_optimization" needs a "stage" of 0, 1, 2 or 3')
    if zero.get("stage", 0) == 0 and bf16:
        raise UserError(f"{file}: ZeRO stage 0 with bf16 starts with a false AdamW step in DeepSpeed; use stage 1")
    if zero.get("compute_grad_norm", True) is False:
        raise UserError(
            f'{file}: "compute_grad_norm" false hides updates that are not finite; remove it, or write true'
        )
    # Else Accelerate puts DeepSpeed's own CPU optimizer in place of ours, whose learning rate no longer moves after
    # resuming.
    if zero.get("offload_optimizer") and settings.setdefault("zero_force_ds_cpu_optimizer", False):
        raise UserError(f'{file}: "zero_force_ds_cpu_optimizer" freezes the learning rate after resuming; write false')


def _check_with_deepspeed(settings: dict[str, Any], file: str) -> None:
    """Let DeepSpeed judge what is inside its blocks, now instead of when the engine is built."""
    from deepspeed.runtime.config import DeepSpeedConfig  # takes seconds
    from pydantic import ValidationError

    trial = copy.deepcopy({key: value for key, value in settings.items() if key != "pipeline"})
    trial["train_batch_size"] = trial["train_micro_batch_size_per_gpu"] * trial["gradient_accumulation_steps"]
    trial["zero_optimization"] = {key: v for key, v in trial["zero_optimization"].items() if v != "auto"}
    try:
        known = DeepSpeedConfig(trial)
    except ValidationError as error:
        first = error.errors()[0]
        block = next((f"{name}." for name, v in settings.items() if isinstance(v, dict) and first["loc"][0] in v), "")
        key = block + ".".join(map(str, first["loc"]))
        raise UserError(f'{file}: DeepSpeed refuses "{key}", {first["input"]!r}: {first["msg"]}') from None
    except Exception as error:  # each block has its own way to fail
        raise UserError(f"{file}: DeepSpeed refuses it: {' '.join(str(error).split())[:200]}") from None
    # DeepSpeed reads these blocks key by key and does not see the others.
    for block, keys in (("flops_profiler", vars(known.flops_profiler_config)), ("aio", known.aio_config)):
        for key in settings.get(block, {}):
            if key not in keys:
                raise UserError(f'{file}: nothing reads the key "{block}.{key}"; correct its spelling or remove it')
