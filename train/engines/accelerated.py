"""One training step on every process, through Accelerate: plain PyTorch, DDP, or DeepSpeed's ZeRO.

The loop sees `train_step`, `eval_step`, `gather_state` and `load_state`; which engine is behind them it does not see.
Weights and AdamW moments pass in and out whole, in fp32, under GPT-2's parameter names, so that what one layout saves
any other layout loads.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from modeling_gpt2flash import GPT2FlashForCausalLM
from train.config import RunConfig
from train.errors import UserError
from train.metrics import peak_memory
from train.optim import build_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch.optim names them


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the global batch, and the gradient's norm before clipping (None where the engine hides it)."""

    loss: float
    grad_norm: float | None


def world_size() -> int:
    """Processes that the launcher started, by its own word."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device() -> torch.device:
    """This process's accelerator, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


class AcceleratedEngine:
    """Model and optimizer of one process. Every method is collective: all processes call it, in the same order."""

    def __init__(self, config: RunConfig, deepspeed: dict[str, Any] | None) -> None:
        self.config = config
        self.deepspeed = deepspeed
        self.accelerator = _deepspeed_accelerator(config, deepspeed) if deepspeed else _plain_accelerator(config)
        if self.accelerator.num_processes != world_size():
            raise UserError(
                f"the launcher started {world_size()} processes, but Accelerate counts "
                f"{self.accelerator.num_processes}: each would train alone; launch with deepspeed, torchrun or "
                "accelerate launch --config_file accelerate_configs/deepspeed.yaml"
            )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def prepare(self, model: GPT2FlashForCausalLM) -> None:
        """Take the model in: activation checkpointing, compilation, optimizer, sharding."""
        config = self.config
        self.module = model
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.torch_compile:
            for block in model.transformer.h:
                block.compile()
        optimizer = build_optimizer(
            model,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
            fused=config.optimized,
        )
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self._create_moments()

    def train_step(
        self, step: int, micro_batches: Iterable[dict[str, torch.Tensor]], learning_rate: float
    ) -> StepResult:
        """One optimizer update from this process's share of the global batch.

        Dropout is drawn from (seed, step, rank) alone, so a resumed run repeats it without any saved state.
        """
        self.model.train()
        torch.manual_seed(_mix(self.config.seed, step, self.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        losses, grad_norm = [], None
        for micro_batch in micro_batches:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**self._on_device(micro_batch), use_cache=False, skip_logits=True).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    limit = self.config.max_grad_norm or float("inf")
                    grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach().float())
        mean = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        return StepResult(mean, None if grad_norm is None else float(grad_norm))

    @torch.no_grad()
    def eval_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(summed negative log-likelihood in nats, predicted tokens) of this process's batch, float64, shape (2,)."""
        self.model.eval()
        batch = self._on_device(batch)
        nll = self.model(**batch, use_cache=False, skip_logits=True, num_items_in_batch=1).loss
        return torch.stack([nll.double(), (batch["shift_labels"] != -100).sum().double()])

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum")

    def peak_memory(self) -> dict[str, Any]:
        """`metrics.peak_memory` of the process with the most."""
        memory = peak_memory(self.device)
        for key in ("peak_memory_bytes", "peak_memory_reserved_bytes"):
            if memory[key] is not None:
                value = torch.tensor([memory[key]], dtype=torch.int64, device=self.device)
                memory[key] = int(self.accelerator.gather(value).max())
        return memory

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Finish the trackers and leave the process group; from here each process is on its own."""
        self.accelerator.end_training()

    def gather_state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """(weights by name, moments by `moment.name`), whole, fp32, on the CPU of the main process; else empty."""
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.named_parameters():
            state = {"weight": self._whole(parameter)} | {key: self._whole(parameter, key) for key in MOMENTS}
            if self.is_main:
                weights[name] = state["weight"].to("cpu", torch.float32).contiguous()
                moments |= {f"{key}.{name}": state[key].to("cpu", torch.float32).contiguous() for key in MOMENTS}
        return weights, moments

    def load_state(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], updates: int
    ) -> None:
        """Put back what `gather_state` gave after `updates` optimizer updates, exactly."""
        for state in self._torch_optimizer().state.values():
            state["step"].fill_(updates)
        for name, parameter in self.module.named_parameters():
            self._set_whole(parameter, weights[name].to(self.device))
            for key in MOMENTS:
                self._set_whole(parameter, moments[f"{key}.{name}"].to(self.device), key)

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def _whole(self, parameter: torch.Tensor, moment: str | None = None) -> torch.Tensor:
        """A parameter's fp32 weight or moment, gathered from its shards."""
        if not _is_sharded(parameter):
            return parameter.detach() if moment is None else self._torch_optimizer().state[parameter][moment]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if moment is None:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, moment)

    @torch.no_grad()
    def _set_whole(self, parameter: torch.Tensor, value: torch.Tensor, moment: str | None = None) -> None:
        if not _is_sharded(parameter):
            target = parameter if moment is None else self._torch_optimizer().state[parameter][moment]
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

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer under Accelerate's wrapper and, where there is one, DeepSpeed's."""
        optimizer = self.optimizer.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def _create_moments(self) -> None:
        """Give the optimizer, now, the state that its first step would create.

        Then a checkpoint has somewhere to go. It also keeps DeepSpeed 0.19 from linking the moments of the first
        parameter group alone, which is all that exists when ZeRO-1 and 2 look for them within the first step.
        """
        optimizer, zero = self._torch_optimizer(), self.optimizer.optimizer
        if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
            flat = zero.fp32_partitioned_groups_flat
        elif hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO-1 and 2
            flat = zero.single_partition_of_fp32_groups
        else:
            flat = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in flat:
            device = parameter.device if self.config.optimized else "cpu"  # where a fused or a plain AdamW counts
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0, device=device),
                **{key: torch.zeros_like(parameter) for key in MOMENTS},
            }
        if hasattr(zero, "single_partition_of_fp32_groups"):
            zero._lazy_init_hp_params_optimizer_state()


def _is_sharded(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _mix(seed: int, step: int, rank: int) -> int:
    """One seed from three, far apart for neighbours (the odd constants are SplitMix64's)."""
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    return (mixed ^ (mixed >> 31)) % 2**63


def _tracking(config: RunConfig) -> dict[str, Any]:
    return {
        "log_with": None if config.report_to == "none" else config.report_to.split(","),
        "project_config": ProjectConfiguration(project_dir=str(config.run_folder)),
    }


def _plain_accelerator(config: RunConfig) -> Accelerator:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "--run_type baseline: the launcher asks for DeepSpeed, and the baseline is plain PyTorch; "
            "start it with python -m train or torchrun, or use --run_type optimized"
        )
    return Accelerator(
        cpu=choose_device().type == "cpu",
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps or 1,
        **_tracking(config),
    )


def _deepspeed_accelerator(config: RunConfig, deepspeed: dict[str, Any]) -> Accelerator:
    handlers = []
    if choose_device().type == "cpu":
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
        # Without this DeepSpeed would build its shared-memory collectives with a C++ compiler at every first start.
        import deepspeed.ops as deepspeed_ops

        deepspeed_ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "LOCAL_RANK" not in os.environ:  # a single process without a launcher
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ.update(alone)
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps or 1,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=handlers,
        **_tracking(config),
    )
    # Else transformers would build every model under ZeRO-3's `zero.Init`, where the initial weights are other draws
    # than in any other layout, and the model that is loaded to write the sample would be sharded as well.
    unset_hf_deepspeed_config()
    return accelerator
