"""What each process of a pipeline does when, and the share of a step in which its stages wait for one another.

A stage is at work while it runs a micro-batch forward or backward: on a GPU from the first of its kernels to the last,
on a CPU as long as the call takes. All else between a pipeline's first forward and its last backward is idle,
communication too. The processes of one machine share a clock; those of several machines need not.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from train.kernels.attribution import COMMUNICATION
from train.kernels.traces import Event, Kernel, Recording, Trace, ancestors
from train.metrics.annotations import PHASES, stage_of

AT_WORK = ("forward", "backward")
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Piece:
    """Something that a process does, in seconds since the step began in any process.

    `stage` is None, and `micro_batch` (from 0, in the order of the schedule) too, for what belongs to none.
    """

    phase: str
    stage: int | None
    micro_batch: int | None
    start: float
    end: float


def timeline(recording: Recording) -> dict[str, Any] | None:
    """A pipelined run's last recorded step as it ran, and how idle its steps were; None for a run without stages.

    - `idle_share`: of the time from the first forward to the last backward, over all recorded steps and processes;
      `steps` has each step's. `theory`: (p - 1) / (m + p - 1) of 1F1B with p `stages` and m `micro_batches`, all alike
      (Huang et al., GPipe, 2019, section 2.3); null for other schedules.
    - `one_clock`: whether all processes ran on one machine; else their rows may be shifted against one another.
    - `rows`: for each pipeline rank (of the first data-parallel replica) its global `rank` and its `pieces`.
    """
    facts = recording.facts
    size = facts.get("pipeline_stages") or 1
    if size < 2 or len(recording.traces) < facts["world_size"]:
        return None
    steps = min(len(trace.steps) for trace in recording.traces)
    launched = [_launched(trace) for trace in recording.traces]
    every = [
        [_pieces(trace, trace.steps[index], own) for trace, own in zip(recording.traces, launched, strict=True)]
        for index in range(steps)
    ]
    works = [_work(step) for step in every]
    shares = [1 - busy / whole for busy, whole in works if whole > 0]
    if not shares:
        return None
    micro_batches = facts["accumulation"]
    replicas = len(recording.traces) // size
    return {
        "schedule": facts.get("pipeline_schedule"),
        "stages": size,
        "micro_batches": micro_batches,
        "idle_share": 1 - sum(busy for busy, _ in works) / sum(whole for _, whole in works),
        "theory": (size - 1) / (micro_batches + size - 1) if facts.get("pipeline_schedule") == "1f1b" else None,
        "steps": shares,
        "one_clock": len({trace.host for trace in recording.traces}) == 1,
        "rows": [
            {"rank": rank, "pieces": [asdict(piece) for piece in pieces]}
            for rank, pieces in list(enumerate(_aligned(recording.traces, steps - 1, every[-1])))[::replicas]
        ],
    }


def _launched(trace: Trace) -> list[tuple[Event, Kernel]]:
    """The kernels of a trace with what launched them, in that order."""
    found = [(kernel.launch, kernel) for kernel in trace.kernels if kernel.launch is not None]
    return sorted(found, key=_launch_time)


def _launch_time(launched: tuple[Event, Kernel]) -> float:
    return launched[0].start


def _pieces(trace: Trace, step: Event, launched: Sequence[tuple[Event, Kernel]]) -> list[Piece]:
    """What the process does in a step, in seconds of its own clock since the step began there."""
    counted: Counter[tuple[str, int | None]] = Counter()
    pieces = []
    for event in _phases(step):
        stages = [stage_of(child.name) for child in event.children]
        stage = next((each for each in stages if each is not None), None)
        micro_batch = None
        if event.name in AT_WORK:
            micro_batch = counted[event.name, stage]
            counted[event.name, stage] += 1
        extent = _extent(event, launched) if trace.kernels else (event.start, event.end)
        if extent is not None:
            start, end = ((time - step.start) * MICROSECOND for time in extent)
            pieces.append(Piece(event.name, stage, micro_batch, start, end))
    return pieces


def _phases(step: Event) -> list[Event]:
    """The outermost regions of phases in a step, in their order."""
    found, pending = [], [step]
    while pending:
        event = pending.pop()
        if event.kind == "region" and event.name in PHASES:
            found.append(event)
        else:
            pending += reversed(event.children)
    return found


def _extent(event: Event, launched: Sequence[tuple[Event, Kernel]]) -> tuple[float, float] | None:
    """When the kernels of a phase begin and end, whichever thread has launched them; None where it has none.

    Communication beside a forward or backward pass does not prolong it.
    """
    first, last = (bisect_left(launched, time, key=_launch_time) for time in (event.start, event.end))
    kernels = [
        kernel
        for launch, kernel in launched[first:last]
        if event.name not in AT_WORK or not _communicates(kernel.name, launch)
    ]
    if not kernels:
        return None
    return min(kernel.start for kernel in kernels), max(kernel.end for kernel in kernels)


def _communicates(kernel: str, launch: Event) -> bool:
    return any(map(COMMUNICATION.search, [kernel, *(above.name for above in ancestors(launch) if above.kind == "op")]))


def _work(processes: Sequence[Sequence[Piece]]) -> tuple[float, float]:
    """(seconds at work, seconds from the first forward to the last backward), both summed over the processes.

    The longest of the processes' own spans stands for all: the first pipeline rank begins first and ends last. So
    clocks that differ do no harm.
    """
    busy, span = 0.0, 0.0
    for pieces in processes:
        work = [piece for piece in pieces if piece.phase in AT_WORK]
        if work:
            busy += sum(piece.end - piece.start for piece in work)
            span = max(span, max(piece.end for piece in work) - min(piece.start for piece in work))
    return busy, span * len(processes)


def _aligned(traces: Sequence[Trace], index: int, processes: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """The pieces of a step on the clock of the machine, from when it begins in the first process."""
    # In whole nanoseconds, of which a float would lose some hundreds.
    begins = [trace.began + round(trace.steps[index].start * 1000) for trace in traces]
    shifts = [(begin - min(begins)) * 1e-9 for begin in begins]
    return [
        [Piece(p.phase, p.stage, p.micro_batch, p.start + shift, p.end + shift) for p in pieces]
        for shift, pieces in zip(shifts, processes, strict=True)
    ]
