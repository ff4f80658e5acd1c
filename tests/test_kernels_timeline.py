"""The timeline of a pipeline, from pairs of traces built by hand in torch.profiler's format (none is recorded).

Two stages and two micro-batches under 1F1B, in microseconds, forward 10 and backward 20:

    stage 0: F0 0-10, F1 10-20,           B0 40-60,           B1 70-90
    stage 1:          F0 10-20, B0 20-40, F1 40-50, B1 50-70
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.test_kernels import FACTS, write_trace
from train.kernels import __main__ as kernels
from train.kernels.pipeline_timeline import timeline
from train.kernels.traces import read_recording

WORK = (
    (("forward", 0, 10), ("forward", 10, 20), ("backward", 40, 60), ("backward", 70, 90)),
    (("forward", 10, 20), ("backward", 20, 40), ("forward", 40, 50), ("backward", 50, 70)),
)
STEP = ((0, 130), (3, 130))  # when each process begins its step, and ends it
CLOCK = 1_790_857_026_000_000_000
EARLIER = 5_000  # nanoseconds by which the second trace's own time begins before the first's


def trace(stage: int, gpu: bool, **changed: Any) -> dict[str, Any]:
    """One process's trace; on a GPU the CPU is through with launching long before the GPU is with the work."""
    events: list[dict[str, Any]] = []
    late = EARLIER / 1000 * stage

    def write(category: str, name: str, start: float, end: float, thread: int = 1, **args: Any) -> None:
        event = {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "args": args}
        events.append({**event, "ts": 1e12 + start + late, "dur": end - start})

    def annotate(name: str, start: float, end: float) -> None:
        write("user_annotation", name, start, end)

    def kernel(name: str, launch: float, start: float, end: float, thread: int = 1) -> None:
        number = len(events)
        write("cuda_runtime", "cudaLaunchKernel", launch, launch + 0.01, thread, correlation=number)
        write("kernel", name, start, end, 7, correlation=number)

    start, stop = STEP[stage]
    annotate("ProfilerStep#2", start, stop)
    for number, (phase, begin, end) in enumerate(WORK[stage]):
        if gpu:
            begin_cpu, end_cpu = start + number, start + number + 0.9
            # The backward pass is launched by autograd's own thread.
            thread = 2 if phase == "backward" else 1
            kernel("gemm", begin_cpu + 0.2, begin, begin + 4, thread)
            kernel("multi_tensor", begin_cpu + 0.4, end - 3, end, thread)
            kernel("ncclDevKernel_AllReduce", begin_cpu + 0.5, end, end + 25, thread)
        else:
            begin_cpu, end_cpu = begin, end
        annotate(phase, begin_cpu, end_cpu)
        annotate(f"stage: {stage}", begin_cpu, end_cpu)
    annotate("communication", 91, 95)
    annotate("validation", 100, 125)
    annotate("forward", 101, 120)  # no micro-batch of the step
    facts = {**FACTS, "rank": stage, "world_size": 2, "steps": 1, "accumulation": 2}
    facts |= {"pipeline_stages": 2, "pipeline_schedule": "1f1b"}
    base = {"baseTimeNanoseconds": CLOCK - EARLIER * stage, "host_name": "one"}
    return {"traceEvents": events, "gpt2flash": facts, **base, **changed}


def pair(run: Path, gpu: bool = False, **changed: Any) -> Path:
    for stage in range(2):
        write_trace(run, trace(stage, gpu, **(changed if stage else {})), rank=stage)
    return run


@pytest.mark.parametrize("gpu", [False, True])
def test_a_pair_of_traces_to_the_microsecond(gpu: bool, tmp_path: Path) -> None:
    found = timeline(read_recording(pair(tmp_path / "run", gpu)))
    assert found is not None
    assert found.idle_share == pytest.approx(1 - 120 / 180, abs=1e-3)
    assert found.steps == [pytest.approx(found.idle_share)]
    assert found.theory == pytest.approx(1 / 3)
    assert (found.schedule, found.stages, found.micro_batches, found.one_clock) == ("1f1b", 2, 2, True)
    assert [process.rank for process in found.processes] == [0, 1]
    for stage, process in enumerate(found.processes):
        work = [span for span in process.spans if span.phase in ("forward", "backward")]
        expected = [
            (phase, [own for own, *_ in WORK[stage][:index]].count(phase), begin, end)
            for index, (phase, begin, end) in enumerate(WORK[stage])
        ]
        assert [
            (span.phase, span.micro_batch, round(1e6 * span.start, 2), round(1e6 * span.end, 2)) for span in work
        ] == expected
        assert {span.stage for span in work} == {stage}
        others = {span.phase for span in process.spans} - {"forward", "backward"}
        assert others == (set() if gpu else {"communication", "validation"})


def test_machines_do_not_share_a_clock_and_idleness_needs_none(tmp_path: Path) -> None:
    run = pair(tmp_path / "run", host_name="other", baseTimeNanoseconds=CLOCK + 10**9)
    found = timeline(read_recording(run))
    assert found is not None
    assert found.one_clock is False
    assert found.idle_share == pytest.approx(1 / 3, abs=1e-3)


def test_no_timeline_without_stages_or_of_one_process_alone(tmp_path: Path) -> None:
    run = pair(tmp_path / "run")
    assert timeline(read_recording(run / "profile" / "rank-1.json.gz")) is None
    content = trace(0, gpu=False)
    content["gpt2flash"] |= {"pipeline_stages": None, "world_size": 1}
    write_trace(tmp_path / "plain", content)
    assert timeline(read_recording(tmp_path / "plain")) is None


def test_other_schedules_have_no_theory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in range(2):
        content = trace(stage, gpu=False)
        content["gpt2flash"]["pipeline_schedule"] = "dualpipev"
        write_trace(run, content, rank=stage)
    found = timeline(read_recording(run))
    assert found is not None
    assert found.theory is None
    assert found.idle_share == pytest.approx(1 / 3, abs=1e-3)


def test_train_kernels_says_how_idle_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main([str(pair(tmp_path / "run")), "--out", str(tmp_path / "out")])
    sentence = (
        "A pipeline of 2 processes, 2 micro-batches a step: of the time from the first forward to the last backward "
        "they are idle 33.3%; 33.3% in theory, with all stages alike."
    )
    assert sentence in capsys.readouterr().out
    [run] = json.loads((tmp_path / "out" / "kernels.json").read_text())["runs"]
    assert run["pipeline"]["idle_share"] == pytest.approx(1 / 3, abs=1e-3)
