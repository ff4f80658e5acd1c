"""The engine of pipeline layouts, with or without data parallelism, on DeepSpeed's pipeline engine.

With D data-parallel processes, global rank r is data-parallel rank r mod D of pipeline rank r // D. Under 1F1B,
pipeline rank p has stage p. Under DualPipeV there are twice as many stages as pipeline ranks, and p has stage p (its
first chunk) and stage 2 * pipeline ranks - 1 - p (its second chunk). The first stage reads the tokens, the last one
the labels; hidden states are sent to the next stage and their gradients to the previous one.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from deepspeed.pipe import DualPipeVModule
from torch import distributed as dist
from torch import nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from modeling_gpt2flash import GPT2FlashForCausalLM
from modeling_gpt2flash.pipeline import Passed, full_name, is_tied, locate, model_layers
from train.config.run_config import RunConfig
from train.data.batches import IGNORED_LABEL
from train.engines import zero
from train.engines.base import Engine
from train.engines.pipeline.partition import Partition
from train.engines.pipeline.stage_module import EMBEDDINGS, HEAD, DualPipeVStageModule, StageModule
from train.engines.transforms import checkpoint_arguments
from train.metrics.annotations import Phase, annotate, stage_annotation
from train.optim.parameter_groups import moments_of

# The phases of the instructions in DeepSpeed's schedules; all others send, receive or reduce.
PHASES: dict[str, Phase] = {
    "LoadMicroBatch": "data",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "OptimizerStep": "optimizer",
}


class PipelinedEngine(Engine):
    """The stages of one pipeline rank; losses, norms and state are those of the full model."""

    def __init__(self, config: RunConfig, deepspeed: dict[str, Any], partition: Partition) -> None:
        super().__init__(config, deepspeed)
        self.partition = partition
        self.pipeline_size = config.pipeline_stages
        self.dualpipev = config.pipeline_schedule == "dualpipev"
        assert partition.stages == self.pipeline_size * (2 if self.dualpipev else 1)
        self.data_world_size = self.world_size // self.pipeline_size
        self.pipeline_rank, self.data_rank = divmod(self.rank, self.data_world_size)
        self.has_loss = self.pipeline_rank == self._rank_of(partition.bounds[-1] - 1)
        self.shapes_sent: dict[str, torch.Size] = {}
        self.forward_passes: Counter[int] = Counter()  # of each stage in this step: a stage takes them in order

    def _rank_of(self, layer: int) -> int:
        """The pipeline rank that has a layer."""
        stage = self.partition.stage_of(layer)
        return min(stage, self._second_chunk(stage)) if self.dualpipev else stage

    def _second_chunk(self, pipeline_rank: int) -> int:
        """The stage that is DualPipeV's second chunk on a pipeline rank."""
        return 2 * self.pipeline_size - 1 - pipeline_rank

    def _build_module(self, model: GPT2FlashForCausalLM) -> nn.Module:
        layers = model_layers(model)
        self.n_layer = model.config.n_layer
        self.tied = is_tied(model)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.layers = {
            index: layer for index, layer in enumerate(layers) if self._rank_of(index) == self.pipeline_rank
        }
        # Not DeepSpeed's own checkpoint function, which needs inputs with gradients: tokens have none. The interval is
        # in the JSON.
        recompute = partial(checkpoint, **checkpoint_arguments(self.config.activation_checkpointing))
        # DeepSpeed prints random seeds that nothing here uses, and broadcasts the tied weight while autograd records.
        with contextlib.redirect_stdout(None), torch.no_grad():
            module = (DualPipeVStageModule if self.dualpipev else StageModule)(
                [self.layers.get(index) for index in range(len(layers))],
                self.partition.bounds,
                self.pipeline_size,
                self.tied,
                _call if self.compiles_checkpointing else recompute,
                self.losses,
            )
        assert module.stage_id == self.pipeline_rank
        own = set(module.parameters())
        for parameter in model.parameters():
            if parameter not in own:
                parameter.data = parameter.new_empty(0)  # free it before the caller releases the model
        return module

    def _requested_wrapping(self) -> str:
        return f"{self.config.pipeline_schedule} pipeline of {self.pipeline_size} with {zero.name(1, offload=False)}"

    def _placement(self) -> tuple[str, int, int]:
        engine: Any = self.model
        schedule = "dualpipev" if isinstance(engine.module, DualPipeVModule) else "1f1b"
        inner = zero.name(engine.zero_optimization_stage(), offload=False)
        wrapping = f"{schedule} pipeline of {engine.num_stages} with {inner}"
        return wrapping, engine.stage_id, engine.grid.data_parallel_id

    def prepare(self, model: GPT2FlashForCausalLM) -> None:
        super().prepare(model)
        self.model._INSTRUCTION_MAP = {
            instruction: annotate(PHASES.get(instruction.__name__, "communication"))(
                self._in_stage(execute, is_forward=instruction.__name__ == "ForwardPass")
            )
            for instruction, execute in self.model._INSTRUCTION_MAP.items()
        }
        # DeepSpeed sends the loss to all stages after the update; the review needs it before.
        self.aggregate_loss = self.model._aggregate_total_loss
        self.model._aggregate_total_loss = lambda: self.mean_loss

    def _in_stage(self, execute: Callable[..., None], is_forward: bool) -> Callable[..., None]:
        """The same instruction, annotated with its stage, whose dropout is seeded before each forward pass."""

        def execute_in_stage(engine: Any, **arguments: Any) -> None:
            second = arguments.get("phase", 0) == 1  # DualPipeV's second chunk
            stage = self._second_chunk(self.pipeline_rank) if second else self.pipeline_rank
            if is_forward:
                self.seed_dropout(self.forward_passes[stage], stage)
                self.forward_passes[stage] += 1
            with record_function(stage_annotation(stage)):
                execute(engine, **arguments)

        return execute_in_stage

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for index, layer in self.layers.items():
            for local, module in layer.named_modules():
                if local:
                    yield full_name(index, f"{local}.", self.n_layer).rstrip("."), module

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        found = {}  # DualPipeV's first rank has both layers of a tied weight
        for index, layer in self.layers.items():
            for local, parameter in layer.named_parameters():
                name = full_name(index, local, self.n_layer)
                found[EMBEDDINGS if self.tied and name == HEAD else name] = parameter
        yield from found.items()

    def _compute_step(self, micro_batches: Iterable[dict[str, torch.Tensor]]) -> None:
        self.forward_passes.clear()
        micro_batches = iter(micro_batches)
        first = next(micro_batches)
        self._reset_changed_shapes(first)
        self.model.train_batch(map(_inputs_and_labels, chain([first], micro_batches)))

    def _gather_losses(self, requests: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        asked = torch.stack(requests) if requests else torch.empty(0, device=self.device)
        dist.all_reduce(asked)
        self.mean_loss = self.aggregate_loss()
        return self.mean_loss, list(asked)

    def eval_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # DualPipeV needs two micro-batches per pipeline rank; the others are fillers without labels.
        fillers = 2 * self.pipeline_size - 1 if self.dualpipev else 0
        filler = {**batch, "shift_labels": torch.full_like(batch["shift_labels"], IGNORED_LABEL)}
        self._reset_changed_shapes(batch)
        inputs = map(_inputs_and_labels, [batch, *[filler] * fillers])
        mean_nll = self.model.eval_batch(inputs, num_micro_batches=1 + fillers, bcast_loss=False)
        if not self.has_loss:
            return torch.zeros(2, dtype=torch.float64, device=self.device)
        # DeepSpeed has averaged over the data-parallel processes as well, each of which adds this average once.
        predicted = (batch["shift_labels"] != IGNORED_LABEL).sum()
        return torch.stack([mean_nll.double() * (1 + fillers), predicted.double().to(self.device)])

    def _reset_changed_shapes(self, batch: dict[str, torch.Tensor]) -> None:
        """Make the stages exchange the shapes of what they send again, if those of `batch` differ from the last ones.

        All micro-batches of a step must have the same keys and shapes, in every process.
        """
        shapes = {key: value.shape for key, value in batch.items() if key in ("input_ids", "position_ids")}
        if shapes != self.shapes_sent:
            self.model.reset_activation_shape()
            self.shapes_sent = shapes

    def _full_states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        own = dict(self.parameters())
        for name, shape in self.shapes.items():
            # A tied weight comes from the first stage: its copies are equal.
            owner = self._rank_of(locate(name, self.n_layer)[0])
            state = self._full_state(name, own[name]) if self.pipeline_rank == owner else {}
            sender = owner * self.data_world_size
            for key in ("weight", *moments_of(self.config.optimizer, name)):
                if self.is_main and sender != self.rank:
                    state[key] = torch.empty(shape, dtype=torch.float32, device=self.device)
                    dist.recv(state[key], sender)
                elif self.rank == sender != 0:
                    dist.send(state[key], 0)
            yield name, state


def _inputs_and_labels(batch: dict[str, torch.Tensor]) -> tuple[Passed, torch.Tensor]:
    """The input of the first stage, and the labels of the last."""
    packed = "position_ids" in batch
    return (batch["input_ids"], batch["position_ids"]) if packed else batch["input_ids"], batch["shift_labels"]


def _call(layers: Callable, *inputs: Any) -> Any:
    """In place of `checkpoint`, where the compiled blocks recompute by themselves."""
    return layers(*inputs)
