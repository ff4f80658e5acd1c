"""How long the stages of a pipeline idle, compared with theory, with layers partitioned evenly or by cost.

    python -m benchmarks.pipeline

In theory, p equal stages idle for (p - 1) / (m + p - 1) of a step of m micro-batches. docs/performance.md describes
what is measured, with emulated devices: a layer takes the time of its modelled FLOPs, and twice that in the backward
pass; the head takes all three parts at once, since the chunked loss computes its gradients in the forward pass. The
idle share is 1 - busy / (p x wall), where busy is the time of the layers. The sides alternate within each round.
"""

import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.arguments import make_parser
from benchmarks.rounds import spread, take_turns
from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from modeling_gpt2flash.pipeline import HeadLayer
from train.checkpoints.loading import model_config
from train.config import deepspeed_config
from train.config.run_config import RunConfig
from train.engines.pipeline.engine import PipelinedEngine
from train.engines.pipeline.partition import Partition, partition
from train.utils.command import run_command
from train.utils.tables import markdown_table

SHAPES = ("gpt2", "gpt2-medium")
METHODS = ("uniform", "cost")
STAGES = (2, 4)
MICRO_BATCHES = (2, 8, 16)
DS_CONFIG = Path(__file__).parent.parent / "ds_configs" / "pipeline.json"
IdleShares = dict[tuple[str, str, int], list[float]]  # of each round, by shape, method and micro-batches
NARROW: dict[str, Any] = {"n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 64, "bos_token_id": 0,
                          "eos_token_id": 0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}  # fmt: skip


class Pace:
    """Extends every layer to its time on the emulated device, and sums these times in `busy`."""

    def __init__(self, engine: PipelinedEngine, seconds: list[float]) -> None:
        """`seconds`: of each layer's forward pass."""
        self.busy = 0.0
        self.started = 0.0
        for index, layer in engine.layers.items():
            if isinstance(layer, HeadLayer):
                layer.loss = partial(self._loss, layer.loss, 3 * seconds[index])  # type: ignore[method-assign]
                continue
            layer.register_forward_pre_hook(self.start)
            layer.register_forward_hook(partial(self.stop, seconds[index]))
            if index > 0:  # tokens have no gradient that would mark the end of the embeddings' backward pass
                layer.register_full_backward_pre_hook(self.start)
                layer.register_full_backward_hook(partial(self.stop, 2 * seconds[index]))

    def start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def stop(self, seconds: float, *_: Any) -> None:
        time.sleep(max(0.0, self.started + seconds - time.perf_counter()))
        self.busy += time.perf_counter() - self.started

    def _loss(self, loss: Callable[..., torch.Tensor], seconds: float, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.start()
        value = loss(*args, **kwargs)
        self.stop(seconds)
        return value


def partition_of(shape: str, stages: int, method: str) -> Partition:
    return partition(model_config(shape, dropout=0.0, loss_chunk_size=512), stages, method)


def build(
    config: RunConfig, deepspeed: dict[str, Any], shape: str, method: str, seconds: float
) -> tuple[PipelinedEngine, Pace]:
    """The engine of this process; an average stage takes `seconds` per micro-batch, forward and backward."""
    stages = config.pipeline_stages
    assert stages is not None
    AcceleratorState._reset_state()  # Accelerate allows one engine per process
    engine = PipelinedEngine(config, copy.deepcopy(deepspeed), partition_of(shape, stages, method))
    flops = engine.partition.flops
    engine.prepare(GPT2FlashForCausalLM(GPT2FlashConfig(n_layer=len(flops) - 3, **NARROW)))
    return engine, Pace(engine, [stages * seconds * layer / (3 * sum(flops)) for layer in flops])


def idle_share(engine: PipelinedEngine, pace: Pace, micro_batches: int) -> float:
    """Of one training step."""
    tokens = torch.ones(1, NARROW["n_positions"], dtype=torch.long)
    engine.model.set_train_batch_size(micro_batches)
    engine.wait()
    pace.busy, started = 0.0, time.perf_counter()
    engine.train_step(0, [{"input_ids": tokens, "shift_labels": tokens}] * micro_batches, 1e-4)
    wall = time.perf_counter() - started
    busy, walls = engine.sum_over_processes(torch.tensor([pace.busy, wall], dtype=torch.float64)).tolist()
    return 1 - busy / walls


def measure(stages: int, rounds: int, seconds: float) -> IdleShares:
    """One process of the pipeline."""
    torch.set_num_threads(1)
    config = RunConfig(
        run_type="optimized",
        deepspeed_config=str(DS_CONFIG),
        pipeline_stages=stages,
        train_micro_batch_size_per_gpu=1,
        learning_rate=1e-4,
        mixed_precision="no",
        report_to="none",
    )
    resolved = deepspeed_config.resolve(config, stages, bf16_is_fast=False)
    engines = {(shape, method): build(*resolved, shape, method, seconds) for shape in SHAPES for method in METHODS}
    sides = {
        (*side, micro_batches): partial(idle_share, *engines[side], micro_batches)
        for micro_batches in MICRO_BATCHES
        for side in engines
    }
    take_turns(sides, rounds=1)  # a warm-up
    found = take_turns(sides, rounds)
    engines[SHAPES[-1], METHODS[-1]][0].close()
    return found


def launch(stages: int, rounds: int, seconds: float) -> IdleShares:
    """What `measure` returns in the first of `stages` processes."""
    config = LaunchConfig(
        1, 1, stages, run_id="stages", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    return elastic_launch(config, measure)(stages, rounds, seconds)[0]


def main() -> None:
    args = make_parser(__doc__, rounds=5, seconds=0.2).parse_args()  # seconds: of a micro-batch in an average stage
    rows = []
    for stages in STAGES:
        found = launch(stages, args.rounds, args.seconds)
        for shape in SHAPES:
            for micro_batches in MICRO_BATCHES:
                theory = (stages - 1) / (micro_batches + stages - 1)
                idle = [spread(found[shape, method, micro_batches], 1, "%") for method in METHODS]
                rows.append([shape, str(stages), str(micro_batches), f"{theory:.1%}", *idle])
    header = ["shape", "stages", "micro-batches", "theory", "uniform, idle (range)", "by cost, idle (range)"]
    print(markdown_table(header, rows))
    print("\nThe largest stage's share of the FLOPs; an even share would be 1 / stages:\n")
    for shape in SHAPES:
        for stages in STAGES:
            sides = [partition_of(shape, stages, method) for method in METHODS]
            largest = [max(sum(s.flops[i] for i in s.layers(n)) for n in range(stages)) / sum(s.flops) for s in sides]
            print(f"- {shape}, {stages} stages: {largest[0]:.1%} uniform, {largest[1]:.1%} by cost")


if __name__ == "__main__":
    run_command(main)
