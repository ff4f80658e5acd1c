"""The Accelerator of a run: plain PyTorch (one process, DDP, FSDP2) or DeepSpeed, by its flags and its launcher."""

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.utils import DistributedType, ProjectConfiguration
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from train.config import launcher_env as launcher
from train.config.run_config import RunConfig
from train.job.watchdog import WORK_TIMEOUTS
from train.utils.devices import device_type
from train.utils.errors import UserError


def plain_accelerator(config: RunConfig) -> Accelerator:
    """One process, DDP or, where the launcher asks for it, FSDP2."""
    if launcher.asks("DEEPSPEED"):
        raise UserError(
            "--run_type baseline: the launcher asks for DeepSpeed, and the baseline is plain PyTorch; "
            "start it with python -m train or torchrun, or use --run_type optimized"
        )
    launcher.check(config, {})
    fsdp = _fsdp_plugin(config) if launcher.asks("FSDP") else None
    on_cpu = device_type() == "cpu"
    group = InitProcessGroupKwargs(timeout=group_timeout(config))
    if fsdp and on_cpu:
        # Accelerate 1.15 shards on accelerators only; on a CPU it would silently train unsharded.
        PartialState(cpu=True, timeout=group.timeout).distributed_type = DistributedType.MULTI_GPU
    return Accelerator(cpu=on_cpu and not fsdp, fsdp_plugin=fsdp, kwargs_handlers=[group], **_common_arguments(config))


def deepspeed_accelerator(config: RunConfig, deepspeed: dict[str, Any]) -> Accelerator:
    if launcher.asks("FSDP"):
        raise UserError(
            "--run_type optimized: the launcher asks for FSDP, and the optimized run shards through DeepSpeed; launch "
            "with accelerate_configs/deepspeed.yaml, or use --run_type baseline"
        )
    launcher.check(config, deepspeed["zero_optimization"])
    launcher.forget()
    group: dict[str, Any] = {"timeout": group_timeout(config)}
    if device_type() == "cpu":
        group["backend"] = "gloo"  # on an accelerator, DeepSpeed chooses its own
        # DeepSpeed would compile its shared-memory collectives at the first start otherwise.
        import deepspeed.ops as deepspeed_ops

        deepspeed_ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "LOCAL_RANK" not in os.environ:  # a single process without a launcher
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(**group)],
        **_common_arguments(config),
    )
    # transformers would build every model under ZeRO-3's `zero.Init` otherwise, which initializes weights differently
    # from other layouts, and would also shard the model that generates the sample.
    unset_hf_deepspeed_config()
    return accelerator


def group_timeout(config: RunConfig) -> timedelta:
    """PyTorch's own limit of each collective, after which it raises (gloo) or aborts the process (NCCL).

    Longer than all that `train.job.watchdog` lets a rank wait for: it says more.
    """
    return timedelta(seconds=max((WORK_TIMEOUTS + 1) * config.timeout, 1800))


def set_group_timeouts(config: RunConfig) -> None:
    """Give it to all process groups: those that DeepSpeed and FSDP2 create have PyTorch's default."""
    if torch.distributed.is_initialized():
        for group in torch.distributed.distributed_c10d._world.pg_map:
            torch.distributed.distributed_c10d._set_pg_timeout(group_timeout(config), group)


def _fsdp_plugin(config: RunConfig) -> FullyShardedDataParallelPlugin:
    """FSDP2 as configured by the launcher's YAML: sharded block by block, gradients reduced in fp32."""
    for variable, wanted, remedy in (
        ("FSDP_VERSION", "2", "write fsdp_version: 2"),
        ("FSDP_AUTO_WRAP_POLICY", "transformer_based_wrap", "write TRANSFORMER_BASED_WRAP, or leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "false", "use --activation_checkpointing"),
        ("FSDP_OFFLOAD_PARAMS", "false", "offload with ZeRO, ds_configs/zero3_offload.json"),
    ):
        found = os.environ.get(variable, wanted)
        if found.lower() != wanted:
            raise UserError(f"the launcher's {variable.lower()} is {found}; {remedy}")
    bf16 = config.mixed_precision == "bf16"
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,  # every process initializes or loads the same weights
        mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else None,
    )


def _common_arguments(config: RunConfig) -> dict[str, Any]:
    return {
        "mixed_precision": config.mixed_precision,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "log_with": config.trackers or None,  # of an empty list Accelerate warns
        "project_config": ProjectConfiguration(
            project_dir=str(config.run_folder), logging_dir=str(config.run_folder / "tensorboard")
        ),
    }
