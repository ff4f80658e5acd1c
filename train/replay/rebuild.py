"""A step of a run computed again in one process, whatever the layout was: the same weights, tokens, order and dropout.

The checkpoint has full weights and moments in fp32; the order of the data is a function of the seed and the step, and
the masks of dropout depend on the micro-batch and the stage as well. So one process computes the micro-batches of all
ranks one after another, in the order that they have in the global batch, and averages them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from modeling_gpt2flash import GPT2FlashForCausalLM
from train.checkpoints import starting
from train.checkpoints import step_folder as checkpoints
from train.checkpoints.loading import load_model, model_config
from train.checkpoints.run_folder import STEPS_FILE, read_steps
from train.config.changes import CURVE, MASKS, ROUNDING, Change, changes, rate, table, with_warmup
from train.config.run_config import RunConfig
from train.data.batches import TrainBatches
from train.data.token_file import open_tokens
from train.engines.accelerated import AcceleratedEngine
from train.engines.base import Review, StepResult
from train.utils.errors import UserError

NAMED_STEPS = 5  # in a message about missing records


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that one rank computed together; `offsets` are those of their first tokens in the token file."""

    rank: int
    number: int
    offsets: list[int]
    tensors: dict[str, torch.Tensor]


class Replay:
    """A run at one of its checkpoints, ready to compute the steps after it.

    Args:
        run_folder: the run.
        step: the step to compute, from 1; by default the one after the last that the run has recorded.
        tokens: where the token file is now, if it is not where the run has read it.

    Raises:
        UserError: if there is no intact checkpoint before the step, or the token file is a different one.
    """

    def __init__(self, run_folder: Path, step: int | None = None, tokens: Path | None = None) -> None:
        recorded, _ = read_steps(run_folder / STEPS_FILE) if (run_folder / STEPS_FILE).exists() else ([], None)
        self.records: dict[int, Mapping[str, Any]] = {record["step"]: record for record in recorded}
        self.step = step or max(self.records, default=0) + 1
        self.run_folder = run_folder
        self.checkpoint, self.skipped = checkpoint_before(run_folder, self.step)
        state = self.checkpoint.state
        known = {field.name for field in fields(RunConfig)}
        recorded_config: Any = {key: value for key, value in state.config.items() if key in known}
        self.config = RunConfig(**recorded_config)
        micro_batch, accumulation = self.config.train_micro_batch_size_per_gpu, self.config.gradient_accumulation_steps
        self.ranks = state.sequences_per_step // (micro_batch * accumulation)
        self.data = TrainBatches(
            open_tokens(tokens or self.config.train_data_path, state.model["vocab_size"] or 0),
            *(state.block_size, state.sequences_per_step, state.seed, state.document_mask),
        )
        if self.data.tokens.identity != state.train_data:
            raise UserError(
                f"{self.data.tokens.path}: is not the file that the run was trained on; name that one with "
                "--train_data_path"
            )
        self.engine = self._build_engine()

    def _build_engine(self) -> AcceleratedEngine:
        alone = replace(
            self.config,
            deepspeed_config=None,
            pipeline_stages=1,
            gradient_accumulation_steps=self.ranks * self.config.gradient_accumulation_steps,
            activation_checkpointing="none",
            torch_compile=False,
            report_to="none",
            profile=False,
        )
        engine = AcceleratedEngine(alone, {})
        set_seed(alone.seed)
        folder = str(self.checkpoint.folder)
        config = model_config(folder, dropout=alone.dropout, loss_chunk_size=alone.loss_chunk_size)
        model = load_model(folder, config, attn_implementation=alone.attn_implementation)
        tensors = checkpoints.read_tensors(self.checkpoint, model)
        engine.prepare(model)
        engine.load_state(*tensors, self.checkpoint.guard.updates)
        self._seed_stages(model)
        return engine

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """All micro-batches of a step, in the order of the global batch; `step` counts from 1."""
        size, accumulation = self.config.train_micro_batch_size_per_gpu, self.config.gradient_accumulation_steps
        blocks = self.data.block_indices(step - 1)
        found = []
        for number in range(accumulation):
            for rank in range(self.ranks):
                start = (number * self.ranks + rank) * size
                offsets = (blocks[start : start + size] * self.data.block_size).tolist()
                tensors = self.data.micro_batch(step - 1, number, rank, self.ranks, size)
                found.append(MicroBatch(rank, number, offsets, tensors))
        return found

    def compute(self, step: int) -> StepResult:
        """Compute a step, and update the weights as the run did."""
        skipped = self.records.get(step, {}).get("skipped", False)
        return self.engine.train_step(
            step - 1,
            [micro_batch.tensors for micro_batch in self.micro_batches(step)],
            self.learning_rate(step - 1),
            Review(lambda loss, grad_norm: not skipped),
        )

    def _seed_stages(self, model: GPT2FlashForCausalLM) -> None:
        """Make the layers of a pipeline's later stages draw the masks of their stage."""
        layers: list[nn.Module] = [model.transformer.wte, *model.transformer.h, model.transformer.ln_f, model.lm_head]
        bounds = self.checkpoint.state.setting.get("stage_bounds", [])
        for stage, first in enumerate(bounds[1:-1], start=1):
            layers[first].register_forward_pre_hook(partial(self._enter_stage, stage))

    def _enter_stage(self, stage: int, *_: Any) -> None:
        self.engine.seed_dropout(len(self.engine.losses), stage)

    def learning_rate(self, step: int) -> float:
        """The rate that the record of a step has, from 0; without one, that of the checkpoint's flags."""
        recorded = self.records.get(step + 1, {}).get("learning_rate")
        return rate(with_warmup(self.checkpoint.state.facts), step) if recorded is None else recorded

    def notes(self) -> Iterator[str]:
        """Why the computed steps may differ from those of the run, as far as it is known."""
        for fault in self.skipped:
            yield f"{fault}; not used"
        last = min(self.step, max(self.records, default=0))
        lost = [str(each) for each in range(self.checkpoint.step + 1, last + 1) if each not in self.records]
        if lost:
            yield (
                f"{self.run_folder / STEPS_FILE} has no record of {'step' if len(lost) == 1 else 'steps'} "
                f"{', '.join(lost[:NAMED_STEPS])}{', …' * (len(lost) > NAMED_STEPS)}: computed as if no update was "
                f"skipped, at the learning rate of the flags of {self.checkpoint.folder.name}"
            )
        later, found = self._changed_later()
        if found:
            yield (
                f"{later} was computed with other flags than {self.checkpoint.folder.name}, whose flags are used here "
                f"(apart from the learning rates, which are the recorded ones), so the numbers may differ:"
                f"\n{table(found, self.checkpoint.folder.name, later)}"
            )

    def _changed_later(self) -> tuple[str, list[Change]]:
        """The name of the next checkpoint whose flags differ, and what differs; those after the step do not count."""
        for done, folder in checkpoints.step_folders(self.run_folder):
            if done <= self.checkpoint.step:
                continue
            try:
                after = checkpoints.read_state(folder).state.facts
            except UserError:
                continue
            found = changes(after | self.checkpoint.state.facts, after, self.checkpoint.step)
            found = [change for change in found if change.name in (*CURVE, *MASKS, *ROUNDING)]
            if found or done >= self.step:
                return folder.name, found
        return "", []


def checkpoint_before(run_folder: Path, step: int) -> tuple[checkpoints.Checkpoint, list[str]]:
    """The newest intact checkpoint from which a step can be computed, and what is wrong with newer ones."""
    folders = checkpoints.step_folders(run_folder)
    complete = [(done, folder) for done, folder in folders if (folder / checkpoints.STATE).exists()]
    before = [folder for done, folder in reversed(complete) if done < step]
    if not before:
        there = ", ".join(folder.name for _, folder in complete) or "none"
        raise UserError(f"{run_folder} has no checkpoint before step {step} (it has {there}); ask for a later --step")
    faults: list[str] = []
    for folder in before:
        checkpoint, fault = starting.read_intact(folder)
        if checkpoint is not None:
            return checkpoint, faults
        faults.append(str(fault))
    raise UserError(f"{faults[0]}, and {run_folder} has no other intact checkpoint before step {step}")
