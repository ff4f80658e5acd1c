"""The training loop: the same for every engine, layout and run type; and the engine that it drives, built."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from typing import Any

from accelerate.utils import gather_object, set_seed

from train.checkpoints import starting
from train.checkpoints import step_folder as checkpoints
from train.checkpoints.loading import check_finite, load_model
from train.checkpoints.step_folder import GuardState
from train.config import launcher_env as launcher
from train.data.prefetch import Batch, read_ahead
from train.engines.accelerated import AcceleratedEngine
from train.engines.base import Engine, Review
from train.hub.upload import push
from train.job import rendezvous, watchdog
from train.job.watchdog import mark, marked, working
from train.metrics.annotations import annotate
from train.metrics.energy import EnergyMeter, energy_reader
from train.metrics.hardware import versions
from train.run.guard import Guard
from train.run.log import RunLog
from train.run.profiling import Profiler
from train.run.saving import CheckpointSaver
from train.run.setup import ResolvedRun
from train.run.signals import Interruptions, process_start
from train.run.summary import write_summary
from train.run.validate import validate
from train.utils import processes


def build(run: ResolvedRun, launcher_exited: Callable[[], None] = lambda: None) -> Engine:
    """The engine with the model in it, at the step of the run's checkpoint. From here the run folder is this run's."""
    # Each process has read the checkpoint completely by now: the others may take as long again as this one did.
    patience = run.config.timeout + round(time.time() - process_start())
    watchdog.start(rendezvous.join(patience, facts(run)), run.config.timeout)
    engine = _create_engine(run)
    processes.watch_peer(gather_object([os.getpid()]), launcher_exited)
    checkpoint = run.checkpoint
    set_seed(run.config.seed)
    with working("loading the model"):  # which may be downloaded
        model = load_model(run.config.model, run.model, attn_implementation=run.attention[0])
    if checkpoint is None:
        check_finite(run.config.model, model)
    tensors = checkpoints.read_tensors(checkpoint, model) if checkpoint else None
    mark("reading the checkpoint")
    engine.wait()  # until all processes have read their files, because a claimed folder may be emptied
    if engine.is_main:
        with working("preparing the run folder"):  # an earlier run's checkpoints may be deleted
            starting.prepare_run_folder(run.config.run_folder, run.start)
        rendezvous.claim(run.config.run_folder)
        if run.restarted:
            start = f"resumes from {checkpoint.folder}" if checkpoint else "starts again: there was no checkpoint"
            print(f"restarted by the launcher: the run {start}", flush=True)
    engine.wait()
    mark("preparing the model")
    engine.prepare(model)
    if checkpoint is not None and tensors is not None:
        engine.load_state(*tensors, checkpoint.guard.updates)
    mark("the start")
    return engine


def facts(run: ResolvedRun) -> dict[str, Any]:
    """What all processes of the job must have in common, by name."""
    state = asdict(run.state(run.first_step))
    del state["setting"]  # of which processes may differ, in kernels and thus in rounding
    return {f"--{name}": value for name, value in state.pop("config").items()} | state | versions()


def _create_engine(run: ResolvedRun) -> Engine:
    if run.partition is None:
        return AcceleratedEngine(run.config, run.deepspeed)
    from train.engines.pipeline.engine import PipelinedEngine  # imports DeepSpeed, which takes seconds

    return PipelinedEngine(run.config, run.deepspeed, run.partition)


def due(step: int, interval: int, last: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) and at the end happens after `step`."""
    return step == last or (interval > 0 and step % interval == 0)


def introduction(run: ResolvedRun, engine: Engine) -> Iterator[str]:
    """What is worth knowing of a run that begins."""
    config = run.config
    yield engine.layout
    if run.partition is not None:
        yield f"{run.partition.table()}\nschedule {config.pipeline_schedule}"
    yield f"attention: {run.attention[0]} ({run.attention[1]}); precision: {run.precision}"
    if config.loss_chunk_size and launcher.asks("FSDP"):  # Accelerate shards the head, which must then be called
        yield f"--loss_chunk_size {config.loss_chunk_size} has no effect: FSDP2 computes the full logits"
    times = [
        f"every {config.save_interval:,} steps" * (config.save_interval > 0),
        f"every {config.save_minutes:g} minutes (each deleted once two newer are complete)"
        * (config.save_minutes > 0),
        "after the last step",
    ]
    yield f"checkpoints: {', '.join(filter(None, times))}"


def micro_batches(engine: Engine, run: ResolvedRun, step: int) -> list[Batch]:
    """This process's micro-batches of a step."""
    micro_batch_size = run.config.train_micro_batch_size_per_gpu
    return [
        run.train.micro_batch(step, micro_step, engine.data_rank, engine.data_world_size, micro_batch_size)
        for micro_step in range(run.config.gradient_accumulation_steps)
    ]


def train(run: ResolvedRun) -> None:
    """Train from the run's checkpoint, or from step 0, to its last step, and finish the run folder."""
    config = run.config
    with Interruptions(config, run.checkpoint_bytes, keeps_time=processes.rank() == 0) as interruptions:
        engine = build(run, partial(interruptions.request, "the launcher has exited"))
        log = RunLog(engine.accelerator, run)
        measured = train_steps(run, engine, log, interruptions)
        main, world_size = engine.is_main, engine.world_size
        log.close()
        engine.close()
        interruptions.end_at_once()
        if main:
            write_summary(run, log.records, world_size, measured)
    if main and config.push_to_hub is not None:
        print(push(config.run_folder, config.push_to_hub))


def train_steps(run: ResolvedRun, engine: Engine, log: RunLog, interruptions: Interruptions) -> dict[str, Any]:
    """All steps with their validations and checkpoints; returns what was measured of memory and energy."""
    config = run.config
    for sentence in introduction(run, engine):
        log.message(sentence)
    guard = Guard(config, run.checkpoint.guard if run.checkpoint else GuardState(0))
    saver = CheckpointSaver(engine, run, log, guard, interruptions)
    review = Review(guard.accepts, interruptions.requests)

    def validation(step: int) -> dict | None:
        is_to_end = partial(saver.ends_validation, step)
        return validate(engine, run.val, config.train_micro_batch_size_per_gpu, config.eval_steps, is_to_end)

    if due(run.first_step, config.eval_interval, run.total_steps) and engine.any_process(
        log.lacks_validation(run.first_step)
    ):  # the run ended before it
        log.amend(validation(run.first_step) or {})
    if engine.any_process(interruptions.is_asked()):
        saver.end_early(run.first_step, interruptions.reason)

    resumed = run.checkpoint is not None and run.checkpoint.is_in(config.run_folder)
    ends = resumed and saver.validated(run.first_step)  # it may have been killed before it could

    is_limited = engine.any_process(interruptions.deadline is not None)
    energy = EnergyMeter(energy_reader(engine.device))
    steps = range(run.first_step, run.first_step if ends else run.total_steps)
    data = read_ahead(partial(micro_batches, engine, run), steps, engine.device)
    with closing(data), Profiler(run, engine) as profiler, saver.writer:
        for step in steps:
            mark(f"step {step + 1}")
            interruptions.needed.step_begins(time.monotonic())
            energy.start()
            began = time.perf_counter()
            with annotate("data"):
                batches = next(data)
            data_seconds = time.perf_counter() - began
            rate = run.learning_rate(step)
            result = engine.train_step(step, marked(batches, f"step {step + 1}"), rate, review)
            seconds = time.perf_counter() - began
            energy.stop(counts=step > run.first_step and not profiler.at_work)
            interruptions.needed.step_done(time.monotonic(), is_typical=not profiler.at_work)

            done = step + 1
            record = {
                "step": done,
                "epoch": done / run.train.steps_per_epoch,
                "tokens": done * run.tokens_per_step,
                "loss": result.loss,
                "learning_rate": rate,
                "grad_norm": result.grad_norm,
                "tokens_per_second": run.tokens_per_step / seconds,
                "step_time_seconds": seconds,
                "data_seconds": data_seconds,
            }
            if profiler.at_work:
                record["profiled"] = True
            if guard.reason:
                finding = guard.finding(done, result, engine.non_finite_losses())
                if guard.action == "stop":
                    saver.end_by_guard(step, finding)
                log.message(finding if result.updated else f"{finding}; the update is skipped")
            if not result.updated:
                record["skipped"] = True
            log.write(record)
            stop, save = result.requests
            save = save or (is_limited and profiler.writes_next)  # the trace, nobody knows for how long
            if save or stop or due(done, config.save_interval, run.total_steps):
                temporary = not due(done, config.save_interval, run.total_steps)
                saver.save(done, temporary=temporary, ends=stop or done == run.total_steps)
            saver.writer.check()
            if due(done, config.eval_interval, run.total_steps) and not stop:
                validated = validation(done)
                log.amend(validated or {})
                stop = validated is None
                if not stop and saver.validated(done):
                    break
            if stop:
                saver.end_early(done, interruptions.reason)
            profiler.step()
    return engine.peak_memory(profiler.peak_before) | energy.metrics(
        engine.device, engine.sum_over_processes, run.tokens_per_step
    )
