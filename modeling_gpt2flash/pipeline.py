"""The model cut into stages: an ordered list of layers, where each parameter lives, and how to share layers out.

    0             embeddings    (B, T) tokens -> what passes between stages
    1 ... n       blocks        what passes -> what passes
    n + 1         final norm    what passes -> (B, T, D)
    n + 2         head          (B, T, D) -> (B, T, V) logits, or the loss

What passes between stages is the hidden states, (B, T, D); where the caller gave positions, for packed documents, it
is (hidden states, positions), for the attention of every block depends on them.

Shapes: B batch, T positions, D hidden width, V vocabulary.

For training alone: no module that travels to the Hub imports this one.
"""

import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from .documents import attention_arguments
from .loss import causal_lm_loss
from .modeling_gpt2flash import GPT2FlashForCausalLM
from .positions import check_length, check_positions, count_positions

PARTITION_METHODS = ("uniform", "parameters", "cost")

Passed = Tensor | tuple[Tensor, Tensor]


class EmbeddingLayer(nn.Module):
    """Tokens, alone or with their positions, to what the first block reads."""

    def __init__(self, model: GPT2FlashForCausalLM) -> None:
        super().__init__()
        self.wte = model.transformer.wte
        self.wpe = model.transformer.wpe
        self.drop = model.transformer.drop

    def forward(self, tokens: Passed) -> Passed:
        """(B, T), or that and positions (B, T), -> what passes."""
        input_ids, position_ids = _unpack(tokens)
        if position_ids is None:
            check_length(0, input_ids.shape[1], self.wpe.num_embeddings)
            hidden_states = self.wte(input_ids) + self.wpe(
                count_positions(input_ids.shape[1], 0, None, input_ids.device)
            )
        else:
            check_positions(position_ids, self.wpe.num_embeddings)
            hidden_states = self.wte(input_ids) + self.wpe(position_ids)
        return _pack(self.drop(hidden_states), position_ids)


class BlockLayer(nn.Module):
    """One block, and what its attention is told of the documents."""

    def __init__(self, block: nn.Module, tell: "Telling") -> None:
        super().__init__()
        self.block = block
        self.tell = tell

    def forward(self, passed: Passed) -> Passed:
        """What passes -> what passes."""
        hidden_states, position_ids = _unpack(passed)
        hidden_states = self.block(hidden_states, use_cache=False, **self.tell(hidden_states, position_ids))
        return _pack(hidden_states, position_ids)


class Telling:
    """`attention_arguments` for the blocks of a stage, worked out by the first that is handed some positions.

    The others are handed the same tensor: working it out waits for the device and may make a mask.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config
        self.positions: Tensor | None = None
        self.told: dict[str, Any] = {}

    def __call__(self, hidden_states: Tensor, position_ids: Tensor | None) -> dict[str, Any]:
        if position_ids is None or position_ids is not self.positions:
            self.told = attention_arguments(self.config, hidden_states, position_ids)
            self.positions = position_ids
        return self.told


class FinalNormLayer(nn.Module):
    """The norm behind the last block; positions end here."""

    def __init__(self, model: GPT2FlashForCausalLM) -> None:
        super().__init__()
        self.ln_f = model.transformer.ln_f

    def forward(self, passed: Passed) -> Tensor:
        """What passes -> (B, T, D)."""
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
        """(B, T, D), (B, T) -> (): as the whole model's forward computes it with `skip_logits`."""
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
    tell = Telling(model.config)
    blocks = [BlockLayer(block, tell) for block in model.transformer.h]
    return [EmbeddingLayer(model), *blocks, FinalNormLayer(model), HeadLayer(model)]


def is_tied(model: GPT2FlashForCausalLM) -> bool:
    return model.lm_head.weight is model.transformer.wte.weight


def layer_names(n_layer: int) -> list[str]:
    return ["embeddings", *(f"block {index}" for index in range(n_layer)), "final norm", "head"]


def locate(name: str, n_layer: int) -> tuple[int, str]:
    """GPT-2's name of a parameter -> (its layer, its name within the layer).

    A tied head has no name of its own in GPT-2: `transformer.wte.weight` is at home in layer 0, and `lm_head.weight`
    names the copy that the last layer works with.
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
    raise ValueError(f"{name!r} is no parameter of a GPT-2 of {n_layer} blocks.")


def full_name(layer: int, name: str, n_layer: int) -> str:
    """The inverse of `locate`."""
    if not 0 <= layer < n_layer + 3:
        raise ValueError(f"There is no layer {layer}: a GPT-2 of {n_layer} blocks has {n_layer + 3}, counted from 0.")
    if layer == n_layer + 2:
        return name
    if 1 <= layer <= n_layer:
        return f"transformer.h.{layer - 1}.{name.removeprefix('block.')}"
    return f"transformer.{name}"


def forward_flops(config: PreTrainedConfig, block_size: int) -> list[int]:
    """Floating-point operations of each layer for one token in a sequence of `block_size`, forward only.

    A product with a matrix of P numbers costs 2P. Backward is twice that for every layer, so the shares are the same.
    """
    width, vocabulary = config.n_embd, config.vocab_size
    inner = config.n_inner if config.n_inner is not None else 4 * width
    # c_attn and c_proj 2 * (3 + 1) * D**2, the MLP 2 * 2 * D * I (24 * D**2 in all for I = 4D), and scores and
    # weighted values 2 * T * D each.
    block = 8 * width**2 + 4 * width * inner + 4 * block_size * width
    return [2 * width, *[block] * config.n_layer, 8 * width, 2 * vocabulary * width]


def parameter_counts(config: PreTrainedConfig) -> list[int]:
    """Numbers that each layer holds; a tied weight is counted in both layers, for both stages hold it."""
    width, vocabulary = config.n_embd, config.vocab_size
    inner = config.n_inner if config.n_inner is not None else 4 * width
    block = 4 * width**2 + 4 * width + 2 * width * inner + inner + width + 4 * width
    return [(vocabulary + config.n_positions) * width, *[block] * config.n_layer, 2 * width, vocabulary * width]


class Partition(NamedTuple):
    """Which stage has which layers, with what that share was judged by."""

    method: str
    bounds: tuple[int, ...]  # stage s has the layers bounds[s] ... bounds[s + 1] - 1
    names: tuple[str, ...]
    parameters: tuple[int, ...]
    flops: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.bounds) - 1

    def layers(self, stage: int) -> range:
        return range(self.bounds[stage], self.bounds[stage + 1])

    def stage_of(self, layer: int) -> int:
        return next(stage for stage in range(self.stages) if layer in self.layers(stage))

    def table(self) -> str:
        """A line a stage: its layers, its parameters, and its share of the arithmetic."""
        rows = [("stage", "layers", "parameters", "FLOPs")]
        for stage in range(self.stages):
            own = self.layers(stage)
            first, last = self.names[own[0]], self.names[own[-1]]
            rows.append((
                str(stage),
                first if len(own) == 1 else f"{first} ... {last}",
                f"{sum(self.parameters[layer] for layer in own):,}",
                f"{sum(self.flops[layer] for layer in own) / sum(self.flops):.1%}",
            ))  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"{a:>{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
        return "\n".join([f"pipeline of {self.stages} stages, partition {self.method}", *lines])


def partition(
    config: PreTrainedConfig, stages: int, method: str | list[int] = "cost", *, block_size: int | None = None
) -> Partition:
    """Share the layers out over `stages` so that the largest stage is as small as can be.

    Args:
        config: of the model.
        stages: how many there are; each gets at least one layer.
        method: what makes a stage large. "uniform": its number of layers; "parameters": what it holds; "cost": the
            modelled arithmetic, in which GPT-2's head is worth several blocks. Or the number of layers of each stage.
        block_size: tokens in a sequence, for the cost of attention; None: the model's positions.

    Raises:
        ValueError: naming the numbers that do not fit, and the remedy.
    """
    names = layer_names(config.n_layer)
    parameters = parameter_counts(config)
    flops = forward_flops(config, config.n_positions if block_size is None else block_size)
    if stages < 1:
        raise ValueError(f"{stages} pipeline stages: ask for at least 1.")
    if stages > len(names):
        raise ValueError(
            f"{stages} pipeline stages for {len(names)} layers ({config.n_layer} blocks, embeddings, final norm, "
            f"head): ask for {len(names)} stages or fewer."
        )
    if isinstance(method, str):
        if method not in PARTITION_METHODS:
            raise ValueError(
                f"Unknown partition {method!r}: choose {', '.join(PARTITION_METHODS)}, or list each stage's layers."
            )
        sizes = {"uniform": [1] * len(names), "parameters": parameters, "cost": flops}[method]
        bounds = balance(sizes, stages)
    else:
        bounds = _explicit_bounds(method, stages, len(names))
        method = str(method)
    return Partition(method, bounds, tuple(names), tuple(parameters), tuple(flops))


def _explicit_bounds(counts: list[int], stages: int, layers: int) -> tuple[int, ...]:
    if len(counts) != stages:
        raise ValueError(f"The partition {counts} lists {len(counts)} stages, but there are {stages}: list each once.")
    if any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"The partition {counts} has to give every stage a whole number of layers, at least 1.")
    if sum(counts) != layers:
        raise ValueError(
            f"The partition {counts} sums to {sum(counts)}, but there are {layers} layers: embeddings, "
            f"{layers - 3} blocks, final norm and head."
        )
    return tuple(sum(counts[:stage]) for stage in range(stages + 1))


def balance(sizes: list[int], parts: int) -> tuple[int, ...]:
    """Bounds of the contiguous split into non-empty parts whose largest part is smallest, by dynamic programming.

    Of the splits that share the smallest maximum, the one with the smallest sum of squares: the evenest.
    """
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)

    def solve(limit: float) -> tuple[float, tuple[int, ...]]:
        """The best objective and its bounds: the maximum itself without a limit, else the squares within it."""
        # best[stop]: over the splits of sizes[:stop] into as many parts as there have been rounds.
        best: list[tuple[float, tuple[int, ...]]] = [(0, (0,))] + [(math.inf, ())] * len(sizes)
        for _ in range(parts):
            grown: list[tuple[float, tuple[int, ...]]] = [(math.inf, ())] * (len(sizes) + 1)
            for stop in range(1, len(sizes) + 1):
                for start in range(stop):
                    objective, bounds = best[start]
                    part = sums[stop] - sums[start]
                    if objective == math.inf or part > limit:
                        continue
                    objective = max(objective, part) if limit == math.inf else objective + part**2
                    if objective < grown[stop][0]:
                        grown[stop] = objective, (*bounds, stop)
            best = grown
        return best[-1]

    assert 1 <= parts <= len(sizes)
    smallest_maximum, _ = solve(math.inf)
    return solve(smallest_maximum)[1]


__all__ = [
    "PARTITION_METHODS",
    "BlockLayer",
    "EmbeddingLayer",
    "FinalNormLayer",
    "HeadLayer",
    "Partition",
    "Passed",
    "balance",
    "forward_flops",
    "full_name",
    "is_tied",
    "layer_names",
    "locate",
    "model_layers",
    "parameter_counts",
    "partition",
]
