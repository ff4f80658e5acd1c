"""Build the engine of a resolved run, with the model in it."""

import os

from accelerate.utils import gather_object, set_seed

from train.checkpoints import step_folder as checkpoints
from train.checkpoints.loading import load_model
from train.engines import rendezvous
from train.engines.accelerated import AcceleratedEngine
from train.engines.base import Engine
from train.run.setup import ResolvedRun
from train.utils import processes
from train.utils.errors import UserError


def build(run: ResolvedRun) -> Engine:
    """The engine with the model in it, at the step of the run's checkpoint. From here the run folder is this run's."""
    rendezvous.join()
    engine = _create_engine(run)
    processes.watch_peer(gather_object([os.getpid()]))
    checkpoint = run.start.checkpoint
    states = gather_object([run.state(checkpoint.step if checkpoint else 0)])
    if any(state != states[0] for state in states):
        raise UserError(
            "the processes do not see the same flags, data or checkpoint; "
            "give all machines the same command and the same folders"
        )
    set_seed(run.config.seed)
    model = load_model(run.config.model, run.model.config, attn_implementation=run.model.attention[0])
    tensors = checkpoints.read_tensors(checkpoint, model) if checkpoint else None
    engine.wait()  # until all processes have read their files, because a claimed folder may be emptied
    if engine.is_main:
        checkpoints.prepare_run_folder(run.config.run_folder, checkpoint, run.config.overwrite)
        rendezvous.claim(run.config.run_folder)
        if run.start.restarted:
            start = f"resumes from {checkpoint.folder}" if checkpoint else "starts again: there was no checkpoint"
            print(f"restarted by the launcher: the run {start}", flush=True)
    engine.wait()
    engine.prepare(model)
    if checkpoint is not None and tensors is not None:
        engine.load_state(*tensors, checkpoint.step)
    return engine


def _create_engine(run: ResolvedRun) -> Engine:
    if run.model.partition is None:
        return AcceleratedEngine(run.config, run.deepspeed)
    assert run.deepspeed is not None
    from train.engines.pipeline.engine import PipelinedEngine  # imports DeepSpeed, which takes seconds

    return PipelinedEngine(run.config, run.deepspeed, run.model.partition)
