"""The account of a run: every second of its steps given to a module, a phase, a category and an operator.

On a CPU the second belongs to the innermost operator that the main thread is in, or to the gap between operators. On a
GPU it belongs to the kernel that runs, of several to the one that computes rather than communicates or copies, or to
the gap between kernels. So the rows of a step add up to its wall time; a kernel's whole time, hidden or not, is its
busy time.
"""

import heapq
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from train.kernels.attribution import NOWHERE, Place, Places, categorise
from train.kernels.op_costs import flops, moved_bytes
from train.kernels.traces import Event, Kernel, Recording, Trace, ancestors

IDLE = "idle and launch gaps"
BETWEEN_OPERATORS, BETWEEN_KERNELS, WAITING = "between operators", "no kernel runs", "waiting for other processes"
OUTSIDE = "outside of the named regions"
MICROSECOND = 1e-6
LAYER = re.compile(r"(?<=\.h\.)\d+")


class Key(NamedTuple):
    """`module` in full, e.g. "transformer.h.3.attn"; `kernel` is empty on a CPU."""

    module: str
    phase: str
    category: str
    operator: str
    kernel: str

    @property
    def any_layer(self) -> "Key":
        return self._replace(module=LAYER.sub("*", self.module))


@dataclass
class Row:
    """What a key takes: wall seconds (they add up), busy seconds (they may overlap), launches, FLOPs and bytes.

    `flops_seconds` are those of the launches whose FLOPs are known, `bytes_seconds` likewise.
    """

    seconds: float = 0.0
    busy: float = 0.0
    launches: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    flops_seconds: float = 0.0
    bytes_seconds: float = 0.0

    def add(self, other: "Row", share: float = 1.0) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + share * value)


@dataclass
class Account:
    """Means per step and process. `steps` holds the wall seconds of each recorded step, of each process in turn."""

    rows: dict[Key, Row] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    unaccounted: float = 0.0

    def row(self, key: Key) -> Row:
        return self.rows.setdefault(key, Row())

    @property
    def seconds(self) -> float:
        return sum(self.steps) / len(self.steps)


def account(recording: Recording) -> Account:
    """The account of all processes' steps, divided by how many there are."""
    total = Account()
    for trace in recording.traces:
        own = _gpu_account(trace) if trace.kernels else _cpu_account(trace)
        total.steps += [(step.end - step.start) * MICROSECOND for step in trace.steps]
        total.unaccounted += own.unaccounted
        for key, row in own.rows.items():
            total.row(key).add(row)
    share = 1 / len(total.steps)
    total.unaccounted *= share
    total.rows = {key: _scaled(row, share) for key, row in total.rows.items()}
    return total


def _scaled(row: Row, share: float) -> Row:
    scaled = Row()
    scaled.add(row, share)
    return scaled


def _cpu_account(trace: Trace) -> Account:
    found, places = Account(), Places(trace)
    waits = _merged(_communication_elsewhere(trace))
    counted = _counted(trace.threads[trace.main])
    for step in trace.steps:
        for event in _inside(step):
            place = places[event]
            gaps = list(_gaps(event))
            own = sum(end - start for start, end in gaps) * MICROSECOND
            if event.kind == "region":
                waited = sum(_overlap(waits, start, end) for start, end in gaps) * MICROSECOND
                if place.phase == "communication":
                    waited = own
                found.row(Key(place.module, place.phase, "communication", WAITING, "")).seconds += waited
                if place == NOWHERE:
                    found.unaccounted += own - waited
                    key = Key("", "", "other", OUTSIDE, "")
                else:
                    key = Key(place.module, place.phase, IDLE, BETWEEN_OPERATORS, "")
                found.row(key).seconds += own - waited
                continue
            row = found.row(Key(place.module, place.phase, categorise(event.name, place, event), event.name, ""))
            row.seconds += own
            row.busy += own
            row.launches += 1
            if event in counted:
                _count(row, event, (event.end - event.start) * MICROSECOND)
    found.rows = {key: row for key, row in found.rows.items() if row.seconds > 0 or row.launches}
    return found


def _gpu_account(trace: Trace) -> Account:
    found, places = Account(), Places(trace)
    windows = [(step.start, step.end) for step in trace.steps]
    counted = {event for own in trace.threads.values() for event in _counted(own)}
    keys: list[Key] = []
    longest: dict[Event, int] = {}
    for index, kernel in enumerate(trace.kernels):
        launch = kernel.launch
        place = places[launch] if launch is not None else NOWHERE
        operator = next((event for event in ancestors(launch) if event.kind == "op"), None)
        name = operator.name if operator is not None else ""
        if launch is None:
            category = categorise(kernel.name, Place(places.phase_at(kernel.start), ""), None)
        elif kernel.kind != "kernel" and place.phase != "optimizer":
            category = "copies"
        else:
            category = categorise(_telling(kernel.name, name), place, operator)
        keys.append(Key(place.module, place.phase, category, name, kernel.name))
        if any(start <= kernel.start < end for start, end in windows):
            row = found.row(keys[-1])
            row.busy += (kernel.end - kernel.start) * MICROSECOND
            row.launches += 1
            source = next((event for event in ancestors(launch) if event in counted), None)
            if source is not None:
                other = longest.get(source)
                if other is None or _length(trace.kernels[other]) < _length(kernel):
                    longest[source] = index
    for source, index in longest.items():
        _count(found.row(keys[index]), source, _length(trace.kernels[index]) * MICROSECOND)
    for start, end in windows:
        for begin, stop, running in _exclusive(trace.kernels, [key.category for key in keys], start, end):
            if running is not None:
                found.row(keys[running]).seconds += (stop - begin) * MICROSECOND
                if not keys[running].phase:
                    found.unaccounted += (stop - begin) * MICROSECOND
                continue
            cuts = [begin, *places.phase_changes(begin, stop), stop]
            for left, right in pairwise(cuts):
                key = Key("", places.phase_at(left), IDLE, BETWEEN_KERNELS, "")
                found.row(key).seconds += (right - left) * MICROSECOND
    return found


def _telling(kernel: str, operator: str) -> str:
    """The name to judge a kernel by: its operator's; its own where that is all there is, or where it communicates."""
    return kernel if not operator or "nccl" in kernel.lower() else operator


def _length(kernel: Kernel) -> float:
    return kernel.end - kernel.start


def _exclusive(
    kernels: list[Kernel], categories: list[str], start: float, end: float
) -> Iterator[tuple[float, float, int | None]]:
    """The time from `start` to `end` in pieces, each with the one kernel that it is given to, or None."""
    ranks = {"communication": 1, "copies": 2}
    edges = sorted({start, end, *(t for k in kernels for t in (k.start, k.end) if start < t < end)})
    waiting = sorted(range(len(kernels)), key=lambda index: kernels[index].start)
    running: list[tuple[int, float, int]] = []
    position = 0
    for left, right in pairwise(edges):
        while position < len(waiting) and kernels[waiting[position]].start <= left:
            index = waiting[position]
            heapq.heappush(running, (ranks.get(categories[index], 0), kernels[index].start, index))
            position += 1
        while running and kernels[running[0][2]].end <= left:
            heapq.heappop(running)
        yield left, right, running[0][2] if running else None


def _inside(step: Event) -> Iterator[Event]:
    """The step itself and everything in it."""
    pending = [step]
    while pending:
        event = pending.pop()
        yield event
        pending += event.children


def _gaps(event: Event) -> Iterator[tuple[float, float]]:
    """The stretches of an event in which none of its children runs."""
    cursor = event.start
    for child in event.children:
        if child.start > cursor:
            yield cursor, child.start
        cursor = child.end
    if event.end > cursor:
        yield cursor, event.end


def _counted(events: list[Event]) -> set[Event]:
    """The innermost operators with FLOPs, and those with bytes that have none with FLOPs around them."""
    with_flops = {event for event in events if event.kind == "op" and flops(event.name, event.args)}
    outer = {above for event in with_flops for above in ancestors(event.parent)}
    innermost = with_flops - outer
    rest = {
        event
        for event in events
        if event.kind == "op"
        and event not in outer
        and not any(above in innermost for above in ancestors(event))
        and moved_bytes(event.name, event.args)
    }
    within = {above for event in rest for above in ancestors(event.parent)}
    return innermost | (rest - within)


def _count(row: Row, event: Event, seconds: float) -> None:
    operations, moved = flops(event.name, event.args), moved_bytes(event.name, event.args)
    if operations:
        row.flops += operations
        row.flops_seconds += seconds
    if moved:
        row.bytes += moved
        row.bytes_seconds += seconds


def _communication_elsewhere(trace: Trace) -> list[tuple[float, float]]:
    """When other threads than the main one communicate: gloo does so in its own."""
    return [
        (event.start, event.end)
        for thread, own in trace.threads.items()
        if thread != trace.main
        for event in own
        if categorise(event.name, NOWHERE, event) == "communication"
    ]


def _merged(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _overlap(merged: list[tuple[float, float]], start: float, end: float) -> float:
    total = 0.0
    for begin, stop in merged[max(0, bisect_left(merged, (start, start)) - 1) :]:
        if begin >= end:
            break
        total += max(0.0, min(stop, end) - max(begin, start))
    return total


def by(rows: dict[Key, Row], *fields: str) -> dict[tuple[str, ...], Row]:
    """The rows summed over all but some fields of their keys, the longest first; layers are added up."""
    sums: dict[tuple[str, ...], Row] = {}
    for key, row in rows.items():
        sums.setdefault(tuple(getattr(key.any_layer, name) for name in fields), Row()).add(row)
    return dict(sorted(sums.items(), key=lambda item: -item[1].seconds))


def by_layer(rows: dict[Key, Row]) -> dict[tuple[str, str], float]:
    """Wall seconds of every single module in every phase."""
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for key, row in rows.items():
        seconds[key.module, key.phase] += row.seconds
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))
