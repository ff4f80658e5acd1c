"""Trains with a number planted into a module: `python -m tests.planted STEP RANK MODULE NUMBER FLAGS...`.

In step STEP (the first is 1) and its last micro-batch, the output of MODULE on process RANK is multiplied by NUMBER.
With several processes: `torchrun ... -m tests.planted ...`.
"""

import sys
from typing import Any

from train.config.run_config import parse
from train.engines.base import Engine
from train.run.loop import train
from train.run.setup import resolve
from train.utils.command import run_command

step, rank, module, number = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
del sys.argv[1:5]
train_step = Engine.train_step
calls = {"step": 0, "forward": 0}


def plant(_module: Any, _inputs: Any, output: Any) -> Any:
    calls["forward"] += 1
    if calls["step"] != step or calls["forward"] < calls["micro-batches"]:
        return output
    return (output[0] * number, *output[1:]) if isinstance(output, tuple) else output * number


def planted(engine: Any, at: int, micro_batches: list, *arguments: Any) -> Any:
    if not calls["step"] and engine.rank == rank:
        found = dict(engine.named_modules())
        found[module].register_forward_hook(plant)
    calls.update(step=at + 1, forward=0)
    calls["micro-batches"] = len(micro_batches)
    return train_step(engine, at, micro_batches, *arguments)


if __name__ == "__main__":
    Engine.train_step = planted  # type: ignore[method-assign]
    run_command(lambda: train(resolve(parse())))
