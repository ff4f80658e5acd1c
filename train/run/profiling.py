"""`--profile`: the steps of `--profile_steps` under torch.profiler, a trace per process in RUN/profile/rank-N.json.gz.

In the step before them the profiler warms up, the model's modules are annotated with their names, and the main process
tracks the memory of every tensor for RUN/profile/memory.json. After them all of it is removed, so that it does not
affect the other steps.
"""

import functools
import gzip
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.profiler import profile, record_function, schedule
from tqdm import tqdm

from modeling_gpt2flash import GPT2FlashForCausalLM
from train.engines.base import Engine
from train.job.watchdog import working
from train.kernels.traces import METADATA_KEY, ProfileFacts, trace_metadata
from train.metrics.annotations import LOSS, module_annotation
from train.metrics.flops import peak_bandwidth, peak_flops
from train.metrics.hardware import versions
from train.metrics.memory_tracker import MemoryTracker
from train.metrics.peak_memory import peak_memory
from train.run.setup import ResolvedRun
from train.utils import devices
from train.utils.files import atomic_write, write_json


class Profiler(AbstractContextManager):
    """Records the steps that --profile_steps names; without --profile it does nothing."""

    def __init__(self, run: ResolvedRun, engine: Engine) -> None:
        self.run = run
        self.engine = engine
        self.done = done = run.first_step
        self.annotations = ExitStack()
        self.tracking = ExitStack()
        self.peak_before: dict[str, Any] | None = None
        """On a CPU, peak memory of the process before the profiler starts, whose records stay in memory."""
        self.profile: profile | None = None
        self.memory: MemoryTracker | None = None
        if run.config.profiled is None:
            return
        self.recorded = run.config.profiled
        if self.recorded.start < done + 2:
            if engine.is_main:
                tqdm.write(f"--profile_steps {run.config.profile_steps}: nothing is recorded after step {done}")
            return
        self.folder = run.config.run_folder / "profile"
        self.facts = trace_metadata(profile_facts(run, engine, self.recorded), engine.rank)
        if engine.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)  # an earlier attempt may have had more processes
        self.profile = profile(
            activities=devices.profiler_activities(engine.device),
            schedule=schedule(wait=self.recorded.start - 2 - done, warmup=1, active=len(self.recorded), repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=False,
        )

    def __enter__(self) -> "Profiler":
        if self.profile is not None:
            self.profile.start()
            self._prepare_if_next()
        return self

    def __exit__(self, *_: object) -> None:
        self.annotations.close()
        self.tracking.close()
        if self.profile is not None:
            self.profile.stop()

    @property
    def at_work(self) -> bool:
        """Whether the next step is recorded, or is the one before, that warms the profiler up."""
        return self.profile is not None and self.recorded.start <= self.done + 2 <= self.recorded.stop

    @property
    def writes_next(self) -> bool:
        """Whether the next call of `step` writes the trace."""
        return self.profile is not None and self.done == self.recorded.stop - 2

    def step(self) -> None:
        """After every optimizer step and what belongs to it."""
        if self.profile is None:
            return
        self.done += 1
        self.tracking.close()
        if self.memory is not None:
            self.folder.mkdir(exist_ok=True)
            write_json(self.folder / "memory.json", asdict(self.memory.profile()))
            self.memory = None
        if self.done == self.recorded.start - 2 and self.engine.device.type == "cpu":
            self.peak_before = peak_memory(self.engine.device)
        self.profile.step()
        self._prepare_if_next()
        if self.done == self.recorded.start - 1:
            # Kineto accepts metadata only while it records.
            self.profile.add_metadata_json(METADATA_KEY, self.facts)
            if self.run.config.memory_snapshot:
                devices.record_memory_history()
        if self.done == self.recorded.stop - 1:
            self.annotations.close()

    def _prepare_if_next(self) -> None:
        if self.done != self.recorded.start - 2:
            return
        self.annotations = annotate_modules(self.engine.named_modules())
        # Not with compiled blocks: torch.compile falls back to eager under a TorchDispatchMode.
        if self.engine.is_main and not self.run.config.torch_compile:
            vocabulary = self.run.model.vocab_size
            tracker = MemoryTracker(self.engine.held_tensors, vocabulary, self.engine.device.type)
            self.memory = self.tracking.enter_context(tracker)

    def _write(self, recorded: profile) -> None:
        if self.done < self.recorded.stop - 1:
            return  # an error has ended the run early
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"rank-{self.engine.rank}.json.gz"
        plain = file.with_name(f".{file.stem}")
        try:
            with working("writing the trace"):
                recorded.export_chrome_trace(str(plain))
            with (
                working("compressing the trace"),
                atomic_write(file) as temporary,
                plain.open("rb") as source,
                gzip.open(temporary, "wb", 6) as packed,
            ):
                shutil.copyfileobj(source, packed)
        finally:
            plain.unlink(missing_ok=True)
        if self.run.config.memory_snapshot:
            with atomic_write(self.folder / f"memory-{self.engine.rank}.pickle") as temporary:
                devices.dump_memory_history(temporary)


def annotate_modules(modules: Iterator[tuple[str, nn.Module]]) -> ExitStack:
    """Annotate every call of a module with its name for the profiler, until the returned stack is closed."""
    annotations = ExitStack()
    compiled: tuple[str, ...] = ()
    for name, module in list(modules):
        if name.startswith(compiled):
            continue  # its call is part of a compiled graph, which an annotation would break
        if isinstance(module, GPT2FlashForCausalLM):
            annotations.callback(_annotate(module, "_loss", LOSS))
        elif name:
            if hasattr(module.forward, "_torchdynamo_orig_callable"):
                compiled = (*compiled, f"{name}.")
            annotations.callback(_annotate(module, "forward", module_annotation(name)))
    return annotations


def _annotate(owner: nn.Module, attribute: str, annotation: str) -> Callable[[], None]:
    """Annotate the calls of a method; returns what restores it."""
    call, own = getattr(owner, attribute), attribute in vars(owner)
    setattr(owner, attribute, record_function(annotation)(call))
    return functools.partial(setattr, owner, attribute, call) if own else functools.partial(delattr, owner, attribute)


def profile_facts(run: ResolvedRun, engine: Engine, recorded: range) -> ProfileFacts:
    config = run.config
    device_name = devices.device_name(engine.device)
    return ProfileFacts(
        run_type=config.run_type,
        world_size=engine.world_size,
        first_step=recorded.start,
        steps=len(recorded),
        tokens_per_step=run.tokens_per_step,
        block_size=run.train.block_size,
        micro_batch_size=config.train_micro_batch_size_per_gpu,
        accumulation=config.gradient_accumulation_steps,
        model=run.shape,
        attn_implementation=run.attention[0],
        activation_checkpointing=config.activation_checkpointing,
        torch_compile=config.torch_compile,
        precision=run.precision,
        device=engine.device.type,
        device_name=device_name,
        peak_flops=peak_flops(device_name, run.precision),
        peak_bytes_per_second=peak_bandwidth(device_name),
        torch=versions()["torch"],
        pipeline_stages=config.pipeline_stages,
        pipeline_schedule=config.pipeline_schedule,
    )
