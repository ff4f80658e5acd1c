"""The interface of an engine, through which the training loop sees the model, the optimizer and the processes.

Weights and the optimizer's moments are exchanged as full tensors, in fp32, under GPT-2's parameter names, so that any
layout can load the checkpoint of any other.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from socket import gethostname
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from modeling_gpt2flash import GPT2FlashForCausalLM
from train.config.run_config import RunConfig
from train.engines import zero
from train.engines.accelerate_setup import deepspeed_accelerator, plain_accelerator, set_group_timeouts
from train.engines.placement import RankPlacement, check_launch, check_placements
from train.engines.state import (
    create_moments,
    full_tensor,
    held_by_optimizer,
    local_part,
    set_full_tensor,
    torch_optimizer,
)
from train.engines.transforms import checkpoint_arguments, compile_blocks, fuse_gelu, keep_freed_memory
from train.job import watchdog
from train.metrics.annotations import annotate
from train.metrics.peak_memory import peak_memory
from train.optim.parameter_groups import build_optimizer, moments_of
from train.utils import processes
from train.utils.devices import device_type, set_matmul_precision
from train.utils.errors import UserError


@dataclass(frozen=True)
class StepResult:
    """What a step computed, the same in all processes."""

    loss: float  # mean over the global batch
    grad_norm: float  # of the gradient before clipping
    updated: bool  # whether the optimizer has updated the weights
    requests: tuple[bool, ...]  # whether any process made the request


def is_finite(loss: float, grad_norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(grad_norm)


@dataclass(frozen=True)
class Review:
    """What decides, after the backward pass and before the optimizer, whether a step updates the weights.

    It is given numbers over all processes, so that each decides alike.
    """

    accepts: Callable[[float, float], bool] = is_finite  # (loss, norm of the gradient)
    requests: Callable[[], Sequence[bool]] = tuple  # what this process asks of all; their number is always the same


DEFAULT_REVIEW = Review()


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
        self.step = 0  # the step being computed, from 0
        self.losses: list[torch.Tensor] = []  # of the micro-batches of the last step, on the device
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
        if self.deepspeed:
            zero.review_updates(self.model, self._reviewed_norm)
        set_group_timeouts(config)
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
    def _compute_step(self, micro_batches: Iterable[dict[str, torch.Tensor]]) -> None:
        """Forward and backward passes, then the update, if `_review` accepts it. Each loss goes to `losses`."""

    def train_step(
        self,
        step: int,
        micro_batches: Iterable[dict[str, torch.Tensor]],
        learning_rate: float,
        review: Review = DEFAULT_REVIEW,
    ) -> StepResult:
        """One step from this process's share of the global batch, which updates the weights if `review` accepts it."""
        self.step = step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.losses.clear()
        self.review = review
        self._compute_step(micro_batches)
        return self.result

    def seed_dropout(self, micro_step: int, stage: int = 0) -> None:
        """Seed the masks of this process's micro-batch `micro_step` in a stage of a pipeline.

        They depend on (seed, step, number of the micro-batch in the global batch, stage) alone: a resumed run needs no
        saved state, and any number of data-parallel processes draws the same masks.
        """
        micro_batch = micro_step * self.data_world_size + self.data_rank
        torch.manual_seed(dropout_seed(self.config.seed, self.step, micro_batch, stage))

    def _review(self, grad_norm: torch.Tensor) -> bool:
        """Whether the step updates the weights; called once in each step, with the norm over all processes.

        This is the only time in a step that the host waits for the device.
        """
        with annotate("communication"):
            loss, requests = self._gather_losses(
                [torch.full((), float(asked), device=self.device) for asked in self.review.requests()]
            )
            values = torch.stack([loss.float(), grad_norm.float().to(self.device), *requests]).tolist()
        loss_value, norm_value, *asked = values
        updated = self.review.accepts(loss_value, norm_value)
        self.result = StepResult(loss_value, norm_value, updated, tuple(value > 0 for value in asked))
        return updated

    def _reviewed_norm(self, grad_norm: torch.Tensor) -> float:
        """The norm on the host, or infinity if the step does not update the weights."""
        return self.result.grad_norm if self._review(grad_norm) else math.inf

    @abstractmethod
    def _gather_losses(self, requests: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The mean of all processes' `losses`, and of their requests."""

    def non_finite_losses(self) -> list[tuple[int, int, float]]:
        """(rank, micro-batch, loss) of the last step's losses that are not finite, those of all processes."""
        own = [(self.rank, number, float(loss)) for number, loss in enumerate(self.losses)]
        return [each for each in gather_object(own) if not math.isfinite(each[2])]

    def non_finite_parameters(self) -> list[str]:
        """The parameters that hold a NaN or infinity, in any process."""
        own = [name for name, parameter in self.parameters() if not bool(local_part(parameter).isfinite().all())]
        return list(dict.fromkeys(gather_object(own)))

    @abstractmethod
    def eval_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(summed negative log-likelihood in nats, predicted tokens), float64, shape (2,).

        The sum over all processes is that of all processes' batches.
        """

    def any_process(self, asks: bool) -> bool:
        """Whether any process asks."""
        return bool(self.sum_over_processes(torch.tensor(float(asks), device=self.device)) > 0)

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
        """Destroy the process group, and end the watch over it. No collective may follow."""
        self.accelerator.end_training()
        watchdog.stop()

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

    def tensors(self, on_host: bool = True) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Every parameter of the model once, as (name, {"weight" and each of its `moments_of`: full tensor}).

        In fp32 on the CPU of the main process, or where they are if not `on_host`. The other processes take part in
        each gathering and get empty mappings.
        """
        for name, state in self._full_states():
            state = state if self.is_main else {}
            yield name, {key: value.to("cpu", torch.float32) if on_host else value for key, value in state.items()}

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
        for name, parameter in watchdog.marked(self.parameters(), "loading the checkpoint"):
            set_full_tensor(self.optimizer, parameter, weights[name].to(self.device))
            for key in moments_of(self.config.optimizer, name):
                set_full_tensor(self.optimizer, parameter, moments[f"{key}.{name}"].to(self.device), key)


def dropout_seed(seed: int, step: int, micro_batch: int, stage: int) -> int:
    """The seed of a micro-batch's masks in a stage of a pipeline, by its number in the global batch of a step."""
    return int(np.random.SeedSequence((seed, step, micro_batch, stage)).generate_state(1, np.uint64)[0] >> 1)
