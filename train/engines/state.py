"""Weights and optimizer moments as they are checkpointed: whole, in fp32, out of an optimizer that may hold shards."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from train.optim.muon import MuonAndAdamW
from train.optim.parameter_groups import ADAMW_MOMENTS, MUON_MOMENTS


def torch_optimizer(prepared: Any) -> torch.optim.Optimizer:
    """The torch optimizer under Accelerate's wrapper and, where there is one, DeepSpeed's."""
    optimizer = prepared.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def whole(prepared: Any, parameter: torch.Tensor, moment: str | None = None) -> torch.Tensor:
    """A parameter's fp32 weight or moment, gathered from its shards."""
    if not _is_deepspeeds(parameter):
        tensor = parameter.detach() if moment is None else torch_optimizer(prepared).state[parameter][moment]
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if moment is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, moment)


@torch.no_grad()
def set_whole(prepared: Any, parameter: torch.Tensor, value: torch.Tensor, moment: str | None = None) -> None:
    """The reverse of `whole`, on every process that holds a shard."""
    if not _is_deepspeeds(parameter):
        target = parameter if moment is None else torch_optimizer(prepared).state[parameter][moment]
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)
        return
    from deepspeed import zero
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if moment is not None:
        safe_set_full_optimizer_state(parameter, value, moment)
        return
    safe_set_full_fp32_param(parameter, value)
    with zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
        parameter.data.copy_(value)


def create_moments(prepared: Any, optimized: bool) -> None:
    """Give the optimizer, now, the state that its first step would create.

    Then a checkpoint has somewhere to go. It also keeps DeepSpeed 0.19 from linking the moments of the first
    parameter group alone, which is all that exists when ZeRO-1 and 2 look for them within the first step.
    """
    optimizer, zero = torch_optimizer(prepared), prepared.optimizer
    if isinstance(optimizer, MuonAndAdamW):
        for parameter in optimizer.matrices:
            optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in MUON_MOMENTS}
        optimizer = optimizer.adamw
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        flat = zero.fp32_partitioned_groups_flat
    elif hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2
        flat = zero.single_partition_of_fp32_groups
    else:
        flat = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in flat:
        device = parameter.device if optimized else "cpu"  # where a fused or a plain AdamW counts
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, device=device),
            **{key: torch.zeros_like(parameter) for key in ADAMW_MOMENTS},
        }
    if hasattr(zero, "single_partition_of_fp32_groups"):
        zero._lazy_init_hp_params_optimizer_state()


def held_by_training(prepared: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """What the optimizer, and DeepSpeed's around it, hold now besides parameters: "gradients" and "optimizer" state.

    fp32 masters of the weights are optimizer state. Tensors may come twice.
    """
    optimizer, zero = torch_optimizer(prepared), prepared.optimizer
    for parameter, state in optimizer.state.items():
        yield "optimizer", parameter.detach()
        if parameter.grad is not None:
            yield "gradients", parameter.grad
        yield from (("optimizer", value) for value in state.values() if isinstance(value, torch.Tensor))
    averaged = getattr(zero, "averaged_gradients", None) or {}
    for gradients in averaged.values():
        yield from (("gradients", gradient) for gradient in gradients or ())
    for buffer in ("grads_in_partition", "grad_partitions_flat_buffer"):  # ZeRO-1 and 2; ZeRO-3
        if getattr(zero, buffer, None) is not None:
            yield "gradients", getattr(zero, buffer)


def _is_deepspeeds(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
