"""GPT-2's tied weight in a pipeline: the token embeddings of the first stage are also the head of the last.

Each of the two stages has a copy. DeepSpeed sums their gradients, so the copies stay equal; with one stage on both
ends (DualPipeV) both layers share the copy. Checkpoints have the weight once, under the name of the embeddings.
"""

from collections.abc import Callable
from typing import Any

from deepspeed.pipe import TiedLayerSpec
from torch import nn

EMBEDDINGS, HEAD = "transformer.wte.weight", "lm_head.weight"


class PrebuiltTiedLayer(TiedLayerSpec):
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


def first_and_last_layer(
    embeddings: nn.Module | None, head: nn.Module | None, tied: bool
) -> tuple[PrebuiltTiedLayer, PrebuiltTiedLayer]:
    """The layers at both ends of the pipeline; untied ones have different keys.

    The head only passes the hidden states on: its matmul is part of the loss, which never holds all logits.
    """
    keys = ("wte", "wte") if tied else ("embeddings", "head")
    return (
        PrebuiltTiedLayer(embeddings, keys[0], "wte.weight"),
        PrebuiltTiedLayer(head, keys[1], HEAD, lambda _, hidden_states: hidden_states),
    )


def name_in_checkpoint(name: str, tied: bool) -> str:
    return EMBEDDINGS if tied and name == HEAD else name
