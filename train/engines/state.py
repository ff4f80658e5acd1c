"""Weights and optimizer moments as they are checkpointed: full tensors in fp32, gathered from the processes.

`prepared` is the optimizer that Accelerate returns.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from train.engines import zero
from train.optim.muon import MuonAndAdamW
from train.optim.parameter_groups import ADAMW_MOMENTS, MUON_MOMENTS


def torch_optimizer(prepared: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside of Accelerate's wrapper and DeepSpeed's, if there is one."""
    optimizer = prepared.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def full_tensor(prepared: Any, parameter: torch.Tensor, moment: str | None = None) -> torch.Tensor:
    """A parameter's fp32 weight, or the named moment of it, gathered from its shards."""
    if zero.is_managed(parameter):
        return zero.full_tensor(parameter, moment)
    tensor = parameter.detach() if moment is None else torch_optimizer(prepared).state[parameter][moment]
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter."""
    tensor = zero.shard(parameter).detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def set_full_tensor(prepared: Any, parameter: torch.Tensor, value: torch.Tensor, moment: str | None = None) -> None:
    """The reverse of `full_tensor`, on every process that holds a shard."""
    if zero.is_managed(parameter):
        zero.set_full_tensor(parameter, value, moment)
        return
    target = parameter if moment is None else torch_optimizer(prepared).state[parameter][moment]
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)


def create_moments(prepared: Any, optimized: bool) -> None:
    """Create the state of the optimizer that its first step would create, so that a checkpoint can be loaded."""
    optimizer = torch_optimizer(prepared)
    if isinstance(optimizer, MuonAndAdamW):
        for parameter in optimizer.matrices:
            optimizer.state[parameter] = {key: torch.zeros_like(parameter) for key in MUON_MOMENTS}
        optimizer = optimizer.adamw
    updated = zero.partitions(prepared.optimizer)
    if updated is None:
        updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in updated:
        device = parameter.device if optimized else "cpu"  # where fused and plain AdamW keep their step
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0, device=device),
            **{key: torch.zeros_like(parameter) for key in ADAMW_MOMENTS},
        }
    zero.link_moments(prepared.optimizer)


def held_by_optimizer(prepared: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of this process's optimizer, as ("optimizer" or "gradients", tensor).

    fp32 master weights are optimizer state. A tensor may come twice.
    """
    for parameter, state in torch_optimizer(prepared).state.items():
        yield "optimizer", parameter.detach()
        if parameter.grad is not None:
            yield "gradients", parameter.grad
        yield from (("optimizer", value) for value in state.values() if isinstance(value, torch.Tensor))
    yield from (("gradients", gradient) for gradient in zero.gradients(prepared.optimizer))
