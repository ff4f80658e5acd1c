"""The model in stages, each on one process or several, through DeepSpeed's pipeline engine.

With D processes a pipeline rank, global rank r is data-parallel rank r mod D of pipeline rank r // D. Under 1F1B,
pipeline rank p has stage p. Under DualPipeV there are twice as many stages as pipeline ranks, and p has stage p and,
on the way back, stage 2 · pipeline ranks - 1 - p. The first stage reads the tokens, the last one the labels; hidden
states go forward between them and their gradients back.
"""

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from socket import gethostname
from typing import Any

import torch
from deepspeed.pipe import DualPipeVModule, LayerSpec, PipelineModule, TiedLayerSpec
from torch import distributed as dist
from torch import nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from modeling_gpt2flash import GPT2FlashForCausalLM
from modeling_gpt2flash.pipeline import HeadLayer, Passed, full_name, is_tied, locate, model_layers
from train.config.run_config import RunConfig
from train.data.batches import IGNORED_LABEL
from train.engines.base import Engine, StepResult
from train.engines.pipeline.partition import Partition
from train.engines.placement import Place
from train.engines.transforms import checkpoint_arguments
from train.metrics.annotations import LOSS, Phase, annotate, stage_annotation
from train.optim.parameter_groups import moments_of

# What the instructions of DeepSpeed's schedules are; all others pass something on or add it up over processes.
PHASES: dict[str, Phase] = {
    "LoadMicroBatch": "data",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "OptimizerStep": "optimizer",
}


class PipelinedEngine(Engine):
    """One pipeline rank's stages; losses, norms and state are those of the whole model."""

    def __init__(self, config: RunConfig, deepspeed: dict[str, Any], partition: Partition) -> None:
        super().__init__(config, deepspeed)
        assert config.pipeline_stages is not None
        assert self.world_size % config.pipeline_stages == 0
        self.partition = partition
        self.pipeline_size = config.pipeline_stages
        self.two_way = config.pipeline_schedule == "dualpipev"
        assert partition.stages == self.pipeline_size * (2 if self.two_way else 1)
        self.pipeline_rank = self.rank // self.data_world_size
        self.has_loss = self.pipeline_rank == self._owner(partition.stages - 1)
        self.passing: dict[str, torch.Size] = {}

    def _owner(self, stage: int) -> int:
        return min(stage, 2 * self.pipeline_size - 1 - stage) if self.two_way else stage

    @property
    def data_rank(self) -> int:
        return self.rank % self.data_world_size

    @property
    def data_world_size(self) -> int:
        return self.world_size // self.pipeline_size

    def _take(self, model: GPT2FlashForCausalLM) -> nn.Module:
        layers = model_layers(model)
        self.n_layer = model.config.n_layer
        self.tied = is_tied(model)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.layers = {
            index: layers[index]
            for stage in range(self.partition.stages)
            for index in self.partition.layers(stage)
            if self._owner(stage) == self.pipeline_rank
        }
        # Not DeepSpeed's own checkpoint function: it needs inputs with gradients, which tokens have not. The interval
        # is in the JSON.
        assert self.config.activation_checkpointing is not None
        arguments = checkpoint_arguments(self.config.activation_checkpointing)
        recompute = _as_it_is if self.compiler_recomputes else partial(checkpoint, **arguments)
        # DeepSpeed prints random seeds that nothing here uses, and broadcasts the tied weight into autograd's sight.
        with contextlib.redirect_stdout(None), torch.no_grad():
            kind = _TwoStages if self.two_way else _Stage
            stage = kind(layers, self.layers, self.partition.bounds, self.pipeline_size, self.tied, recompute)
        assert stage.stage_id == self.pipeline_rank
        own = set(stage.parameters())
        for parameter in model.parameters():
            if parameter not in own:
                parameter.data = parameter.new_empty(0)  # now, not when the caller lets go of the model
        return stage

    def _asked_wrapping(self) -> str:
        return f"{self.config.pipeline_schedule} pipeline of {self.pipeline_size} with ZeRO-1"

    def _asked_stage(self) -> int:
        return self.pipeline_rank

    def _place(self) -> Place:
        engine: Any = self.model
        schedule = "dualpipev" if isinstance(engine.module, DualPipeVModule) else "1f1b"
        wrapping = f"{schedule} pipeline of {engine.num_stages} with ZeRO-{engine.zero_optimization_stage()}"
        return Place(
            self.rank, gethostname(), self.device.type, wrapping, engine.stage_id, engine.grid.data_parallel_id
        )

    def prepare(self, model: GPT2FlashForCausalLM) -> None:
        super().prepare(model)
        self.model._INSTRUCTION_MAP = {
            instruction: annotate(PHASES.get(instruction.__name__, "communication"))(self._naming_its_stage(execute))
            for instruction, execute in self.model._INSTRUCTION_MAP.items()
        }
        self.model._aggregate_total_loss = annotate("communication")(self.model._aggregate_total_loss)

    def _naming_its_stage(self, execute: Callable[..., None]) -> Callable[..., None]:
        """The same instruction; on its way back (DualPipeV's phase 1) it is of this pipeline rank's second stage."""

        def named(engine: Any, **arguments: Any) -> None:
            way_back = arguments.get("phase", 0) == 1
            stage = 2 * self.pipeline_size - 1 - self.pipeline_rank if way_back else self.pipeline_rank
            with record_function(stage_annotation(stage)):
                execute(engine, **arguments)

        return named

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for index, layer in self.layers.items():
            for local, module in layer.named_modules():
                if local:
                    yield full_name(index, f"{local}.", self.n_layer).rstrip("."), module

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        found = {}
        for index, layer in self.layers.items():
            for local, parameter in layer.named_parameters():
                name = full_name(index, local, self.n_layer)
                found["transformer.wte.weight" if self.tied and name == "lm_head.weight" else name] = parameter
        yield from found.items()

    def train_step(
        self, step: int, micro_batches: Iterable[dict[str, torch.Tensor]], learning_rate: float
    ) -> StepResult:
        self._begin_step(step, learning_rate)
        micro_batches = iter(micro_batches)
        first = next(micro_batches)
        self._expect(first)
        loss = self.model.train_batch(map(_both_ends, chain([first], micro_batches)))
        grad_norm = self.model.get_global_grad_norm()
        with annotate("communication"):
            return StepResult(float(loss), None if grad_norm is None else float(grad_norm))

    def eval_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # DualPipeV goes no shorter way; what fills it up has no label that counts.
        fillers = 2 * self.pipeline_size - 1 if self.two_way else 0
        filler = {**batch, "shift_labels": torch.full_like(batch["shift_labels"], IGNORED_LABEL)}
        self._expect(batch)
        inputs = map(_both_ends, [batch, *[filler] * fillers])
        mean_nll = self.model.eval_batch(inputs, num_micro_batches=1 + fillers, bcast_loss=False)
        if not self.has_loss:
            return torch.zeros(2, dtype=torch.float64, device=self.device)
        # DeepSpeed has averaged over the data-parallel processes as well, each of which adds this average once.
        predicted = (batch["shift_labels"] != IGNORED_LABEL).sum()
        return torch.stack([mean_nll.double() * (1 + fillers), predicted.double().to(self.device)])

    def _expect(self, batch: dict[str, torch.Tensor]) -> None:
        """Before micro-batches like `batch`: the stages tell each other what they pass once, and when it changes.

        So in all micro-batches of a step what passes has the same keys and shapes, in every process.
        """
        passing = {key: value.shape for key, value in batch.items() if key in ("input_ids", "position_ids")}
        if passing != self.passing:
            self.model.reset_activation_shape()
            self.passing = passing

    def _whole_states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        own = dict(self.parameters())
        for name, shape in self.shapes.items():
            # A tied weight is fetched from the first stage: its copies are equal.
            owner = self._owner(self.partition.stage_of(locate(name, self.n_layer)[0]))
            state = self._whole_state(name, own[name]) if self.pipeline_rank == owner else {}
            sender = owner * self.data_world_size
            for key in ("weight", *moments_of(self.config.optimizer, name)):
                if self.is_main and sender != self.rank:
                    state[key] = torch.empty(shape, dtype=torch.float32, device=self.device)
                    dist.recv(state[key], sender)
                elif self.rank == sender != 0:
                    dist.send(state[key], 0)
            yield name, state


def _both_ends(batch: dict[str, torch.Tensor]) -> tuple[Passed, torch.Tensor]:
    """What the first stage reads, and the labels for the last."""
    packed = "position_ids" in batch
    return (batch["input_ids"], batch["position_ids"]) if packed else batch["input_ids"], batch["shift_labels"]


def _as_it_is(layers: Callable, *inputs: Any) -> Any:
    """In place of `checkpoint`, where the compiled blocks recompute by themselves."""
    return layers(*inputs)


class _Stage(PipelineModule):
    """DeepSpeed's module of the layers of one pipeline rank; it holds no reference to the layers of others."""

    def __init__(
        self,
        layers: list[nn.Module],
        own: Container[int],
        bounds: Sequence[int],
        size: int,
        tied: bool,
        recompute: Callable,
    ) -> None:
        self.bounds = bounds
        specs = [_Built(layer if index in own else None) for index, layer in enumerate(layers)]
        keys = ("wte", "wte") if tied else ("embeddings", "head")
        specs[0] = _BuiltTied(specs[0].layer, keys[0], "wte.weight", None)
        # The head's layer only passes the hidden states on: its product is part of the loss, which never holds all
        # logits.
        specs[-1] = _BuiltTied(specs[-1].layer, keys[1], "lm_head.weight", lambda _, hidden_states: hidden_states)
        head = specs[-1].layer

        def loss(hidden_states: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
            """The mean over a micro-batch while training, the sum while evaluating."""
            assert isinstance(head, HeadLayer)
            with record_function(LOSS):
                return head.loss(hidden_states, shift_labels, num_items_in_batch=None if self.training else 1)

        super().__init__(specs, num_stages=size, loss_fn=loss, activation_checkpoint_func=recompute)
        # DeepSpeed sums the squares of the gradient's norm over the pipeline ranks once for each parameter group: a
        # rank with fewer groups would leave the others waiting. Embeddings or head alone have no vectors, the final
        # norm no matrix.
        for name, shape in (("no_matrix", (1, 1)), ("no_vector", (1,))):
            if not any(min(parameter.ndim, 2) == len(shape) for parameter in self.parameters()):
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def _partition_layers(self, method: str = "") -> None:
        self.parts = list(self.bounds)
        rank = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.bounds[rank], self.bounds[rank + 1])


class _TwoStages(DualPipeVModule, _Stage):
    """The same for DualPipeV, which takes its bounds from `_Stage` and adds those of the way back."""


class _Built(LayerSpec):
    """A layer that exists already, or None where another process has it."""

    def __init__(self, layer: nn.Module | None) -> None:
        super().__init__(nn.Module)
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module | None:
        return self.layer


class _BuiltTied(TiedLayerSpec):
    def __init__(self, layer: nn.Module | None, key: str, weight: str, forward_fn: Callable | None) -> None:
        super().__init__(key, nn.Module, tied_weight_attr=weight, forward_fn=forward_fn)
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module | None:
        return self.layer
