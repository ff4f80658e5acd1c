"""When and how the training loop saves, and how it ends early with a checkpoint."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NoReturn

from accelerate.utils import gather_object

from train.checkpoints import step_folder as checkpoints
from train.checkpoints.background import BackgroundWriter, States
from train.engines.base import Engine
from train.job import rendezvous
from train.job.watchdog import marked, working
from train.metrics.annotations import annotate
from train.metrics.summary import best_validation
from train.run.guard import SKIPS_IN_A_ROW, Guard
from train.run.log import RunLog
from train.run.setup import ResolvedRun
from train.run.signals import Interruptions
from train.utils import processes
from train.utils.errors import RUN_AGAIN, STOPPED_BY_GUARD, EarlyEnd, user_sentence


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

    def take_part() -> None:
        for _ in tensors:
            pass  # the other processes only take part in gathering
        engine.wait()

    try:
        if engine.is_main:
            writer.start(tensors, write) if writer else write_now()
    except Exception as error:
        if user_sentence(error) is not None:  # the job is intact: the others are not left waiting in a collective
            take_part()
        raise
    take_part()


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
        is_saved = step <= self.step  # or is being written
        if ends or not is_saved:
            self.writer.wait()  # one at a time, and none unfinished at the end
        if is_saved:
            return
        self.log.flush()  # first: a run that resumes from the checkpoint needs the records up to it
        in_background = self.run.config.async_save and not ends and self.writer.has_room(self.run.checkpoint_bytes)
        began = time.monotonic()
        stopped = self.guard.action == "stop"
        state = self.run.state(step, self.guard.state(), temporary=temporary, stopped_by_guard=stopped)
        save_checkpoint(self.engine, self.run, state, self.writer if in_background else None)
        self.step = step
        self.interruptions.saved(self.writer.seconds if in_background else time.monotonic() - began)

    def ends_validation(self, step: int) -> bool:
        """Look up from a validation after `step` steps: save if it is time to; whether the validation ends."""
        stop, save = (self.engine.any_process(asks) for asks in self.interruptions.requests())
        if save and not stop and step > self.step:
            self.save(step, temporary=True)
        self.writer.check()
        return stop

    def validated(self, step: int) -> bool:
        """Keep the checkpoint of the best validation up to `step`; whether the run ends, because that is long ago."""
        config, best = self.run.config, best_validation(self.log.records)  # which the main process has
        resumed = step == self.run.first_step
        if config.keep_best and self.engine.any_process(best.step == step or resumed):
            self.save(step, temporary=True)
            if self.engine.is_main:
                self.writer.then(partial(self._keep_best, best.step))
        patience = config.early_stopping_patience
        if patience is None or not self.engine.any_process(best.since >= patience):
            return False
        self.save(step, ends=True)
        self.log.message(
            f"--early_stopping_patience {patience}: {best.since} validations since step {best.step:,} (loss "
            f"{best.val_loss:.4f}) were not better: the run ends after step {step:,} of {self.run.total_steps:,}"
        )
        return True

    def _keep_best(self, step: int) -> None:
        """Point `best` at a complete checkpoint. A run that is killed before it does so when it resumes."""
        config = self.run.config
        checkpoints.point_best_to(config.run_folder / f"step-{step}")
        checkpoints.rotate(config.run_folder, config.save_total_limit)

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
        """Save the weights before an update that is not made, which are those after `step` steps, and end.

        Whatever becomes of the save, the finding is printed, and the exit code is that of the guard.
        """
        engine, guard, folder = self.engine, self.guard, self.run.config.run_folder
        if engine.is_main:
            processes.print_line(f"{finding}; the run stops before this update")
        damaged = engine.non_finite_parameters()
        failure = "" if damaged else _failure(self.writer.wait)  # that of an earlier step
        if not damaged and not engine.any_process(bool(failure)):
            failure = _failure(lambda: self.save(step, ends=True))
        flag = "on_spike" if guard.reason == "spike" else "on_nonfinite"
        replay = f"python -m train.replay {folder} --step {step + 1} finds where it appears"
        if damaged:
            more = f" and {len(damaged) - 1:,} more" if len(damaged) > 1 else ""
            where = (
                f"the weights themselves are not finite: {damaged[0]}{more}. They are not saved, and a lower "
                f"--learning_rate may keep them finite, with --allow_changes where the run resumes; {_newest(folder)}"
            )
        elif failure:
            where = f"the weights before it could not be saved: {failure}; {_newest(folder)}"
        elif guard.has_given_up:
            where = (
                f"the last {SKIPS_IN_A_ROW} updates are skipped; {folder}/step-{step} has the weights since. "
                f"{replay}; --resume_from_checkpoint with --{flag} skip tries as many again, and with a lower "
                "--learning_rate and --allow_changes, or from an earlier checkpoint, the run may recover"
            )
        else:
            where = (
                f"{folder}/step-{step} has the weights before it. {replay}; --resume_from_checkpoint with --{flag} "
                "skip continues without it"
            )
        sentence = f"stopped by the guard before the update of step {step + 1:,} of {self.run.total_steps:,}: {where}"
        if engine.is_main:
            rendezvous.record_guard_stop(sentence)
        self.log.close()
        engine.close()
        raise EarlyEnd(sentence, STOPPED_BY_GUARD)


def _failure(save: Callable[[], None]) -> str:
    """The sentence of why a checkpoint cannot be saved, empty if it is; on the main process, which writes."""
    try:
        save()
    except Exception as error:
        sentence = user_sentence(error)
        if sentence is None:
            raise
        return sentence
    return ""


def _newest(run_folder: Path) -> str:
    """What there is to resume from."""
    folders = checkpoints.step_folders(run_folder)
    return f"the newest checkpoint is {folders[-1][1]}" if folders else "there is no checkpoint yet"
