"""Breakdown of a run's steps: every second is given to one module, phase, category and operator.

On a CPU a second belongs to the innermost operator that the main thread is in, or to the gap between operators. On a
GPU it belongs to the kernel that runs (of several to the one that computes rather than communicates or copies), or to
the gap between kernels. So the rows of a step add up to its wall time; the time in which a kernel runs, hidden or not,
is its busy time.
"""

import heapq
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

from train.kernels.attribution import IDLE, NO_SCOPE, Scope, Scopes, categorize
from train.kernels.op_costs import flops, moved_bytes
from train.kernels.pipeline_timeline import timeline
from train.kernels.summary import NAMES, Row, RowNames, RunSummary, group
from train.kernels.traces import MICROSECOND, Event, Kernel, Recording, Trace, ancestors

BETWEEN_OPERATORS, BETWEEN_KERNELS, WAITING = "between operators", "no kernel runs", "waiting for other processes"
OUTSIDE = "outside of all annotations"
LAYER = re.compile(r"(?<=\.h\.)\d+")


@dataclass
class Costs:
    """What a key takes: wall seconds (they add up), busy seconds (they may overlap), launches, FLOPs and bytes.

    `flops_seconds` are those of the launches whose FLOPs are known, `bytes_seconds` likewise.
    """

    seconds: float = 0.0
    busy_seconds: float = 0.0
    launches: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    flops_seconds: float = 0.0
    bytes_seconds: float = 0.0

    def add(self, other: "Costs", share: float = 1.0) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + share * value)


@dataclass
class Breakdown:
    """Means per step and process. `steps` holds the wall seconds of each recorded step, of each process in turn."""

    costs: defaultdict[RowNames, Costs] = field(default_factory=lambda: defaultdict(Costs))
    steps: list[float] = field(default_factory=list)
    unattributed: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.steps) / len(self.steps)

    def of(self, scope: Scope, category: str, operator: str) -> Costs:
        return self.costs[RowNames(scope.module, scope.phase, category, operator, kernel="")]


def summarize(recording: Recording) -> RunSummary:
    """Break the steps of a run down and sum them up as `kernels.json` has them."""
    found = break_down(recording)
    every = [_row(key, costs) for key, costs in found.costs.items()]
    rows = list(group([replace(row, module=LAYER.sub("*", row.module)) for row in every], *NAMES).values())
    return RunSummary(
        label=recording.label,
        path=str(recording.path),
        processes=len(recording.traces),
        facts=recording.facts,
        step_seconds=found.seconds,
        step_seconds_min=min(found.steps),
        step_seconds_max=max(found.steps),
        attributed_share=1 - found.unattributed / found.seconds,
        unattributed_seconds=found.unattributed,
        rows=rows,
        categories=list(group(rows, "category").values()),
        phases=list(group(rows, "phase").values()),
        modules=list(group(rows, "module").values()),
        layers=list(group(every, "module", "phase").values()),
        pipeline=timeline(recording),
    )


def _row(key: RowNames, costs: Costs) -> Row:
    return Row(
        **vars(key),
        seconds=costs.seconds,
        busy_seconds=costs.busy_seconds,
        launches=costs.launches,
        flops=costs.flops,
        bytes=costs.bytes,
        flops_per_second=costs.flops / costs.flops_seconds if costs.flops_seconds else None,
        bytes_per_second=costs.bytes / costs.bytes_seconds if costs.bytes_seconds else None,
    )


def break_down(recording: Recording) -> Breakdown:
    """Return the mean over the steps of all processes."""
    total = Breakdown()
    total.steps = [step.seconds for trace in recording.traces for step in trace.steps]
    for trace in recording.traces:
        own = _break_down_gpu(trace) if trace.kernels else _break_down_cpu(trace)
        total.unattributed += own.unattributed / len(total.steps)
        for key, costs in own.costs.items():
            total.costs[key].add(costs, 1 / len(total.steps))
    return total


def _break_down_cpu(trace: Trace) -> Breakdown:
    found, scopes = Breakdown(), Scopes(trace)
    waits = _merged(_communication_elsewhere(trace))
    with_costs = _operators_with_costs(trace.threads[trace.main])
    for step in trace.steps:
        for event in _inside(step):
            scope = scopes[event]
            gaps = list(_gaps(event))
            own = sum(end - start for start, end in gaps) * MICROSECOND
            if event.kind == "annotation":
                waited = sum(_overlap(waits, start, end) for start, end in gaps) * MICROSECOND
                if scope.phase == "communication":
                    waited = own
                if waited:
                    found.of(scope, "communication", WAITING).seconds += waited
                if own > waited and scope == NO_SCOPE:
                    found.of(scope, "other", OUTSIDE).seconds += own - waited
                    found.unattributed += own - waited
                elif own > waited:
                    found.of(scope, IDLE, BETWEEN_OPERATORS).seconds += own - waited
                continue
            costs = found.of(scope, categorize(event.name, scope, event), event.name)
            costs.seconds += own
            costs.busy_seconds += own
            costs.launches += 1
            if event in with_costs:
                _add_work(costs, event, event.seconds)
    return found


def _break_down_gpu(trace: Trace) -> Breakdown:
    found, scopes = Breakdown(), Scopes(trace)
    with_costs = {event for own in trace.threads.values() for event in _operators_with_costs(own)}
    names = {kernel: _kernel_names(kernel, scopes) for kernel in trace.kernels}
    longest: dict[Event, Kernel] = {}  # the kernel of each operator that takes its FLOPs and bytes
    for kernel in trace.kernels:
        if not any(step.start <= kernel.start < step.end for step in trace.steps):
            continue
        costs = found.costs[names[kernel]]
        costs.busy_seconds += kernel.seconds
        costs.launches += 1
        operator = next((event for event in ancestors(kernel.launch) if event in with_costs), None)
        if operator is not None:
            longest[operator] = max(longest.get(operator, kernel), kernel, key=lambda each: each.seconds)
    for operator, kernel in longest.items():
        _add_work(found.costs[names[kernel]], operator, kernel.seconds)
    for step in trace.steps:
        for start, end, running in _exclusive(names, step):
            if running is not None:
                found.costs[names[running]].seconds += (end - start) * MICROSECOND
                if not names[running].phase:
                    found.unattributed += (end - start) * MICROSECOND
                continue
            for left, right in pairwise([start, *scopes.phase_changes(start, end), end]):
                idle = found.of(Scope(scopes.phase_at(left), ""), IDLE, BETWEEN_KERNELS)
                idle.seconds += (right - left) * MICROSECOND
    return found


def _kernel_names(kernel: Kernel, scopes: Scopes) -> RowNames:
    launch = kernel.launch
    if launch is None:
        scope = Scope(scopes.phase_at(kernel.start), "")
        return RowNames("", "", categorize(kernel.name, scope, None), "", kernel.name)
    scope = scopes[launch]
    operator = next((event for event in ancestors(launch) if event.kind == "op"), None)
    name = operator.name if operator is not None else ""
    if kernel.kind != "kernel" and scope.phase != "optimizer":
        category = "copies"
    else:
        # An operator's name tells more than its kernel's, apart from NCCL's kernels.
        by_kernel = not name or "nccl" in kernel.name.lower()
        category = categorize(kernel.name if by_kernel else name, scope, operator)
    return RowNames(scope.module, scope.phase, category, name, kernel.name)


def _exclusive(names: dict[Kernel, RowNames], step: Event) -> Iterator[tuple[float, float, Kernel | None]]:
    """Yield the intervals of a step, each with the one kernel that it belongs to. `names` has the kernels by start."""
    ranks = {"communication": 1, "copies": 2}
    kernels = list(names)
    times = (time for kernel in kernels for time in (kernel.start, kernel.end))
    edges = sorted({step.start, step.end, *(time for time in times if step.start < time < step.end)})
    running: list[tuple[int, int]] = []
    started = 0
    for start, end in pairwise(edges):
        while started < len(kernels) and kernels[started].start <= start:
            heapq.heappush(running, (ranks.get(names[kernels[started]].category, 0), started))
            started += 1
        while running and kernels[running[0][1]].end <= start:
            heapq.heappop(running)
        yield start, end, kernels[running[0][1]] if running else None


def _inside(step: Event) -> Iterator[Event]:
    """Yield the step itself and everything in it."""
    pending = [step]
    while pending:
        event = pending.pop()
        yield event
        pending += event.children


def _gaps(event: Event) -> Iterator[tuple[float, float]]:
    """Yield the intervals of an event in which none of its children runs."""
    cursor = event.start
    for child in event.children:
        if child.start > cursor:
            yield cursor, child.start
        cursor = child.end
    if event.end > cursor:
        yield cursor, event.end


def _operators_with_costs(events: list[Event]) -> set[Event]:
    """Return the innermost operators with FLOPs, and outside of them the innermost with bytes."""
    operators = [event for event in events if event.kind == "op"]
    innermost = _innermost({event for event in operators if flops(event.name, event.args)})
    outer = {above for event in innermost for above in ancestors(event.parent)}
    rest = {
        event
        for event in operators
        if event not in outer
        and not any(above in innermost for above in ancestors(event))
        and moved_bytes(event.name, event.args)
    }
    return innermost | _innermost(rest)


def _innermost(events: set[Event]) -> set[Event]:
    return events - {above for event in events for above in ancestors(event.parent)}


def _add_work(costs: Costs, event: Event, seconds: float) -> None:
    """Add the FLOPs and bytes of an operator that takes some seconds."""
    if operations := flops(event.name, event.args):
        costs.flops += operations
        costs.flops_seconds += seconds
    if moved := moved_bytes(event.name, event.args):
        costs.bytes += moved
        costs.bytes_seconds += seconds


def _communication_elsewhere(trace: Trace) -> list[tuple[float, float]]:
    """Return when threads other than the main one communicate, as gloo's does."""
    return [
        (event.start, event.end)
        for thread, own in trace.threads.items()
        if thread != trace.main
        for event in own
        if categorize(event.name, NO_SCOPE, event) == "communication"
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
