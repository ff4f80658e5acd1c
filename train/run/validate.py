"""Validation loss and perplexity over the complete validation file, distributed over all processes."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from train.data.batches import EvalBatches
from train.data.prefetch import Batch, read_ahead
from train.engines.base import Engine
from train.evaluate_metrics import load_metric
from train.job.watchdog import marked
from train.metrics.annotations import annotate

LOOK_SECONDS = 1.0  # between two looks at what asks to end a validation, because the answer waits for the device


@dataclass
class Looks:
    """At which batches all processes look up: after the first, and then about every `LOOK_SECONDS`."""

    engine: Engine
    after: int = 1  # batches, the next time
    every: int = 1
    began: float = field(default_factory=time.monotonic)

    def are_due(self, batches: int) -> bool:
        """Whether it is time after so many batches; collective, if it is."""
        if batches < self.after:
            return False
        own = time.monotonic() - self.began if self.engine.is_main else 0.0  # the main process keeps the time of all
        self.began = time.monotonic()
        seconds = float(self.engine.sum_over_processes(torch.tensor(own, device=self.engine.device)))
        self.every = next_interval(self.every, seconds)
        self.after = batches + self.every
        return True


def next_interval(batches: int, seconds: float) -> int:
    """How many batches are to follow until the next look, after so many in so many seconds: at most twice as many."""
    return max(1, int(batches * min(2.0, LOOK_SECONDS / max(seconds, 1e-9))))


@annotate("validation")
def validate(
    engine: Engine,
    batches: EvalBatches,
    micro_batch_size: int,
    max_steps: int | None,
    is_to_end: Callable[[], bool] = lambda: False,
) -> dict | None:
    """{"val_loss": mean nats per token, "perplexity", "val_tokens"}, every predicted token counted once.

    All processes make the same number of steps (a forward pass may be collective); blocks that do not
    divide evenly are padded with ignored labels. `max_steps` limits the batches per data-parallel process. None if
    it `is_to_end` before, which all processes are asked at once, about every second; and empty on all processes but
    the main one.
    """
    steps = batches.steps(engine.data_world_size, micro_batch_size)
    steps = steps if max_steps is None else min(steps, max_steps)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)

    def one_batch(step: int) -> list[Batch]:
        return [batches.micro_batch(step, engine.data_rank, engine.data_world_size, micro_batch_size)]

    looks = Looks(engine)
    bar = tqdm(total=steps, desc="validation", unit="batch", leave=False, mininterval=1, disable=not engine.is_main)
    with closing(read_ahead(one_batch, range(steps), engine.device)) as data, bar:
        for number, [batch] in enumerate(marked(data, "validation"), start=1):
            sums += engine.eval_step(batch)
            bar.update()
            if number < steps and looks.are_due(number) and is_to_end():
                return None
    nll, tokens = engine.sum_over_processes(sums).tolist()
    if not engine.is_main:
        return {}
    return load_metric("perplexity").compute(nll=[nll], tokens=[int(tokens)]) | {"val_tokens": int(tokens)}
