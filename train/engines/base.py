"""The interface of an engine, through which the training loop sees the model, the optimizer and the processes.

Weights and the optimizer's moments are exchanged as full tensors, in fp32, under GPT-2's parameter names, so that any
layout can load the checkpoint of any other.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from socket import gethostname
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from modeling_gpt2flash import GPT2FlashForCausalLM
from train.config.run_config import RunConfig
from train.engines import zero
from train.engines.accelerator import deepspeed_accelerator, plain_accelerator
from train.engines.placement import RankPlacement, check_launch, check_placements
from train.engines.state import create_moments, full_tensor, held_by_optimizer, set_full_tensor, torch_optimizer
from train.engines.transforms import checkpoint_arguments, compile_blocks, fuse_gelu, keep_freed_memory
from train.metrics.peak_memory import peak_memory
from train.optim.parameter_groups import build_optimizer, moments_of
from train.utils import processes
from train.utils.devices import device_type, set_matmul_precision
from train.utils.errors import UserError


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the global batch, and the norm of the gradient before clipping (None if it is not reported)."""

    loss: float
    grad_norm: float | None


class Engine(ABC):
    """Model and optimizer of one process. All methods are collective: all processes call them, in the same order.

    The process reads share `data_rank` of the `data_world_size` shares of each global batch, and is the one at
    `pipeline_rank` of a pipeline (0 without one).
    """

    def __init__(self, config: RunConfig, deepspeed: dict[str, Any]) -> None:
        self.config = config
        self.deepspeed = deepspeed
        launched = processes.world_size()
        check_launch(launched)
        set_matmul_precision(config.optimized)
        self.accelerator = deepspeed_accelerator(config, deepspeed) if deepspeed else plain_accelerator(config)
        self.device = self.accelerator.device
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.data_rank, self.data_world_size, self.pipeline_rank = self.rank, self.world_size, 0
        if self.world_size != launched:
            raise UserError(
                f"the launcher started {launched} processes, but Accelerate counts {self.world_size}: each would "
                "train alone; launch with deepspeed, torchrun or "
                "accelerate launch --config_file accelerate_configs/deepspeed.yaml"
            )

    @property
    def compiles_checkpointing(self) -> bool:
        """Whether activation checkpointing is part of the compiled graph, instead of running the graph again."""
        return self.config.torch_compile and self.config.activation_checkpointing == "selective"

    def prepare(self, model: GPT2FlashForCausalLM) -> None:
        """Transform the model, create its optimizer, and wrap or shard both; `layout` is then a table of the ranks.

        All processes refuse to train if the placement of one of them is not the requested one.
        """
        config = self.config
        if config.optimized:
            fuse_gelu(model)
            if self.device.type == "cpu":
                keep_freed_memory()
        if config.torch_compile:
            compile_blocks(model, checkpoint_arguments("selective") if self.compiles_checkpointing else None)
        module = self._build_module(model)
        optimizer = build_optimizer(
            module,
            config.optimizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
            fused=config.optimized,
        )
        self.model, self.optimizer = self.accelerator.prepare(module, optimizer)
        assert torch_optimizer(self.optimizer) is optimizer, "DeepSpeed has replaced the optimizer by its own"
        create_moments(self.optimizer, config.optimized)
        host, wrapping = gethostname(), self._requested_wrapping()
        actual = RankPlacement(self.rank, host, self.device.type, *self._placement())
        requested = RankPlacement(processes.rank(), host, device_type(), wrapping, self.pipeline_rank, self.data_rank)
        self.layout = check_placements(gather_object([(actual, requested)]))

    @abstractmethod
    def _requested_wrapping(self) -> str:
        """The wrapping of the model that flags, DeepSpeed JSON and launcher ask for."""

    @abstractmethod
    def _placement(self) -> tuple[str, int, int]:
        """The wrapping, the pipeline stage and the data-parallel rank of this process, read from the wrapped model."""

    @abstractmethod
    def _build_module(self, model: GPT2FlashForCausalLM) -> nn.Module:
        """The part of the model that this process trains, with activation checkpointing applied."""

    @abstractmethod
    def train_step(
        self, step: int, micro_batches: Iterable[dict[str, torch.Tensor]], learning_rate: float
    ) -> StepResult:
        """One optimizer update from this process's share of the global batch.

        The random state of dropout depends on (seed, step, rank) alone, so a resumed run needs no saved state.
        """

    def _begin_step(self, step: int, learning_rate: float) -> None:
        torch.manual_seed(_mix(self.config.seed, step, self.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @abstractmethod
    def eval_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(summed negative log-likelihood in nats, predicted tokens), float64, shape (2,).

        The sum over all processes is that of all processes' batches.
        """

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum")

    def peak_memory(self, own: dict[str, Any] | None = None) -> dict[str, Any]:
        """`metrics.peak_memory` of the process with the most; `own` replaces the value of this process."""
        memory = {**(own or peak_memory(self.device))}
        for key in ("peak_memory_bytes", "peak_memory_reserved_bytes"):
            if memory[key] is not None:
                value = torch.tensor([memory[key]], dtype=torch.int64, device=self.device)
                memory[key] = int(self.accelerator.gather(value).max())
        return memory

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Destroy the process group. No collective may follow."""
        self.accelerator.end_training()

    @abstractmethod
    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters that this process trains, or holds shards of, under GPT-2's names."""

    @abstractmethod
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that run in this process, outer ones first, under GPT-2's names."""

    def held_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of this process's training state, as ("optimizer", "parameters" or "gradients", tensor)."""
        yield from held_by_optimizer(self.optimizer)
        for parameter in self.model.parameters():
            yield "parameters", zero.shard(parameter).detach()
            yield "parameters", parameter.detach()
            if parameter.grad is not None:
                yield "gradients", parameter.grad

    def tensors(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Every parameter of the model once, as (name, {"weight" and each of its `moments_of`: full tensor}).

        In fp32 on the CPU of the main process. The others take part in each gathering and get empty mappings.
        """
        for name, state in self._full_states():
            yield name, {key: value.to("cpu", torch.float32) for key, value in state.items() if self.is_main}

    def _full_states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name, parameter in self.parameters():
            yield name, self._full_state(name, parameter)

    def _full_state(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        moments = {key: full_tensor(self.optimizer, parameter, key) for key in moments_of(self.config.optimizer, name)}
        return {"weight": full_tensor(self.optimizer, parameter), **moments}

    def load_state(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], updates: int
    ) -> None:
        """Restore exactly what `tensors` returned after `updates` optimizer updates."""
        for state in torch_optimizer(self.optimizer).state.values():
            if "step" in state:
                state["step"].fill_(updates)
        for name, parameter in self.parameters():
            set_full_tensor(self.optimizer, parameter, weights[name].to(self.device))
            for key in moments_of(self.config.optimizer, name):
                set_full_tensor(self.optimizer, parameter, moments[f"{key}.{name}"].to(self.device), key)


def _mix(seed: int, step: int, rank: int) -> int:
    """One seed from three numbers; adjacent numbers give distant seeds (the odd constants are SplitMix64's)."""
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    return (mixed ^ (mixed >> 31)) % 2**63
