"""The partition of a model's layers into the stages of a pipeline."""

import functools
import itertools
from operator import itemgetter
from typing import NamedTuple

from transformers.configuration_utils import PreTrainedConfig

from modeling_gpt2flash.pipeline import layer_names
from train.metrics.flops import forward_flops
from train.utils.tables import markdown_table

PARTITION_METHODS = ("uniform", "parameters", "cost")


def layer_flops(n_layer: int, n_embd: int, n_inner: int | None, vocab_size: int, block_size: int) -> list[int]:
    """Forward FLOPs of each layer for one token in a sequence of `block_size`.

    The backward pass costs twice that in every layer, so the shares are the same.
    """
    forward = forward_flops(n_embd, n_inner, vocab_size, block_size)
    embeddings, norm = 2 * n_embd, 8 * n_embd  # elementwise operations, so that no layer costs nothing
    return [embeddings, *[forward.block_matmuls + forward.attention] * n_layer, norm, forward.head]


def parameter_counts(n_layer: int, n_embd: int, n_inner: int | None, vocab_size: int, n_positions: int) -> list[int]:
    """Parameters of each layer; a tied weight is counted in both layers, since both stages have a copy.

    A block has the matrices c_attn 3 E², attn.c_proj E², and the MLP's two E · I; biases 3 E + E + I + E; and two
    norms of 2 E.
    """
    inner = 4 * n_embd if n_inner is None else n_inner
    block = 4 * n_embd**2 + 2 * n_embd * inner + 9 * n_embd + inner
    return [(vocab_size + n_positions) * n_embd, *[block] * n_layer, 2 * n_embd, vocab_size * n_embd]


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of a model, with the tied head counted once, in constant time for any number of layers."""
    embeddings, block, norm, _ = parameter_counts(
        1, config.n_embd, config.n_inner, config.vocab_size, config.n_positions
    )
    return embeddings + config.n_layer * block + norm


class Partition(NamedTuple):
    """The layers of each stage, and the sizes that the partition was based on."""

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
        """A table with a line for each stage: its layers, its parameters, and its fraction of the FLOPs."""
        rows = []
        for stage in range(self.stages):
            own = self.layers(stage)
            first, last = self.names[own[0]], self.names[own[-1]]
            rows.append((
                str(stage),
                first if len(own) == 1 else f"{first} ... {last}",
                f"{sum(self.parameters[layer] for layer in own):,}",
                f"{sum(self.flops[layer] for layer in own) / sum(self.flops):.1%}",
            ))  # fmt: skip
        table = markdown_table(["stage", "layers", "parameters", "FLOPs"], rows)
        return f"pipeline of {self.stages} stages, partition {self.method}\n{table}"


def partition(
    config: PreTrainedConfig, stages: int, method: str | list[int] = "cost", *, block_size: int | None = None
) -> Partition:
    """Split the layers into `stages` so that the largest stage is as small as possible.

    By `method` the size of a stage is "uniform": its number of layers; "parameters": their number; "cost": its FLOPs
    in a sequence of `block_size` (default: the model's positions), of which GPT-2's head has as many as several
    blocks. `method` may also be the number of layers of each stage, at least 1.

    Raises:
        ValueError: naming the wrong number and the remedy.
    """
    names = layer_names(config.n_layer)
    sizes = (config.n_layer, config.n_embd, config.n_inner, config.vocab_size)
    parameters = parameter_counts(*sizes, config.n_positions)
    flops = layer_flops(*sizes, config.n_positions if block_size is None else block_size)
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
        bounds = balance({"uniform": [1] * len(names), "parameters": parameters, "cost": flops}[method], stages)
    else:
        bounds = _explicit_bounds(method, stages, len(names))
        method = str(method)
    return Partition(method, bounds, tuple(names), tuple(parameters), tuple(flops))


def _explicit_bounds(counts: list[int], stages: int, layers: int) -> tuple[int, ...]:
    if len(counts) != stages:
        raise ValueError(f"The partition {counts} lists {len(counts)} stages, but there are {stages}: list each once.")
    if any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"The partition {counts} needs a whole number of layers for every stage, at least 1.")
    if sum(counts) != layers:
        raise ValueError(
            f"The partition {counts} sums to {sum(counts)}, but there are {layers} layers: embeddings, "
            f"{layers - 3} blocks, final norm and head."
        )
    return tuple(sum(counts[:stage]) for stage in range(stages + 1))


def balance(sizes: list[int], parts: int) -> tuple[int, ...]:
    """Bounds of the contiguous split into non-empty parts with the smallest maximum, by dynamic programming.

    Of several such splits, the one with the smallest second largest part, and so on.
    """
    assert 1 <= parts <= len(sizes)
    sums = [0, *itertools.accumulate(sizes)]

    @functools.cache
    def best(stop: int, parts: int) -> tuple[list[int], tuple[int, ...]]:
        """The best split of sizes[:stop]: the sizes of its parts, largest first, and its bounds."""
        if parts == 1:
            return [sums[stop]], (0, stop)
        splits = []
        for start in range(parts - 1, stop):
            before, bounds = best(start, parts - 1)
            splits.append((sorted([*before, sums[stop] - sums[start]], reverse=True), (*bounds, stop)))
        return min(splits, key=itemgetter(0))

    return best(len(sizes), parts)[1]
