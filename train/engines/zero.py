"""What is particular to DeepSpeed's ZeRO: where it keeps weights, gradients and the optimizer's state.

`zero` is DeepSpeed's optimizer, which wraps torch's. ZeRO-1 and 2 keep the full weights and a flat fp32 partition of
each parameter group; ZeRO-3 keeps shards of the weights as well, under `parameter.ds_tensor`. Which stage runs, and
where it offloads to, is in the DeepSpeed JSON (`config/deepspeed_config.py`).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from modeling_gpt2flash import GPT2FlashForCausalLM


def requested_name(deepspeed: dict[str, Any]) -> str:
    """The name of the layout that the DeepSpeed JSON asks for."""
    zero = deepspeed["zero_optimization"]
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    return name(zero.get("stage", 0), offload)


def name(stage: int, offload: bool) -> str:
    return f"ZeRO-{stage}{' with its optimizer on the CPU' * offload}"


def gather_blocks_as_a_unit(model: GPT2FlashForCausalLM, deepspeed: dict[str, Any]) -> None:
    """Under ZeRO-3, gather the parameters of a block before it runs.

    They would be gathered layer by layer within the compiled block otherwise, each of which breaks its graph.
    """
    if deepspeed["zero_optimization"].get("stage") == 3:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [type(model.transformer.h[0])])


def is_managed(parameter: torch.Tensor) -> bool:
    """Whether the fp32 weight and the moments of a parameter are in partitions of ZeRO's."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def shard(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter between steps; the parameter itself unless ZeRO-3 shards it."""
    return getattr(parameter, "ds_tensor", parameter)


def full_tensor(parameter: torch.Tensor, moment: str | None) -> torch.Tensor:
    """The full fp32 weight of a parameter, or a moment of it, gathered from all processes."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if moment is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, moment)


def set_full_tensor(parameter: torch.Tensor, value: torch.Tensor, moment: str | None) -> None:
    """Set the weight, in fp32 and as the model computes with it, or a moment of it, from the full tensor."""
    from deepspeed import zero
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if moment is not None:
        safe_set_full_optimizer_state(parameter, value, moment)
        return
    safe_set_full_fp32_param(parameter, value)
    with zero.GatheredParameters([parameter], modifier_rank=0, enabled=hasattr(parameter, "ds_id")):
        parameter.data.copy_(value)


def review_updates(engine: Any, review: Callable[[torch.Tensor], float]) -> None:
    """Let `review`, given the norm of the gradient over all processes, decide whether DeepSpeed updates the weights.

    It returns the norm, which it has read, or infinity. ZeRO skips an update whose norm is not finite, and that is how
    it is made to skip one. It computes the norm in any case, and need not search the gradients for infinities before
    that. It gets the norm in host memory: where it looks whether a norm is finite, and clips, it would wait for the
    device again otherwise, once and once for each parameter group.
    """
    optimizer = engine.optimizer
    if hasattr(optimizer, "scaled_global_norm"):  # ZeRO-1 and 2
        norm_of_all = optimizer.scaled_global_norm

        def reviewed_norm() -> torch.Tensor:
            norm = torch.as_tensor(norm_of_all())
            return torch.tensor(review(norm), dtype=norm.dtype)

        optimizer.scaled_global_norm = reviewed_norm
        optimizer.check_grad_overflow = True
        optimizer.check_overflow = lambda **_: None
    elif hasattr(optimizer, "_get_norm_groups"):  # ZeRO-3
        from deepspeed.runtime.utils import combine_grad_norm_groups

        norms_of_groups = optimizer._get_norm_groups

        def reviewed_norms() -> list[torch.Tensor]:
            return [torch.tensor(review(combine_grad_norm_groups(norms_of_groups())))]

        optimizer._get_norm_groups = reviewed_norms
    else:  # without ZeRO, DeepSpeed steps torch's optimizer, with the complete gradients
        update = optimizer.step

        def reviewed_step() -> None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            norm = get_total_norm([parameter.grad for parameter in parameters])
            if math.isfinite(review(norm)):
                clip_grads_with_norm_(parameters, engine.gradient_clipping() or math.inf, norm)
                update()

        engine.clip_fp32_gradients = lambda: None
        optimizer.step = reviewed_step


def partitions(zero: Any) -> list[torch.Tensor] | None:
    """The flat fp32 partitions, which are what torch's optimizer updates; None without ZeRO."""
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # ZeRO-3; ZeRO-1 and 2
        if hasattr(zero, attribute):
            return getattr(zero, attribute)
    return None


def link_moments(zero: Any) -> None:
    """Let ZeRO-1 and 2 map parameters to the moments, which all exist now.

    DeepSpeed 0.19 maps them within the first step, when only those of the first parameter group exist.
    """
    if hasattr(zero, "single_partition_of_fp32_groups"):
        zero._lazy_init_hp_params_optimizer_state()


def gradients(zero: Any) -> Iterator[torch.Tensor]:
    """Gradients in DeepSpeed's own buffers."""
    averaged = getattr(zero, "averaged_gradients", None) or {}
    for group in averaged.values():
        yield from group or ()
    for buffer in ("grads_in_partition", "grad_partitions_flat_buffer"):  # ZeRO-1 and 2; ZeRO-3
        if getattr(zero, buffer, None) is not None:
            yield getattr(zero, buffer)
