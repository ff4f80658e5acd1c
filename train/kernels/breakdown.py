"""Breakdown of a run's steps: every second is given to one module, phase, category and operator.

On a CPU a second belongs to the innermost operator that the main thread is in, or to the gap between operators. On a
GPU it belongs to the kernel that runs (of several to the one that computes rather than communicates or copies), or to
the gap between kernels. So the rows of a step add up to its wall time; the time in which a kernel runs, hidden or not,
is its busy time.
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

from train.kernels.attribution import IDLE, NO_SCOPE, Scope, Scopes, categorize
from train.kernels.op_costs import flops, moved_bytes
from train.kernels.pipeline_timeline import timeline
from train.kernels.summary import COSTS, NAMES, Row, RowNames, RunSummary, group
from train.kernels.traces import MICROSECOND, Event, Kernel, Recording, Trace, ancestors

BETWEEN_OPERATORS, BETWEEN_KERNELS, WAITING = "between operators", "no kernel runs", "waiting for other processes"
OUTSIDE = "outside of all annotations"
LAYER = re.compile(r"(?<=\.h\.)\d+")


def summarize(recording: Recording) -> RunSummary:
    """Break the steps of a run down; the rows are means over the steps of all processes."""
    steps = [step.seconds for trace in recording.traces for step in trace.steps]
    parts = (part for trace in recording.traces for part in (_gpu_parts if trace.kernels else _cpu_parts)(trace))
    every = [
        replace(row, **{cost: getattr(row, cost) / len(steps) for cost in COSTS})
        for row in group(parts, *NAMES).values()
    ]
    rows = list(group([replace(row, module=LAYER.sub("*", row.module)) for row in every], *NAMES).values())
    mean = sum(steps) / len(steps)
    unattributed = sum(row.seconds for row in rows if row.operator == OUTSIDE or (row.kernel and not row.phase))
    return RunSummary(
        label=recording.label,
        path=str(recording.path),
        processes=len(recording.traces),
        facts=recording.facts,
        step_seconds=mean,
        step_seconds_min=min(steps),
        step_seconds_max=max(steps),
        attributed_share=1 - unattributed / mean,
        unattributed_seconds=unattributed,
        rows=rows,
        categories=list(group(rows, "category").values()),
        phases=list(group(rows, "phase").values()),
        modules=list(group(rows, "module").values()),
        layers=list(group(every, "module", "phase").values()),
        pipeline=timeline(recording),
    )


def _part(
    names: RowNames,
    seconds: float = 0.0,
    busy_seconds: float = 0.0,
    launches: float = 0.0,
    work: Event | None = None,
    work_seconds: float = 0.0,
) -> Row:
    """Return what an interval or a launch adds to a row; `work`'s FLOPs and bytes take `work_seconds`."""
    operations = moved = 0
    if work is not None:
        operations, moved = flops(work.name, work.args) or 0, moved_bytes(work.name, work.args) or 0
    return Row(
        **vars(names),
        seconds=seconds,
        busy_seconds=busy_seconds,
        launches=launches,
        flops=operations,
        bytes=moved,
        flops_per_second=operations / work_seconds if operations and work_seconds else None,
        bytes_per_second=moved / work_seconds if moved and work_seconds else None,
    )


def _cpu_parts(trace: Trace) -> Iterator[Row]:
    scopes = Scopes(trace)
    with_costs = _operators_with_costs(trace.threads[trace.main])
    elsewhere = (event for thread, own in trace.threads.items() if thread != trace.main for event in own)
    # Other threads communicate, as gloo's do, while the main one waits for them.
    communication = sorted(
        (event for event in elsewhere if categorize(event.name, NO_SCOPE, event) == "communication"),
        key=lambda event: event.start,
    )
    for step in trace.steps:
        waits = [event for event in communication if event.start < step.end and event.end > step.start]
        for event in _inside(step):
            scope = scopes[event]
            gaps = list(_uncovered(event.start, event.end, event.children))
            own = _seconds(gaps)
            if event.kind != "annotation":
                names = RowNames(scope.module, scope.phase, categorize(event.name, scope, event), event.name, "")
                yield _part(names, own, own, 1, event if event in with_costs else None, event.seconds)
                continue
            free = 0.0
            if scope.phase != "communication":
                free = _seconds(part for start, end in gaps for part in _uncovered(start, end, waits))
            if own > free:
                yield _part(RowNames(scope.module, scope.phase, "communication", WAITING, ""), own - free)
            if free:
                kind = ("other", OUTSIDE) if scope == NO_SCOPE else (IDLE, BETWEEN_OPERATORS)
                yield _part(RowNames(scope.module, scope.phase, *kind, ""), free)


def _gpu_parts(trace: Trace) -> Iterator[Row]:
    scopes = Scopes(trace)
    with_costs = {event for own in trace.threads.values() for event in _operators_with_costs(own)}
    names = {kernel: _kernel_names(kernel, scopes) for kernel in trace.kernels}
    longest: dict[Event, Kernel] = {}  # the kernel of each operator that takes its FLOPs and bytes
    for kernel in trace.kernels:
        if not any(step.start <= kernel.start < step.end for step in trace.steps):
            continue
        yield _part(names[kernel], busy_seconds=kernel.seconds, launches=1)
        operator = next((event for event in ancestors(kernel.launch) if event in with_costs), None)
        if operator is not None:
            longest[operator] = max(longest.get(operator, kernel), kernel, key=lambda each: each.seconds)
    for operator, kernel in longest.items():
        yield _part(names[kernel], work=operator, work_seconds=kernel.seconds)
    for step in trace.steps:
        for start, end, running in _exclusive(names, step):
            if running is not None:
                yield _part(names[running], (end - start) * MICROSECOND)
                continue
            for left, right in pairwise([start, *scopes.phase_changes(start, end), end]):
                idle = RowNames("", scopes.phase_at(left), IDLE, BETWEEN_KERNELS, "")
                yield _part(idle, (right - left) * MICROSECOND)


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
        # An operator's name tells more than its kernel's, apart from NCCL's and its like.
        by_kernel = not name or "ccl" in kernel.name.lower()
        category = categorize(kernel.name if by_kernel else name, scope, operator)
    return RowNames(scope.module, scope.phase, category, name, kernel.name)


def _exclusive(names: dict[Kernel, RowNames], step: Event) -> Iterator[tuple[float, float, Kernel | None]]:
    """Yield the intervals of a step, each with the one kernel that it belongs to. `names` has the kernels by start."""
    ranks = {"communication": 1, "copies": 2}
    edges = {step.start, step.end, *(time for kernel in names for time in (kernel.start, kernel.end))}
    upcoming = deque(names)
    running: list[Kernel] = []
    for start, end in pairwise(sorted(time for time in edges if step.start <= time <= step.end)):
        while upcoming and upcoming[0].start <= start:
            running.append(upcoming.popleft())
        running = [kernel for kernel in running if kernel.end > start]
        yield start, end, min(running, key=lambda kernel: ranks.get(names[kernel].category, 0), default=None)


def _inside(step: Event) -> Iterator[Event]:
    """Yield the step itself and everything in it."""
    pending = [step]
    while pending:
        event = pending.pop()
        yield event
        pending += event.children


def _uncovered(start: float, end: float, events: Iterable[Event]) -> Iterator[tuple[float, float]]:
    """Yield the parts of an interval in which none of these events, sorted by their start, runs."""
    for event in events:
        if event.start >= end:
            break
        if event.start > start:
            yield start, event.start
        start = max(start, event.end)
    if start < end:
        yield start, end


def _seconds(intervals: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals) * MICROSECOND


def _operators_with_costs(events: list[Event]) -> set[Event]:
    """Return the innermost operators with FLOPs, and outside of them the innermost with bytes."""
    found: set[Event] = set()
    for count in (flops, moved_bytes):
        outer = {above for event in found for above in ancestors(event.parent)}
        rest = {
            event
            for event in events
            if event.kind == "op"
            and event not in outer
            and not any(above in found for above in ancestors(event))
            and count(event.name, event.args)
        }
        found |= rest - {above for event in rest for above in ancestors(event.parent)}
    return found
