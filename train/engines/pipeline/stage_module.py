"""The layers of one pipeline rank as the module that DeepSpeed's pipeline engine runs.

GPT-2's tied weight: the token embeddings of the first stage are also the head of the last. Each of the two stages has
a copy. DeepSpeed sums their gradients, so the copies stay equal; with one stage on both ends (DualPipeV) both layers
share the copy. Checkpoints have the weight once, under the name of the embeddings.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.pipe import DualPipeVModule, PipelineModule, TiedLayerSpec
from torch import nn
from torch.profiler import record_function

from modeling_gpt2flash.pipeline import HeadLayer
from train.metrics.annotations import LOSS

EMBEDDINGS, HEAD = "transformer.wte.weight", "lm_head.weight"


class StageModule(PipelineModule):
    """The layers of one pipeline rank; it has no reference to the layers of others.

    Args:
        layers: those of the model in order, None where another pipeline rank has it.
        bounds: the first layer of each stage, and the number of layers.
        size: the number of pipeline ranks.
        tied: whether embeddings and head share their weight.
        checkpoint: how DeepSpeed calls layers whose activations are recomputed.
        losses: where the last stage puts the loss of each micro-batch that it trains on.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module | None],
        bounds: Sequence[int],
        size: int,
        tied: bool,
        checkpoint: Callable,
        losses: list[torch.Tensor],
    ) -> None:
        self.bounds = bounds
        embeddings, *blocks_and_norm, head = layers

        def loss(hidden_states: torch.Tensor, shift_labels: torch.Tensor) -> torch.Tensor:
            """The mean over a micro-batch while training, the sum while evaluating."""
            assert isinstance(head, HeadLayer)
            with record_function(LOSS):
                result = head.loss(hidden_states, shift_labels, num_items_in_batch=None if self.training else 1)
            if self.training:
                losses.append(result.detach())
            return result

        keys = ("wte", "wte") if tied else ("embeddings", "head")
        specs = [
            _PrebuiltTiedLayer(embeddings, keys[0], "wte.weight"),
            *blocks_and_norm,
            # Its matmul is part of the loss, which never holds all logits.
            _PrebuiltTiedLayer(head, keys[1], HEAD, lambda _, hidden_states: hidden_states),
        ]
        super().__init__(specs, num_stages=size, loss_fn=loss, activation_checkpoint_func=checkpoint)
        # DeepSpeed computes the norm of the gradient with one collective for each parameter group: a rank with fewer
        # groups would make the others wait forever. Embeddings or head alone have no vector, the final norm no matrix.
        for name, shape in (("no_matrix", (1, 1)), ("no_vector", (1,))):
            if not any(min(parameter.ndim, 2) == len(shape) for parameter in self.parameters()):
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def _partition_layers(self, method: str = "") -> None:
        self.parts = list(self.bounds)
        rank = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.bounds[rank], self.bounds[rank + 1])


class DualPipeVStageModule(DualPipeVModule, StageModule):
    """The same for DualPipeV, which takes the bounds of the first chunk from `StageModule` and adds the second's."""


class _PrebuiltTiedLayer(TiedLayerSpec):
    """DeepSpeed's description of a layer whose `weight` is shared by all layers of the same key.

    `layer` is None where another process has it.
    """

    def __init__(
        self, layer: nn.Module | None, key: str, weight: str, forward_fn: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(key, nn.Module, tied_weight_attr=weight, forward_fn=forward_fn)
        self.layer = layer

    def build(self, log: bool = False) -> nn.Module | None:
        return self.layer
