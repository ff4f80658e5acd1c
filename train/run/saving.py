"""When and how the training loop saves, and how it ends early with a checkpoint."""

import time
from contextlib import ExitStack
from typing import NoReturn

from accelerate.utils import gather_object

from train.checkpoints import step_folder as checkpoints
from train.checkpoints.background import BackgroundWriter, States
from train.engines.base import Engine
from train.job.watchdog import marked, working
from train.metrics.annotations import annotate
from train.metrics.summary import best_validation
from train.run.guard import Guard
from train.run.log import RunLog
from train.run.setup import ResolvedRun
from train.run.signals import Interruptions
from train.utils.errors import RUN_AGAIN, STOPPED_BY_GUARD, EarlyEnd


@annotate("checkpoint")
def save_checkpoint(
    engine: Engine, run: ResolvedRun, state: checkpoints.TrainingState, writer: BackgroundWriter | None
) -> None:
    """Write the checkpoint of a state, parameter by parameter; with a `writer`, from a copy, in the background."""
    config = run.config
    what = f"the checkpoint of step {state.step}"
    tensors = marked(engine.tensors(on_host=writer is None), what)

    def write(states: States) -> None:
        checkpoints.save(config.run_folder, run.model, run.tokenizer, states, state, config.save_total_limit)

    def write_now() -> None:
        with ExitStack() as after_tensors:

            def states() -> States:
                yield from tensors
                after_tensors.enter_context(working(what))  # what remains is the main process's: a flush to the disk

            write(states())

    if engine.is_main:
        writer.start(tensors, write) if writer else write_now()
    for _ in tensors:
        pass  # the other processes only take part in gathering
    engine.wait()


class CheckpointSaver:
    """Saves the run, each step at most once, and ends it with a checkpoint where it ends early."""

    def __init__(
        self, engine: Engine, run: ResolvedRun, log: RunLog, guard: Guard, interruptions: Interruptions
    ) -> None:
        self.engine, self.run, self.log, self.guard, self.interruptions = engine, run, log, guard, interruptions
        self.step = run.first_step if run.checkpoint else -1  # of the newest checkpoint
        self.writer = BackgroundWriter(log.message)

    def save(self, step: int, *, temporary: bool = False, ends: bool = False) -> None:
        """Write the checkpoint after `step` steps; a `temporary` one is deleted when two newer are complete.

        Training does not wait for it, unless the run `ends` or there is no room for a copy.
        """
        self.writer.wait()  # one at a time, and none unfinished at the end
        if step <= self.step:
            return
        self.log.flush()  # first: a run that resumes from the checkpoint needs the records up to it
        in_background = self.run.config.async_save and not ends and self.writer.has_room(self.run.checkpoint_bytes)
        began = time.monotonic()
        stopped = self.guard.action == "stop"
        state = self.run.state(step, self.guard.state(), temporary=temporary, stopped_by_guard=stopped)
        save_checkpoint(self.engine, self.run, state, self.writer if in_background else None)
        self.step = step
        self.interruptions.saved(self.writer.seconds if in_background else time.monotonic() - began)

    def validated(self, step: int) -> bool:
        """Keep the checkpoint of the best validation up to `step`; whether the run ends, because that is long ago."""
        config, best = self.run.config, best_validation(self.log.records)  # which the main process has
        resumed = step == self.run.first_step
        if config.keep_best and self.engine.any_process(best.step == step or resumed):
            self.save(step, temporary=True)
            self.writer.wait()
            if self.engine.is_main:
                checkpoints.point_best_to(config.run_folder / f"step-{best.step}")
                checkpoints.rotate(config.run_folder, config.save_total_limit)
        patience = config.early_stopping_patience
        if patience is None or not self.engine.any_process(best.since >= patience):
            return False
        self.save(step, ends=True)
        self.log.message(
            f"--early_stopping_patience {patience}: {best.since} validations since step {best.step:,} (loss "
            f"{best.val_loss:.4f}) were not better: the run ends after step {step:,} of {self.run.total_steps:,}"
        )
        return True

    def end_early(self, step: int, reason: str) -> NoReturn:
        """Save after `step` steps, and end all processes, of which those with a reason give theirs."""
        if step > 0:
            self.save(step, ends=True)
        reasons = dict.fromkeys(each for each in gather_object([reason]) if each)
        self.log.close()
        self.engine.close()
        where = f"{self.run.config.run_folder}/step-{step} is saved" if step > 0 else "nothing is saved yet"
        raise EarlyEnd(
            f"{' and '.join(reasons)}: the run stops after step {step:,} of {self.run.total_steps:,}; {where}, and "
            f"--resume_from_checkpoint continues",
            RUN_AGAIN,
        )

    def end_by_guard(self, step: int, finding: str) -> NoReturn:
        """Save the weights before an update that is not made, which are those after `step` steps, and end."""
        self.save(step, ends=True)
        self.log.close()
        self.engine.close()
        flag = "on_spike" if self.guard.reason == "spike" else "on_nonfinite"
        folder = self.run.config.run_folder
        raise EarlyEnd(
            f"{finding}, so the run stops before this update; {folder}/step-{step} has the weights before it. "
            f"python -m train.replay {folder} --step {step + 1} finds where it appears; --resume_from_checkpoint "
            f"with --{flag} skip continues without it",
            STOPPED_BY_GUARD,
        )
