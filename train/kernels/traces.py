"""The traces of a profile, read and checked: which events ran in which thread, inside of which, and which kernels.

The format is that of torch.profiler's `export_chrome_trace`. Times are microseconds of the trace's own clock.
"""

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.utils.errors import UserError, shortened
from train.utils.files import BEYOND_NUMBERS, from_json, parse_json

SCHEMA = 1
METADATA_KEY = "gpt2flash"
"""Where `train.run.profiling` puts the facts of the run into a trace."""

STEP = "ProfilerStep#"
# Kineto's names; a call that may launch a kernel is "cuda_runtime", "cuda_driver" or the like of another device.
CPU_CATEGORIES = {"cpu_op": "op", "user_annotation": "annotation"}
LAUNCH = re.compile(r"\w+_(runtime|driver)")
GPU_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
# torch.compile marks its graphs as annotations, but their time is their own work, not time between operators.
COMPILED = re.compile(r"(## Call )?Compiled|Torch-Compiled|triton_|CompiledFunction")
HINT = "make one with python -m train --profile"

MICROSECOND = 1e-6

Thread = tuple[Any, Any]


@dataclass(frozen=True)
class ProfileFacts:
    """What a reader of a trace needs to know of its run. Peaks are those of one device, None where unknown."""

    run_type: str
    world_size: int
    first_step: int
    steps: int
    tokens_per_step: int
    block_size: int
    micro_batch_size: int
    accumulation: int
    model: dict[str, Any]
    attn_implementation: str
    activation_checkpointing: str | None
    torch_compile: bool
    precision: str
    device: str
    device_name: str
    peak_flops: float | None
    peak_bytes_per_second: float | None
    torch: str
    pipeline_stages: int | None
    pipeline_schedule: str | None


def trace_metadata(facts: ProfileFacts, rank: int) -> str:
    """Return the JSON that a trace has under `METADATA_KEY`."""
    return json.dumps({"schema": SCHEMA, "rank": rank, **asdict(facts)})


@dataclass(slots=True, eq=False)
class Timed:
    """What a trace has a start and an end of, in microseconds."""

    name: str
    kind: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return (self.end - self.start) * MICROSECOND


@dataclass(slots=True, eq=False)
class Event(Timed):
    """Something that ran in a thread. `kind` is "op", "annotation" or "launch"; a parent encloses its children."""

    thread: Thread
    args: dict[str, Any]
    parent: "Event | None" = None
    children: list["Event"] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Kernel(Timed):
    """A kernel, copy or fill on a GPU. `launch`: the call on the CPU that launched it, where the trace has it."""

    launch: Event | None = None


@dataclass
class Trace:
    """The trace of one process. `base_time`: when its own clock was 0, in nanoseconds of the machine's clock."""

    file: Path
    rank: int
    facts: ProfileFacts
    host: str
    base_time: int
    threads: dict[Thread, list[Event]]  # by start, outer events first
    kernels: list[Kernel]
    links: dict[tuple[Thread, float], tuple[Thread, float]]  # start of a backward node -> of its operator
    steps: list[Event]

    @property
    def main(self) -> Thread:
        return self.steps[0].thread


@dataclass
class Recording:
    """The traces of all processes of a run."""

    label: str
    path: Path
    traces: list[Trace]

    @property
    def facts(self) -> ProfileFacts:
        return self.traces[0].facts


def read_recording(path: Path) -> Recording:
    """Read the traces of a run folder, of its profile folder, or one trace file by itself.

    Raises:
        UserError: naming the file that is missing, empty, truncated, foreign, or from a different run than the others.
    """
    if path.is_dir():
        folder = path if path.name == "profile" else path / "profile"
        run = folder.parent
        files = sorted(folder.glob("rank-*.json.gz"))
        if not files:
            raise UserError(f"{path}: holds no trace (profile/rank-*.json.gz); {HINT}")
    elif path.is_file():
        run, files = path.parent.parent, [path]
    else:
        raise UserError(f"{path}: there is no such run folder or trace; {HINT}")
    traces = [read_trace(file) for file in files]
    if path.is_dir():
        _check_same_run(path, traces)
    return Recording(run.name or str(run), path, traces)


def _check_same_run(path: Path, traces: list[Trace]) -> None:
    first = traces[0]
    for trace in traces[1:]:
        for key, value in vars(trace.facts).items():
            if value != (expected := getattr(first.facts, key)):
                raise UserError(
                    f"{trace.file}: belongs to a different run than {first.file}: {key} is {value!r}, not "
                    f"{expected!r}; profile the run again"
                )
    world_size = first.facts.world_size
    if sorted(trace.rank for trace in traces) != list(range(world_size)):
        raise UserError(
            f"{path}: holds {len(traces)} traces of a run of {world_size} processes; profile the run again"
        )


def read_trace(file: Path) -> Trace:
    """Read one file, `.json` or `.json.gz`.

    Raises:
        UserError: when it is not a complete trace of `python -m train --profile`.
    """
    content = _read_json(file)
    events = content.get("traceEvents") if isinstance(content, dict) else None
    if not isinstance(events, list):
        raise UserError(f"{file}: is JSON, but not a trace of torch.profiler; {HINT}")
    facts = content.get(METADATA_KEY)
    if not isinstance(facts, dict):
        raise UserError(f"{file}: is a trace of another program, without the facts of a run; {HINT}")
    if facts.get("schema") != SCHEMA or not isinstance(facts.get("rank"), int):
        raise UserError(
            f"{file}: has facts of version {facts.get('schema')!r} and rank {facts.get('rank')!r}; this version reads "
            f"version {SCHEMA}: {HINT}"
        )
    host, base_time = content.get("host_name", ""), content.get("baseTimeNanoseconds", 0)
    run = from_json(ProfileFacts, parse_json(json.dumps(facts), file), file, "python -m train --profile")
    try:
        threads, kernels = _sort_events(events)
        links = _links(events)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{file}: has an event that torch.profiler does not write ({shortened(error)}); {HINT}"
        ) from None
    every = (event for own in threads.values() for event in own)
    steps = [each for each in every if each.name.startswith(STEP) and each.kind == "annotation" and each.seconds > 0]
    if not steps:
        raise UserError(f"{file}: holds no complete step; {HINT}")
    return Trace(file, facts["rank"], run, host, base_time, threads, kernels, links, steps)


def _read_json(file: Path) -> Any:
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return json.load(stream)
    except (EOFError, OSError, zlib.error, ValueError, RecursionError) as error:  # of gzip, the disk, JSON
        raise UserError(f"{file}: is not a complete trace ({str(error) or type(error).__name__}); {HINT}") from None


def _sort_events(events: list[Any]) -> tuple[dict[Thread, list[Event]], list[Kernel]]:
    complete = [event for event in events if event.get("ph") == "X"]
    threads: dict[Thread, list[Event]] = defaultdict(list)
    launches: dict[Any, Event] = {}
    for event in complete:
        category = event.get("cat", "")
        kind = "launch" if LAUNCH.fullmatch(category) else CPU_CATEGORIES.get(category)
        if kind is not None:
            kind = "op" if COMPILED.match(event["name"]) else kind
            thread, args = (event["pid"], event["tid"]), event.get("args", {})
            threads[thread].append(Event(event["name"], kind, *_times(event), thread, args))
            if kind == "launch" and "correlation" in args:
                launches[args["correlation"]] = threads[thread][-1]
    kernels = [
        Kernel(event["name"], event["cat"], *_times(event), launches.get(event.get("args", {}).get("correlation")))
        for event in complete
        if event.get("cat") in GPU_CATEGORIES
    ]
    for own in threads.values():
        _nest(own)
    return dict(threads), sorted(kernels, key=lambda kernel: kernel.start)


def _times(event: dict[str, Any]) -> tuple[float, float]:
    start = float(event["ts"])
    end = start + float(event["dur"])
    if not abs(end) < BEYOND_NUMBERS:
        raise ValueError(f"ts {event['ts']}, dur {event['dur']}")
    return start, end


def _nest(events: list[Event]) -> None:
    """Sort the events of one thread in place and give each its parent."""
    events.sort(key=lambda event: (event.start, -event.end))
    open_events: list[Event] = []
    for event in events:
        while open_events and open_events[-1].end <= event.start:
            open_events.pop()
        if open_events:
            event.parent = open_events[-1]
            event.parent.children.append(event)
            event.end = min(event.end, event.parent.end)  # each time is rounded to nanoseconds by itself
        open_events.append(event)


def _links(events: list[Any]) -> dict[tuple[Thread, float], tuple[Thread, float]]:
    """Return torch's own links from backward nodes to the operators that created them, by their sequence numbers."""
    ends: dict[Any, dict[str, tuple[Thread, float]]] = defaultdict(dict)
    for event in events:
        if event.get("cat") == "fwdbwd" and event.get("ph") in ("s", "f"):
            ends[event["id"]][event["ph"]] = ((event["pid"], event["tid"]), float(event["ts"]))
    return {both["f"]: both["s"] for both in ends.values() if len(both) == 2}


def ancestors(event: Event | None) -> Iterator[Event]:
    """Yield the event itself, what it is inside of, and so on to the outermost."""
    while event is not None:
        yield event
        event = event.parent
