"""Trains, or replays, with a planted number: `python -m tests.planted STEP RANK MODULE NUMBER train FLAGS...`.

In step STEP (the first is 1; FIRST:LAST for several) and its last micro-batch, the output of MODULE on process RANK
is multiplied by NUMBER, or its gradient, for MODULE:backward. With LARGEST_FILE in the environment, no file may have
more bytes: EFBIG. With several processes: `torchrun ... -m tests.planted ...`.
"""

import os
import resource
import sys
from typing import Any

from train.cli import choose
from train.engines.base import Engine
from train.utils.command import run_command

first, _, last = sys.argv[1].partition(":")
steps = range(int(first), int(last or first) + 1)
rank, number = int(sys.argv[2]), float(sys.argv[4])
module, _, backward = sys.argv[3].partition(":")
tool = sys.argv[5]
del sys.argv[1:6]
train_step = Engine.train_step
calls = {"step": 0, "forward": 0}


def plant(module_: Any) -> None:
    forward = module_.forward

    def planted_forward(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*arguments, **keywords)
        calls["forward"] += 1
        if calls["step"] not in steps or calls["forward"] < calls["micro-batches"]:
            return output
        if backward:
            (output[0] if isinstance(output, tuple) else output).register_hook(lambda gradient: gradient * number)
            return output
        return (output[0] * number, *output[1:]) if isinstance(output, tuple) else output * number

    module_.forward = planted_forward


def planted(engine: Any, at: int, micro_batches: Any, *arguments: Any) -> Any:
    micro_batches = list(micro_batches)
    if not calls["step"] and engine.rank == rank:
        plant(dict(engine.named_modules())[module])
    calls.update(step=at + 1, forward=0)
    calls["micro-batches"] = len(micro_batches)
    return train_step(engine, at, micro_batches, *arguments)


if __name__ == "__main__":
    if "LARGEST_FILE" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE"]),) * 2)
    Engine.train_step = planted  # type: ignore[method-assign]
    run_command(choose(tool))
