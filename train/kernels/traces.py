"""A profile's traces, read and checked: which events ran in which thread, inside of which, on the CPU and the GPU.

The format is that of torch.profiler's `export_chrome_trace`. Times are microseconds of the trace's own clock.
"""

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.utils.errors import UserError

SCHEMA = 1
"""Version of the facts under "gpt2flash" that are understood."""

STEP = "ProfilerStep#"
CPU_CATEGORIES = {"cpu_op": "op", "user_annotation": "region", "cuda_runtime": "launch", "cuda_driver": "launch"}
GPU_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
# torch.compile marks its graphs as annotations, but what they take is their own work, not time between operators.
COMPILED = re.compile(r"(## Call )?Compiled|Torch-Compiled|triton_|CompiledFunction")
NEEDED = (
    "rank", "world_size", "first_step", "steps", "device_name", "run_type", "tokens_per_step", "block_size", "model",
)  # fmt: skip
HOW = "make one with python -m train --profile"

Thread = tuple[Any, Any]


@dataclass(slots=True, eq=False)
class Event:
    """Something that ran in a thread. `kind` is "op", "region" or "launch"; parents hold their children wholly."""

    name: str
    kind: str
    thread: Thread
    start: float
    end: float
    args: dict[str, Any]
    parent: "Event | None" = None
    children: list["Event"] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Kernel:
    """Work of a GPU. `launch`: the call on the CPU that began it, where the trace has it."""

    name: str
    kind: str
    start: float
    end: float
    launch: Event | None


@dataclass
class Trace:
    """One process's trace. `began`: the time of the machine's clock, in nanoseconds, at which its own begins."""

    file: Path
    facts: dict[str, Any]
    host: str
    began: int
    threads: dict[Thread, list[Event]]  # by start, outer ones first
    kernels: list[Kernel]
    links: dict[tuple[Thread, float], tuple[Thread, float]]  # starts of a backward node and of its operator
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
    def facts(self) -> dict[str, Any]:
        return self.traces[0].facts

    @property
    def device(self) -> str:
        return "cuda" if any(trace.kernels for trace in self.traces) else "cpu"


def read_recording(path: Path) -> Recording:
    """The traces of a run folder, of its profile folder, or one trace file by itself.

    Raises:
        UserError: naming the file that is missing, empty, cut short, foreign, or of another run than the others.
    """
    if path.is_dir():
        folder = path if path.name == "profile" else path / "profile"
        run = folder.parent
        files = sorted(folder.glob("rank-*.json.gz"))
        if not files:
            raise UserError(f"{path}: holds no trace (profile/rank-*.json.gz); {HOW}")
    elif path.exists():
        run, files = path.parent.parent, [path]
    else:
        raise UserError(f"{path}: there is no such run folder or trace; {HOW}")
    traces = [read_trace(file) for file in files]
    if path.is_dir():
        _check_same_run(path, traces)
    return Recording(run.name or str(run), path, traces)


def _check_same_run(path: Path, traces: list[Trace]) -> None:
    first = traces[0]
    for trace in traces[1:]:
        for key, value in first.facts.items():
            if key != "rank" and trace.facts.get(key) != value:
                raise UserError(
                    f"{trace.file}: is of another run than {first.file}: {key} is {trace.facts.get(key)!r} and there "
                    f"{value!r}; profile the run again"
                )
    expected = first.facts["world_size"]
    if sorted(trace.facts["rank"] for trace in traces) != list(range(expected)):
        raise UserError(f"{path}: holds {len(traces)} traces of a run of {expected} processes; profile the run again")


def read_trace(file: Path) -> Trace:
    """One file, `.json` or `.json.gz`.

    Raises:
        UserError: when it is not a whole trace of `python -m train --profile`.
    """
    content = _read_json(file)
    events = content.get("traceEvents") if isinstance(content, dict) else None
    if not isinstance(events, list):
        raise UserError(f"{file}: is JSON, but no trace of torch.profiler; {HOW}")
    facts = content.get("gpt2flash")
    if not isinstance(facts, dict):
        raise UserError(f"{file}: is a trace of another program, without the facts of a run; {HOW}")
    if facts.get("schema") != SCHEMA:
        raise UserError(f"{file}: has facts of version {facts.get('schema')!r}, not {SCHEMA}; read it with its own")
    missing = [key for key in NEEDED if key not in facts]
    if missing:
        raise UserError(f"{file}: its facts of the run lack {', '.join(missing)}; {HOW}")
    host, began = content.get("host_name", ""), content.get("baseTimeNanoseconds", 0)
    if not isinstance(host, str) or not isinstance(began, int):
        raise UserError(f"{file}: has {host!r} for host_name and {began!r} for baseTimeNanoseconds; {HOW}")
    try:
        threads, kernels = _sort_events(events)
        links = _links(events)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: has an event that torch.profiler does not write ({error!r}); {HOW}") from None
    steps = [
        event for own in threads.values() for event in own if event.name.startswith(STEP) and event.kind == "region"
    ]
    if not steps:
        raise UserError(f"{file}: holds no whole step; {HOW}")
    return Trace(file, facts, host, began, threads, kernels, links, steps)


def _read_json(file: Path) -> Any:
    if not file.stat().st_size:
        raise UserError(f"{file}: is empty; {HOW}")
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return json.load(stream)
    except EOFError:
        raise UserError(f"{file}: is cut short; {HOW}") from None
    except (gzip.BadGzipFile, zlib.error):
        raise UserError(f"{file}: is not a gzip file, or damaged; {HOW}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is not JSON, or cut short ({error}); {HOW}") from None


def _sort_events(events: list[Any]) -> tuple[dict[Thread, list[Event]], list[Kernel]]:
    threads: dict[Thread, list[Event]] = defaultdict(list)
    launches: dict[Any, Event] = {}
    on_gpu = []
    for event in events:
        if event.get("ph") != "X":
            continue
        category = event.get("cat")
        if category in GPU_CATEGORIES:
            on_gpu.append(event)
        elif category in CPU_CATEGORIES:
            name, args, start = event["name"], event.get("args", {}), float(event["ts"])
            kind = "op" if COMPILED.match(name) else CPU_CATEGORIES[category]
            thread = (event["pid"], event["tid"])
            threads[thread].append(Event(name, kind, thread, start, start + float(event["dur"]), args))
            if kind == "launch" and "correlation" in args:
                launches[args["correlation"]] = threads[thread][-1]
    kernels = [
        Kernel(
            event["name"],
            event["cat"],
            float(event["ts"]),
            float(event["ts"]) + float(event["dur"]),
            launches.get(event.get("args", {}).get("correlation")),
        )
        for event in on_gpu
    ]
    for own in threads.values():
        _nest(own)
    return dict(threads), sorted(kernels, key=lambda kernel: kernel.start)


def _nest(events: list[Event]) -> None:
    """Give the events of one thread, in place, their order and their parents."""
    events.sort(key=lambda event: (event.start, -event.end))
    open_events: list[Event] = []
    for event in events:
        while open_events and open_events[-1].end <= event.start:
            open_events.pop()
        if open_events:
            event.parent = open_events[-1]
            event.parent.children.append(event)
            event.end = min(event.end, event.parent.end)  # times are rounded to nanoseconds, each by itself
        open_events.append(event)


def _links(events: list[Any]) -> dict[tuple[Thread, float], tuple[Thread, float]]:
    """torch's own links between operators and the backward nodes that they left, found by their sequence numbers."""
    ends: dict[Any, dict[str, tuple[Thread, float]]] = defaultdict(dict)
    for event in events:
        if event.get("cat") == "fwdbwd" and event.get("ph") in ("s", "f"):
            ends[event["id"]][event["ph"]] = ((event["pid"], event["tid"]), float(event["ts"]))
    return {both["f"]: both["s"] for both in ends.values() if len(both) == 2}


def ancestors(event: Event | None) -> Iterator[Event]:
    """The event itself, what it is inside of, and so on to the outermost."""
    while event is not None:
        yield event
        event = event.parent
