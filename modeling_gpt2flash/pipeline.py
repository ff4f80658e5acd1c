"""The model as a list of layers for pipeline stages, and the layer of each parameter.

    0             embeddings    (B, T) tokens -> `Passed`
    1 ... n       blocks        `Passed` -> `Passed`
    n + 1         final norm    `Passed` -> (B, T, D)
    n + 2         head          (B, T, D) -> (B, T, V) logits, or the loss

`Passed` is the hidden states, (B, T, D), or (hidden states, positions) if the caller gave positions, for packed
documents: the attention of every block depends on them.

Shapes: B batch, T positions, D hidden width, V vocabulary.

Only training uses this module: none that is uploaded to the Hub imports it.
"""

from typing import Any

from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from .documents import attention_arguments
from .loss import causal_lm_loss
from .modeling_gpt2flash import GPT2FlashForCausalLM
from .positions import check_length, check_positions, count_positions

Passed = Tensor | tuple[Tensor, Tensor]


class EmbeddingLayer(nn.Module):
    """Token and position embeddings of tokens, or of (tokens, positions)."""

    def __init__(self, model: GPT2FlashForCausalLM) -> None:
        super().__init__()
        self.wte = model.transformer.wte
        self.wpe = model.transformer.wpe
        self.drop = model.transformer.drop

    def forward(self, tokens: Passed) -> Passed:
        """(B, T) tokens, or these and (B, T) positions -> `Passed`."""
        input_ids, position_ids = _unpack(tokens)
        positions = position_ids
        if positions is None:
            check_length(0, input_ids.shape[1], self.wpe.num_embeddings)
            positions = count_positions(input_ids.shape[1], 0, None, input_ids.device)
        else:
            check_positions(positions, self.wpe.num_embeddings)
        return _pack(self.drop(self.wte(input_ids) + self.wpe(positions)), position_ids)


class BlockLayer(nn.Module):
    """One block, and the arguments that tell its attention about packed documents."""

    def __init__(self, block: nn.Module, attention_arguments: "StageAttentionArguments") -> None:
        super().__init__()
        self.block = block
        self.attention_arguments = attention_arguments

    def forward(self, passed: Passed) -> Passed:
        """`Passed` -> `Passed`."""
        hidden_states, position_ids = _unpack(passed)
        arguments = self.attention_arguments(hidden_states, position_ids)
        hidden_states = self.block(hidden_states, use_cache=False, **arguments)
        return _pack(hidden_states, position_ids)


class StageAttentionArguments:
    """`attention_arguments` for the blocks of a stage, computed once for the positions that all of them receive.

    Computing them waits for the device and may make a mask.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.positions: Tensor | None = None
        self.arguments: dict[str, Any] = {}

    def __call__(self, hidden_states: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
        if position_ids is None or position_ids is not self.positions:
            self.arguments = attention_arguments(self.config, hidden_states, position_ids)
            self.positions = position_ids
        return self.arguments


class FinalNormLayer(nn.Module):
    """The norm after the last block; it drops the positions."""

    def __init__(self, model: GPT2FlashForCausalLM) -> None:
        super().__init__()
        self.ln_f = model.transformer.ln_f

    def forward(self, passed: Passed) -> Tensor:
        """`Passed` -> (B, T, D)."""
        return self.ln_f(_unpack(passed)[0])


class HeadLayer(nn.Module):
    """The projection onto the vocabulary. Its weight may be tied to the first layer's token embeddings."""

    def __init__(self, model: GPT2FlashForCausalLM) -> None:
        super().__init__()
        self.lm_head = model.lm_head
        self.chunk_size = model._chunk_size()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, V)."""
        return self.lm_head(hidden_states)

    def loss(
        self, hidden_states: Tensor, shift_labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """(B, T, D), (B, T) -> (): the loss of the full model's forward with `skip_logits`."""
        return causal_lm_loss(
            hidden_states,
            self.lm_head.weight,
            None,
            shift_labels=shift_labels,
            num_items_in_batch=num_items_in_batch,
            chunk_size=self.chunk_size,
        )


def _unpack(passed: Passed) -> tuple[Tensor, Tensor | None]:
    return passed if isinstance(passed, tuple) else (passed, None)


def _pack(hidden_states: Tensor, position_ids: Tensor | None) -> Passed:
    return hidden_states if position_ids is None else (hidden_states, position_ids)


def model_layers(model: GPT2FlashForCausalLM) -> list[nn.Module]:
    """The layers in order, sharing the model's own modules and parameters."""
    arguments = StageAttentionArguments(model.config)
    blocks = [BlockLayer(block, arguments) for block in model.transformer.h]
    return [EmbeddingLayer(model), *blocks, FinalNormLayer(model), HeadLayer(model)]


def is_tied(model: GPT2FlashForCausalLM) -> bool:
    return model.lm_head.weight is model.transformer.wte.weight


def layer_names(n_layer: int) -> list[str]:
    return ["embeddings", *(f"block {index}" for index in range(n_layer)), "final norm", "head"]


def locate(name: str, n_layer: int) -> tuple[int, str]:
    """GPT-2's name of a parameter -> (its layer, its name within the layer).

    A tied head has no name in GPT-2's checkpoints: `transformer.wte.weight` is in layer 0, and `lm_head.weight` is the
    name of the last layer's copy.
    """
    match name.split(".", 3):
        case ["transformer", ("wte" | "wpe"), "weight"]:
            return 0, name.removeprefix("transformer.")
        case ["transformer", "h", index, rest] if index.isdecimal() and int(index) < n_layer:
            return 1 + int(index), f"block.{rest}"
        case ["transformer", "ln_f", ("weight" | "bias")]:
            return n_layer + 1, name.removeprefix("transformer.")
        case ["lm_head", "weight"]:
            return n_layer + 2, name
    raise ValueError(f"{name!r} is not a parameter of a GPT-2 of {n_layer} blocks.")


def full_name(layer: int, name: str, n_layer: int) -> str:
    """The inverse of `locate`."""
    if not 0 <= layer < n_layer + 3:
        raise ValueError(f"There is no layer {layer}: a GPT-2 of {n_layer} blocks has {n_layer + 3}, counted from 0.")
    if layer == n_layer + 2:
        return name
    if 1 <= layer <= n_layer:
        return f"transformer.h.{layer - 1}.{name.removeprefix('block.')}"
    return f"transformer.{name}"
