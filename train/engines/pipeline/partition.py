"""The partition of a model's layers into the stages of a pipeline."""

import math
from typing import NamedTuple

from transformers.configuration_utils import PreTrainedConfig

from modeling_gpt2flash.pipeline import layer_names
from train.metrics.flops import forward_flops

PARTITION_METHODS = ("uniform", "parameters", "cost")


def layer_flops(config: PreTrainedConfig, block_size: int) -> list[int]:
    """Forward FLOPs of each layer for one token in a sequence of `block_size`.

    The backward pass costs twice that in every layer, so the shares are the same.
    """
    width = config.n_embd
    forward = forward_flops(width, config.n_inner, config.vocab_size, block_size)
    embeddings, norm = 2 * width, 8 * width  # elementwise operations, so that no layer costs nothing
    return [embeddings, *[forward.block_matmuls + forward.attention] * config.n_layer, norm, forward.head]


def parameter_counts(config: PreTrainedConfig) -> list[int]:
    """Parameters of each layer; a tied weight is counted in both layers, since both stages have a copy."""
    width, vocabulary = config.n_embd, config.vocab_size
    inner = config.n_inner if config.n_inner is not None else 4 * width
    block = 4 * width**2 + 4 * width + 2 * width * inner + inner + width + 4 * width
    return [(vocabulary + config.n_positions) * width, *[block] * config.n_layer, 2 * width, vocabulary * width]


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
    """Split the layers into `stages` so that the largest stage is as small as possible.

    Args:
        config: of the model.
        stages: their number; each gets at least one layer.
        method: the size of a stage. "uniform": its number of layers; "parameters": their number; "cost": its FLOPs, of
            which GPT-2's head has as many as several blocks. Or the number of layers of each stage.
        block_size: tokens in a sequence, for the cost of attention; None: the model's positions.

    Raises:
        ValueError: naming the wrong number and the remedy.
    """
    names = layer_names(config.n_layer)
    parameters = parameter_counts(config)
    flops = layer_flops(config, config.n_positions if block_size is None else block_size)
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
    """Bounds of the contiguous split into non-empty parts with the smallest maximum, by dynamic programming.

    Of several such splits, the most even one: that with the smallest sum of squares.
    """
    sums = [0]
    for size in sizes:
        sums.append(sums[-1] + size)

    def solve(limit: float) -> tuple[float, tuple[int, ...]]:
        """The best objective and its bounds: the maximum if `limit` is infinite, else the sum of squares within it."""
        # best[stop]: of the splits of sizes[:stop] into as many parts as rounds so far.
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
