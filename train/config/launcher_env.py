"""What Accelerate's file and command line ask of a run, read from the environment that `accelerate launch` sets."""

import json
import os
from typing import Any

import yaml

from train.config import packaged
from train.config.run_config import RunConfig
from train.utils.errors import UserError

FIELDS = "the launcher's deepspeed_config"  # what messages call them


def asks(kind: str) -> bool:
    """Whether it asks for DEEPSPEED, FSDP, ..."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def deepspeed_config_file() -> str | None:
    """The DeepSpeed JSON that Accelerate's file names."""
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")


def deepspeed_fields() -> dict[str, Any] | None:
    """The DeepSpeed JSON that the fields of Accelerate's file (`zero_stage`, ...) stand for; None without them.

    It is the shipped JSON of the stage, with the numbers, devices and precision of the fields in it.
    A field that is not supported is a `UserError`.
    """
    if "ACCELERATE_DEEPSPEED_ZERO_STAGE" not in os.environ:
        return None
    stage = _asked("DEEPSPEED_ZERO_STAGE")
    if stage not in ("1", "2", "3"):
        raise UserError(f"{FIELDS}: zero_stage is {stage}; write 1, 2 or 3, or name a JSON with --deepspeed_config")
    settings = json.loads(packaged.find(f"zero{stage}").read_text(encoding="utf-8"))
    for part in ("optimizer", "param"):
        key, device = f"offload_{part}", _asked(f"DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE")
        if device == "cpu":
            settings["zero_optimization"][key] = {"device": "cpu", "pin_memory": True}
        elif device not in ("none", "auto"):
            raise UserError(
                f"{FIELDS}: {key}_device is {device}; write cpu or none, or name a JSON with --deepspeed_config"
            )
    if "offload_param" in settings["zero_optimization"] and stage != "3":
        raise UserError(f"{FIELDS}: offload_param_device is cpu; only zero_stage 3 partitions the weights, write none")
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        settings[key] = yaml.safe_load(_asked(key.upper()))
    precision = _asked("MIXED_PRECISION")
    if precision != "auto":
        if precision not in ("no", "bf16"):
            raise UserError(f"the launcher's mixed_precision is {precision}; write bf16 or no")
        settings["bf16"] = {"enabled": precision == "bf16"}
    return settings


def check(config: RunConfig, zero: dict[str, Any]) -> None:
    """Refuse settings of the launcher that contradict the run's.

    `config` has all flags resolved; `zero` is the JSON's block "zero_optimization", empty in a baseline.
    """
    for kind, remedy in (
        ("MEGATRON_LM", "use --pipeline_stages"),
        ("PARALLELISM_CONFIG", "use --pipeline_stages, or fsdp_config"),
    ):
        if asks(kind):
            raise UserError(f"the launcher asks for {kind.lower()}, which is not supported: {remedy}")
    if _asked("DYNAMO_BACKEND").lower() not in ("no", "auto"):
        raise UserError(f"the launcher's dynamo_backend is {_asked('DYNAMO_BACKEND')}: use --torch_compile")
    for key, variable, resolved in (
        ("mixed_precision", "MIXED_PRECISION", config.mixed_precision),
        ("gradient_accumulation_steps", "GRADIENT_ACCUMULATION_STEPS", config.gradient_accumulation_steps),
        ("gradient_clipping", "GRADIENT_CLIPPING", config.max_grad_norm),
        ("zero_stage", "DEEPSPEED_ZERO_STAGE", zero.get("stage", 0)),
        ("offload_optimizer_device", "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", _device(zero, "offload_optimizer")),
        ("offload_param_device", "DEEPSPEED_OFFLOAD_PARAM_DEVICE", _device(zero, "offload_param")),
    ):
        asked = _asked(variable)
        if asked not in ("auto", str(resolved)) and yaml.safe_load(asked) != resolved:
            raise UserError(
                f"the launcher's {key} is {asked}, but the run's is {resolved}: remove it there; it is set by the "
                "run's flags and DeepSpeed JSON"
            )


def forget() -> None:
    """Remove the fields from the environment: Accelerate refuses them together with a JSON, and cannot read "auto"."""
    for variable in list(os.environ):
        if variable.startswith("ACCELERATE_DEEPSPEED_") or variable in (
            "ACCELERATE_CONFIG_DS_FIELDS",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ):
            del os.environ[variable]


def _asked(variable: str) -> str:
    """A setting as it was written, "auto" if it was not."""
    asked = os.environ.get(f"ACCELERATE_{variable}", "auto")
    if variable == "MIXED_PRECISION" and asked == "no":
        # It is "no" by default too; a DeepSpeed launch also sets a list of the fields that the file has.
        written = "mixed_precision" in os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
        return "no" if written else "auto"
    return asked


def _device(zero: dict[str, Any], key: str) -> str:
    return (zero.get(key) or {}).get("device", "none")
