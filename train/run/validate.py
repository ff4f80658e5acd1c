"""Validation loss and perplexity over the complete validation file, distributed over all processes."""

from collections.abc import Callable
from contextlib import closing

import torch
from tqdm import tqdm

from train.data.batches import EvalBatches
from train.data.prefetch import Batch, read_ahead
from train.engines.base import Engine
from train.evaluate_metrics import load_metric
from train.job.watchdog import marked
from train.metrics.annotations import annotate

ASKED_EVERY = 16  # batches, because the answer waits for the device


@annotate("validation")
def validate(
    engine: Engine,
    batches: EvalBatches,
    micro_batch_size: int,
    max_steps: int | None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict | None:
    """{"val_loss": mean nats per token, "perplexity", "val_tokens"}, every predicted token counted once.

    All processes make the same number of steps (a forward pass may be collective); blocks that do not
    divide evenly are padded with ignored labels. `max_steps` limits the batches per data-parallel process. None if
    a process is `interrupted`, and empty on all processes but the main one.
    """
    steps = batches.steps(engine.data_world_size, micro_batch_size)
    steps = steps if max_steps is None else min(steps, max_steps)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)

    def one_batch(step: int) -> list[Batch]:
        return [batches.micro_batch(step, engine.data_rank, engine.data_world_size, micro_batch_size)]

    bar = tqdm(total=steps, desc="validation", unit="batch", leave=False, mininterval=1, disable=not engine.is_main)
    with closing(read_ahead(one_batch, range(steps), engine.device)) as data, bar:
        for number, [batch] in enumerate(marked(data, "validation"), start=1):
            sums += engine.eval_step(batch)
            bar.update()
            if number % ASKED_EVERY == 0 and engine.any_process(interrupted()):
                return None
    nll, tokens = engine.sum_over_processes(sums).tolist()
    if not engine.is_main:
        return {}
    return load_metric("perplexity").compute(nll=[nll], tokens=[int(tokens)]) | {"val_tokens": int(tokens)}
