"""Validation loss and perplexity over the whole validation file, shared among all processes."""

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train.data.batches import EvalBatches
from train.data.prefetch import Batch, read_ahead
from train.engines.base import Engine
from train.evaluate_metrics import load_metric
from train.metrics.annotations import annotate
from train.run.setup import Run, open_validation


class Validation:
    """The validation of a run. Of one that follows a preparation, from when every process sees the file."""

    def __init__(self, engine: Engine, run: Run) -> None:
        self.engine = engine
        self.run = run
        self.batches = run.val  # None until the file is in place
        self._all_see_it = not run.config.follow
        self._said = False

    @annotate("validation")
    def measure(self) -> dict[str, Any]:
        """What `validate` gives; empty where there is nothing to validate on yet. All processes call it."""
        run = self.run
        if not self._all_see_it:
            self._ask_all()
        if not self._all_see_it:
            return {}
        if self.batches is None:
            self.batches = open_validation(run.config, run.model_config.vocab_size, run.train.block_size)
        return validate(self.engine, self.batches, run.micro_batch_size, run.config.eval_steps)

    def _ask_all(self) -> None:
        # All ask until all see it, also those that saw it first: the question is a collective.
        path = Path(self.run.config.val_data_path)
        seen = torch.tensor(float(self.batches is not None or path.exists()), device=self.engine.device)
        self._all_see_it = self.engine.sum_over_processes(seen).item() == self.engine.world_size
        if not self._all_see_it and not self._said and self.engine.is_main:
            tqdm.write(f"no validation until {path} is in place", file=sys.stderr)
        self._said = True


def validate(engine: Engine, batches: EvalBatches, micro_batch_size: int, max_steps: int | None) -> dict:
    """{"val_loss": mean nats per token, "perplexity", "val_tokens"}, every predicted token counted once.

    All processes make the same number of steps (a forward pass may be collective); windows that do not divide among
    them are filled with labels that count nothing. `max_steps` limits the batches per data-parallel process.
    """
    steps = batches.steps(engine.data_world_size, micro_batch_size)
    steps = steps if max_steps is None else min(steps, max_steps)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)

    def one_batch(step: int) -> list[Batch]:
        return [batches.micro_batch(step, engine.data_rank, engine.data_world_size, micro_batch_size)]

    bar = tqdm(total=steps, desc="validation", unit="batch", leave=False, mininterval=1, disable=not engine.is_main)
    with closing(read_ahead(one_batch, range(steps), engine.device)) as data, bar:
        for [batch] in data:
            sums += engine.eval_step(batch)
            bar.update()
    nll, tokens = engine.sum_over_processes(sums).tolist()
    if not engine.is_main:
        return {}
    return load_metric("perplexity").compute(nll=[nll], tokens=[int(tokens)]) | {"val_tokens": int(tokens)}
