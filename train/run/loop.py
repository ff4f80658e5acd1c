"""The training loop: the same for every engine, layout and run type; and the engine that it drives, built."""

import os
import time
from contextlib import closing
from functools import partial

from accelerate.utils import gather_object, set_seed

from train.checkpoints import starting
from train.checkpoints import step_folder as checkpoints
from train.checkpoints.loading import load_model
from train.config import launcher_env as launcher
from train.data.prefetch import Batch, read_ahead
from train.engines import rendezvous
from train.engines.accelerated import AcceleratedEngine
from train.engines.base import Engine
from train.hub.upload import push
from train.metrics.annotations import annotate
from train.metrics.energy import EnergyMeter, energy_reader
from train.optim.schedule import learning_rate
from train.run.log import RunLog
from train.run.profiling import Profiler
from train.run.setup import ResolvedRun
from train.run.summary import write_summary
from train.run.validate import validate
from train.utils import lock, processes
from train.utils.errors import UserError


def build(run: ResolvedRun) -> Engine:
    """The engine with the model in it, at the step of the run's checkpoint. From here the run folder is this run's."""
    rendezvous.join()
    engine = _create_engine(run)
    processes.watch_peer(gather_object([os.getpid()]))
    checkpoint = run.checkpoint
    states = gather_object([run.state(run.first_step)])
    if any(state != states[0] for state in states):
        raise UserError(
            "the processes do not see the same flags, data or checkpoint; "
            "give all machines the same command and the same folders"
        )
    set_seed(run.config.seed)
    model = load_model(run.config.model, run.model, attn_implementation=run.attention[0])
    tensors = checkpoints.read_tensors(checkpoint, model) if checkpoint else None
    engine.wait()  # until all processes have read their files, because a claimed folder may be emptied
    if engine.is_main:
        starting.prepare_run_folder(run.config.run_folder, run.start)
        rendezvous.claim(run.config.run_folder)
        if run.restarted:
            start = f"resumes from {checkpoint.folder}" if checkpoint else "starts again: there was no checkpoint"
            print(f"restarted by the launcher: the run {start}", flush=True)
    engine.wait()
    engine.prepare(model)
    if checkpoint is not None and tensors is not None:
        engine.load_state(*tensors, checkpoint.step)
    return engine


def _create_engine(run: ResolvedRun) -> Engine:
    if run.partition is None:
        return AcceleratedEngine(run.config, run.deepspeed)
    from train.engines.pipeline.engine import PipelinedEngine  # imports DeepSpeed, which takes seconds

    return PipelinedEngine(run.config, run.deepspeed, run.partition)


def due(step: int, interval: int, last: int) -> bool:
    """Whether something that happens every `interval` steps (0: never) and at the end happens after `step`."""
    return step == last or (interval > 0 and step % interval == 0)


@annotate("checkpoint")
def save(engine: Engine, run: ResolvedRun, log: RunLog, step: int) -> None:
    """Write the checkpoint after `step` steps, parameter by parameter."""
    tensors = engine.tensors()
    log.flush()  # first: a run that resumes from the checkpoint needs the records up to it
    if engine.is_main:
        config = run.config
        lock.check(config.run_folder)
        checkpoints.save(
            config.run_folder, run.model, run.tokenizer, tensors, run.state(step), config.save_total_limit
        )
    for _ in tensors:
        pass  # the other processes only take part in gathering
    engine.wait()


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
    engine = build(run)
    log = RunLog(engine.accelerator, run)
    log.message(engine.layout)
    if run.partition is not None:
        log.message(f"{run.partition.table()}\nschedule {config.pipeline_schedule}")
    log.message(f"attention: {run.attention[0]} ({run.attention[1]}); precision: {run.precision}")
    if config.loss_chunk_size and launcher.asks("FSDP"):  # Accelerate shards the head, which must then be called
        log.message(f"--loss_chunk_size {config.loss_chunk_size} has no effect: FSDP2 computes the full logits")

    energy = EnergyMeter(energy_reader(engine.device))
    steps = range(run.first_step, run.total_steps)
    data = read_ahead(partial(micro_batches, engine, run), steps, engine.device)
    with closing(data), Profiler(run, engine) as profiler:
        for step in steps:
            energy.start()
            began = time.perf_counter()
            with annotate("data"):
                batches = next(data)
            data_seconds = time.perf_counter() - began
            rate = learning_rate(
                step,
                peak=config.learning_rate,
                total_steps=run.total_steps,
                warmup_steps=run.warmup_steps,
                min_ratio=config.min_learning_rate_ratio,
                schedule=config.lr_schedule,
            )
            result = engine.train_step(step, batches, rate)
            seconds = time.perf_counter() - began
            energy.stop(counts=step > run.first_step and not profiler.at_work)

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
            log.write(record)
            if due(done, config.eval_interval, run.total_steps):
                log.amend(validate(engine, run.val, config.train_micro_batch_size_per_gpu, config.eval_steps))
            if due(done, config.save_interval, run.total_steps):
                save(engine, run, log, done)
            profiler.step()
    log.close()
    main, world_size, measured = engine.is_main, engine.world_size, engine.peak_memory(profiler.peak_before)
    measured |= energy.metrics(engine.device, engine.sum_over_processes, run.tokens_per_step)
    engine.close()
    if main:
        write_summary(run, log.records, world_size, measured)
        if config.push_to_hub is not None:
            print(push(config.run_folder, config.push_to_hub))
