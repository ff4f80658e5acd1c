"""What every engine is: the processes of a run, joined through Accelerate, and the surface that the loop sees.

Weights and the optimizer's moments pass in and out whole, in fp32, under GPT-2's parameter names, so that what one
layout saves any other layout loads.
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
from train.engines.accelerator import (
    deepspeed_accelerator,
    plain_accelerator,
    world_size,
)
from train.engines.placement import Place, check_launch, check_places
from train.engines.state import create_moments, held_by_training, set_whole, torch_optimizer, whole
from train.engines.transforms import checkpoint_arguments, compile_blocks, fuse_gelu, keep_freed_memory
from train.optim.parameter_groups import build_optimizer, moments_of
from train.utils import processes
from train.utils.devices import device_type, peak_memory, set_matmul_precision
from train.utils.errors import UserError


@dataclass(frozen=True)
class StepResult:
    """Mean loss over the global batch, and the gradient's norm before clipping (None where the engine hides it)."""

    loss: float
    grad_norm: float | None


class Engine(ABC):
    """Model and optimizer of one process. Every method is collective: all processes call it, in the same order."""

    def __init__(self, config: RunConfig, deepspeed: dict[str, Any] | None) -> None:
        self.config = config
        self.deepspeed = deepspeed
        check_launch(world_size())
        set_matmul_precision(config.optimized)
        self.accelerator = deepspeed_accelerator(config, deepspeed) if deepspeed else plain_accelerator(config)
        if self.world_size != world_size():
            raise UserError(
                f"the launcher started {world_size()} processes, but Accelerate counts {self.world_size}: each would "
                "train alone; launch with deepspeed, torchrun or "
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

    @property
    def data_rank(self) -> int:
        """Which share of the data is this process's."""
        return self.rank

    @property
    def data_world_size(self) -> int:
        """Into how many shares the data is divided."""
        return self.world_size

    @property
    def compiler_recomputes(self) -> bool:
        """Whether recomputation is part of what is compiled. Else it runs the whole compiled block once more."""
        return self.config.torch_compile and self.config.activation_checkpointing == "selective"

    def prepare(self, model: GPT2FlashForCausalLM) -> None:
        """Take the model in: activation, compilation, recomputation, optimizer, sharding; `layout` is a table of it.

        Raises:
            UserError: on all processes, when one of them is not what was asked for.
        """
        config = self.config
        assert config.learning_rate is not None
        if config.optimized:
            fuse_gelu(model)
            if self.device.type == "cpu":
                keep_freed_memory()
        if config.torch_compile:
            compile_blocks(model, checkpoint_arguments("selective") if self.compiler_recomputes else None)
        module = self._take(model)
        optimizer = build_optimizer(
            module,
            config.optimizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
            fused=config.optimized,
        )
        self.model, self.optimizer = self.accelerator.prepare(module, optimizer)
        assert torch_optimizer(self.optimizer) is optimizer, "DeepSpeed has put in its own optimizer"
        create_moments(self.optimizer, config.optimized)
        asked = Place(
            processes.rank(), gethostname(), device_type(), self._asked_wrapping(), self._asked_stage(), self.data_rank
        )
        places = gather_object([(self._place(), asked)])
        self.layout = check_places([found for found, _ in places], [wanted for _, wanted in places])

    @abstractmethod
    def _asked_wrapping(self) -> str:
        """What the model should be wrapped in, by flags, DeepSpeed JSON and launcher."""

    def _asked_stage(self) -> int:
        return 0

    @abstractmethod
    def _place(self) -> Place:
        """What this process is, by the word of the wrapped model."""

    @abstractmethod
    def _take(self, model: GPT2FlashForCausalLM) -> nn.Module:
        """What of the model is to be trained here."""

    @abstractmethod
    def train_step(
        self, step: int, micro_batches: Iterable[dict[str, torch.Tensor]], learning_rate: float
    ) -> StepResult:
        """One optimizer update from this process's share of the global batch.

        Dropout is drawn from (seed, step, rank) alone, so a resumed run repeats it without any saved state.
        """

    def _begin_step(self, step: int, learning_rate: float) -> None:
        torch.manual_seed(_mix(self.config.seed, step, self.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    @abstractmethod
    def eval_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(summed negative log-likelihood in nats, predicted tokens), float64, shape (2,).

        Summed over all processes, they are those of all processes' batches.
        """

    def sum_over_processes(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum")

    def peak_memory(self, own: dict[str, Any] | None = None) -> dict[str, Any]:
        """`devices.peak_memory` of the process with the most; `own` is what this one takes for its own."""
        memory = {**(own or peak_memory(self.device))}
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

    @abstractmethod
    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters that this process trains (or holds shards of), under GPT-2's names."""

    @abstractmethod
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules that run in this process, outer ones first, under GPT-2's names."""

    def holdings(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What this process holds for training: "optimizer", "parameters" or "gradients", and a tensor of it."""
        yield from held_by_training(self.optimizer)
        for parameter in self.model.parameters():
            yield "parameters", getattr(parameter, "ds_tensor", parameter).detach()
            yield "parameters", parameter.detach()
            if parameter.grad is not None:
                yield "gradients", parameter.grad

    def tensors(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Every parameter of the model once, whole: (name, {"weight", and its `moments_of`}), fp32 on the CPU.

        On the main process; the others take part in the gathering, step by step, and get nothing.
        """
        for name, state in self._whole_states():
            yield name, {key: value.to("cpu", torch.float32) for key, value in state.items() if self.is_main}

    def _whole_states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name, parameter in self.parameters():
            yield name, self._whole_state(name, parameter)

    def _whole_state(self, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        moments = {key: whole(self.optimizer, parameter, key) for key in moments_of(self.config.optimizer, name)}
        return {"weight": whole(self.optimizer, parameter), **moments}

    def load_state(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], updates: int
    ) -> None:
        """Put back what `tensors` gave after `updates` optimizer updates, exactly."""
        for state in torch_optimizer(self.optimizer).state.values():
            if "step" in state:
                state["step"].fill_(updates)
        for name, parameter in self.parameters():
            set_whole(self.optimizer, parameter, weights[name].to(self.device))
            for key in moments_of(self.config.optimizer, name):
                set_whole(self.optimizer, parameter, moments[f"{key}.{name}"].to(self.device), key)


def _mix(seed: int, step: int, rank: int) -> int:
    """One seed from three, far apart for neighbours (the odd constants are SplitMix64's)."""
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    return (mixed ^ (mixed >> 31)) % 2**63
