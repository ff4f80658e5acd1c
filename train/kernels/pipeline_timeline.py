"""Timeline of a pipeline: what each process does when, and the share of a step in which its stages are idle.

A stage is at work while it runs a micro-batch forward or backward: on a GPU from the first of its kernels to the last,
on a CPU as long as the call takes. Everything else between a pipeline's first forward and its last backward is idle
time, communication included. The processes of one machine share a clock; those of several machines need not.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from train.kernels.attribution import communicates
from train.kernels.summary import PipelineTimeline, ProcessTimeline, Span
from train.kernels.traces import MICROSECOND, Event, Kernel, Recording, Trace
from train.metrics.annotations import PHASES, stage_of

AT_WORK = ("forward", "backward")


def timeline(recording: Recording) -> PipelineTimeline | None:
    """Return the timeline of a pipelined run, or None for a run without stages."""
    facts = recording.facts
    size = facts.pipeline_stages or 1
    if size < 2 or len(recording.traces) < facts.world_size:
        return None
    steps = [
        [_spans(step, trace.kernels) for step, trace in zip(of_all, recording.traces, strict=True)]
        for of_all in zip(*(trace.steps for trace in recording.traces), strict=False)
    ]
    works = [_work(step) for step in steps]
    shares = [1 - busy / total for busy, total in works if total > 0]
    if not shares:
        return None
    replicas = len(recording.traces) // size
    on_one_clock = _shifted(recording.traces, len(steps) - 1, steps[-1])
    return PipelineTimeline(
        schedule=facts.pipeline_schedule,
        stages=size,
        micro_batches=facts.accumulation,
        idle_share=1 - sum(busy for busy, _ in works) / sum(total for _, total in works),
        theory=(size - 1) / (facts.accumulation + size - 1) if facts.pipeline_schedule == "1f1b" else None,
        steps=shares,
        one_clock=len({trace.host for trace in recording.traces}) == 1,
        processes=[ProcessTimeline(rank, spans) for rank, spans in list(enumerate(on_one_clock))[::replicas]],
    )


def _spans(step: Event, kernels: Sequence[Kernel]) -> list[Span]:
    """Return what a process does in a step, in seconds of its own clock since the step began there."""
    counted: Counter[tuple[str, int | None]] = Counter()
    spans = []
    for event in _phases(step):
        stages = (stage_of(child.name) for child in event.children)
        stage = next((each for each in stages if each is not None), None)
        micro_batch = None
        if event.name in AT_WORK:
            micro_batch = counted[event.name, stage]
            counted[event.name, stage] += 1
        extent = _extent(event, kernels) if kernels else (event.start, event.end)
        if extent is not None:
            start, end = ((time - step.start) * MICROSECOND for time in extent)
            spans.append(Span(event.name, stage, micro_batch, start, end))
    return spans


def _phases(step: Event) -> list[Event]:
    """Return the outermost phases of a step, in order."""
    found, pending = [], [step]
    while pending:
        event = pending.pop()
        if event.kind == "annotation" and event.name in PHASES:
            found.append(event)
        else:
            pending += reversed(event.children)
    return found


def _extent(event: Event, kernels: Sequence[Kernel]) -> tuple[float, float] | None:
    """Return when the kernels of a phase begin and end, whichever thread launched them, or None if it has none.

    Communication that overlaps with a forward or backward pass does not prolong it.
    """
    own = [
        kernel
        for kernel in kernels
        if kernel.launch is not None
        and event.start <= kernel.launch.start < event.end
        and not (event.name in AT_WORK and communicates(kernel.name, kernel.launch))
    ]
    return (min(kernel.start for kernel in own), max(kernel.end for kernel in own)) if own else None


def _work(processes: Sequence[Sequence[Span]]) -> tuple[float, float]:
    """Return the seconds at work and those from the first forward to the last backward, summed over the processes.

    The longest of the processes' own durations stands for all, since the first pipeline rank begins first and ends
    last; so clocks that differ do not matter.
    """
    busy, longest = 0.0, 0.0
    for spans in processes:
        work = [span for span in spans if span.phase in AT_WORK]
        if work:
            busy += sum(span.end - span.start for span in work)
            longest = max(longest, max(span.end for span in work) - min(span.start for span in work))
    return busy, longest * len(processes)


def _shifted(traces: Sequence[Trace], index: int, processes: Sequence[Sequence[Span]]) -> list[list[Span]]:
    """Move the spans of a step to the machine's clock, from when the step begins in the first process."""
    # In integer nanoseconds, of which a float would lose some hundreds.
    begins = [trace.base_time + round(trace.steps[index].start * 1000) for trace in traces]
    shifts = [(begin - min(begins)) * 1e-9 for begin in begins]
    return [
        [replace(span, start=span.start + shift, end=span.end + shift) for span in spans]
        for shift, spans in zip(shifts, processes, strict=True)
    ]
