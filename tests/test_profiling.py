"""`--profile` as people use it: which steps are recorded, under which names, and that nothing of it stays."""

import gzip
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch._dynamo.utils import counters

from modeling_gpt2flash import GPT2FlashConfig
from tests.conftest import ROOT, losses, python, ranks, records, train
from tests.tiny_gpt2 import make_ours, tokens
from train.config.run_config import parse
from train.engines.transforms import compile_blocks
from train.kernels.breakdown import OUTSIDE, WAITING, summarize
from train.kernels.pipeline_timeline import timeline
from train.kernels.summary import RunSummary
from train.kernels.traces import Recording, read_recording
from train.metrics.annotations import PHASES, module_of
from train.metrics.flops import count_flops
from train.plan.shapes import Shape
from train.run import profiling
from train.run.profiling import Profiler, annotate_modules
from train.utils import devices
from train.utils.errors import UserError

SHORT = ["--max_steps=6", "--max_new_tokens=0", "--eval_steps=1"]
PROFILE = ["--profile", "--profile_steps=3:5"]
CLOCKS = 2e-4  # seconds by which the clocks of two processes' traces may differ


@pytest.fixture(scope="module")
def profiled(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which steps 3 and 4 are recorded: 8 sequences of 64 tokens in two micro-batches."""
    folder = tmp_path_factory.mktemp("profiled")
    sizes = ["--block_size=64", "--gradient_accumulation_steps=2", "--save_interval=4", "--eval_interval=4"]
    python("-m", "train", *flags, *SHORT, *PROFILE, *sizes, f"--checkpoint_path={folder}", cwd=folder)
    return folder / "baseline"


def names(trace: Path) -> dict[str, int]:
    """How often each annotation is in a trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    found = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    return {name: found.count(name) for name in found}


def test_the_asked_steps_are_recorded_with_their_annotations(profiled: Path) -> None:
    assert sorted(path.name for path in (profiled / "profile").iterdir()) == ["memory.json", "rank-0.json.gz"]
    found = names(profiled / "profile" / "rank-0.json.gz")
    assert sum(name.startswith("ProfilerStep#") for name in found) == 2
    assert found.keys() >= set(PHASES)
    assert found["forward"] == found["backward"] == 4, "two steps of two micro-batches"
    assert found["checkpoint"] == found["validation"] == 1
    assert {module_of(name) for name in found} >= {
        "loss", "transformer", "transformer.wte", "transformer.h.0", "transformer.h.1.attn.c_attn",
        "transformer.h.1.mlp.act", "transformer.ln_f",
    }  # fmt: skip
    assert found["attention: transformer.h.1.attn"] == found["mlp: transformer.h.0.mlp"] == 4 + 1, "and a validation"


def test_steps_that_bear_the_profilers_cost_say_so(profiled: Path) -> None:
    marked = {record["step"] for record in records(profiled) if record.get("profiled")}
    assert marked == {2, 3, 4}, "the recorded ones, and the one that warms it up"


def test_the_peak_of_a_cpu_is_taken_before_the_profiler_fills_its_memory(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse([*flags, "--profile", "--profile_steps=4:5", f"--checkpoint_path={tmp_path}"])
    config.run_folder.mkdir()
    run = SimpleNamespace(config=config, model=GPT2FlashConfig(), first_step=0)
    nothing = {"named_modules": lambda: iter(()), "held_tensors": lambda: iter(())}
    engine = SimpleNamespace(is_main=True, rank=0, device=torch.device("cpu"), **nothing)
    monkeypatch.setattr(profiling, "profile_facts", lambda *_: None)
    monkeypatch.setattr(profiling, "trace_metadata", lambda *_: "{}")
    taken = []
    with Profiler(cast(Any, run), cast(Any, engine)) as profiler:
        for step in range(1, 6):
            monkeypatch.setattr(profiling, "peak_memory", lambda device, after=step: {"after": after})
            profiler.step()
            taken.append(profiler.peak_before)
    assert taken == [None, {"after": 2}, {"after": 2}, {"after": 2}, {"after": 2}]
    assert (config.run_folder / "profile" / "rank-0.json.gz").exists()


def test_the_memory_of_the_step_before_is_tracked(profiled: Path) -> None:
    found = json.loads((profiled / "profile" / "memory.json").read_text())
    shape = Shape.of(GPT2FlashConfig(n_layer=2, n_head=2, n_embd=16, n_positions=64), 64)
    assert found["at_peak"]["parameters"] == 4 * shape.parameters
    assert {"forward", "backward", "optimizer"} <= {point["phase"] for point in found["over_step"]}


def test_the_breakdown_is_complete_and_its_flops_are_those_of_the_formula(profiled: Path) -> None:
    recording = read_recording(profiled)
    run = summarize(recording)
    assert recording.facts.first_step == 3
    assert recording.facts.steps == len(recording.traces[0].steps) == 2
    assert_closed(run)
    trained = sum(row.flops for row in run.rows if row.phase in ("forward", "backward"))
    assert trained == pytest.approx(count_flops(2, 16, None, 50257, 64).model * 8 * 64, rel=0.01)


@pytest.mark.slow
def test_profiling_changes_no_number(profiled: Path, flags: list[str], tmp_path: Path) -> None:
    sizes = ["--block_size=64", "--gradient_accumulation_steps=2", "--max_steps=6", "--eval_steps=1"]
    python("-m", "train", *flags, *sizes, "--max_new_tokens=0", f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    assert losses(profiled) == losses(tmp_path / "baseline")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--profile", "--profile_steps=10"], ["--profile_steps 10", "10:13"]),
        (["--profile", "--profile_steps=1:3"], ["--profile_steps 1:3", "2 or later"]),
        (["--profile", "--profile_steps=5:5"], ["--profile_steps 5:5", "end after the start"]),
        (["--memory_snapshot"], ["--memory_snapshot", "--profile"]),
    ],
)
def test_impossible_profiles_are_refused_in_a_sentence(flags: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        parse(flags)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--profile", "--profile_steps=5:9"], ["--profile_steps 5:9", "6 steps", "--max_steps"]),
        (["--profile", "--memory_snapshot", "--profile_steps=3:4"], ["--memory_snapshot", "CUDA"]),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_it_begins(
    flags: list[str], more: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.run.setup import resolve

    monkeypatch.setattr(devices, "device_type", lambda: "cpu")
    with pytest.raises(UserError) as refusal:
        resolve(parse([*flags, *SHORT, *more, f"--checkpoint_path={tmp_path}"]))
    assert all(word in str(refusal.value) for word in words)


def test_names_leave_nothing_behind_and_break_no_graph() -> None:
    model = make_ours().train()
    compile_blocks(model, backend="eager", fullgraph=True)

    def step() -> torch.Tensor:
        return model(tokens(), shift_labels=tokens(), skip_logits=True).loss

    expected = step()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    graphs = counters["stats"]["unique_graphs"]
    annotations = annotate_modules(model.named_modules())
    with torch.profiler.profile() as recorded:
        assert torch.equal(step(), expected)
    annotations.close()
    found = {event.name for event in recorded.events() or []}
    assert {"module: transformer.h.0", "module: transformer.ln_f", "loss: loss"} <= found
    assert not any(name.startswith(("attention: ", "mlp: ")) for name in found), "a compiled block is one piece"
    assert counters["stats"]["unique_graphs"] == graphs
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(value is before[name][key] for key, value in vars(module).items())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "zero2", "pipeline", "dualpipev"])
def test_every_process_of_every_layout_leaves_a_trace(layout: str, flags: list[str], tmp_path: Path) -> None:
    words: list[Any] = [
        *flags,
        *SHORT,
        *PROFILE,
        f"--checkpoint_path={tmp_path}",
        "--train_micro_batch_size_per_gpu=2",
    ]
    if layout != "ddp":
        pipelined = layout != "zero2"
        json_name = "pipeline" if pipelined else layout
        words += ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/{json_name}.json"]
        words += ["--pipeline_stages=2", "--gradient_accumulation_steps=4"] if pipelined else []
        words += ["--pipeline_schedule=dualpipev"] if layout == "dualpipev" else []
    ranks(*words, cwd=tmp_path)
    run = tmp_path / ("baseline" if layout == "ddp" else "optimized")
    recording = read_recording(run)
    assert [trace.rank for trace in recording.traces] == [0, 1]
    found = [names(trace.file) for trace in recording.traces]
    for own in found:
        assert own.keys() >= {"data", "forward", "backward", "optimizer", "communication"}
    if layout == "pipeline":
        assert "attention: transformer.h.0.attn" in found[0]
        assert "loss: loss" in found[1]
        assert "loss: loss" not in found[0]
    elif layout != "dualpipev":
        assert all("attention: transformer.h.1.attn" in own and "loss: loss" in own for own in found)
    if layout in ("pipeline", "dualpipev"):
        check_timeline(recording, layout)
    total = summarize(recording)
    assert_closed(total)
    assert any(row.category == "communication" for row in total.rows)


def check_timeline(recording: Recording, layout: str) -> None:
    """Every micro-batch goes through all stages and back, in an order that the common clock has to show."""
    found = timeline(recording)
    assert found is not None
    assert found.one_clock
    assert len(found.steps) == 2
    assert 0 < found.idle_share < 1
    assert found.theory == (pytest.approx(1 / 5) if layout == "pipeline" else None)
    stages = 2 if layout == "pipeline" else 4
    work = {
        (span.phase, span.stage, span.micro_batch): (span.start, span.end)
        for process in found.processes
        for span in process.spans
        if span.phase in ("forward", "backward")
    }
    assert len(work) == 2 * stages * 4
    for micro_batch in range(4):
        way = [("forward", stage, micro_batch) for stage in range(stages)]
        way += [("backward", stage, micro_batch) for stage in reversed(range(stages))]
        for before, after in pairwise(way):
            assert work[before][1] <= work[after][0] + CLOCKS, (before, after)


@pytest.mark.slow
def test_compiled_blocks_and_resumed_runs(flags: list[str], tmp_path: Path) -> None:
    words = [*flags, *SHORT, "--torch_compile", "--save_interval=4", f"--checkpoint_path={tmp_path}"]
    train(*words, *PROFILE, cwd=tmp_path)
    trace = tmp_path / "baseline" / "profile" / "rank-0.json.gz"
    assert "module: transformer.h.0" in names(trace)
    assert_closed(summarize(read_recording(tmp_path / "baseline")))
    resumed = ["--resume_from_checkpoint", f"--checkpoint_path={tmp_path}", "--max_steps=8", "--allow_changes"]
    resumed += ["--max_new_tokens=0"]
    done = train(*flags, *resumed, *PROFILE, cwd=tmp_path)
    assert "nothing is recorded after step 6" in done.stdout + done.stderr


def assert_closed(run: RunSummary) -> None:
    """Every microsecond belongs to a row, and no operator runs outside of the annotated phases.

    How large a share is left outside says more of the machine than of the code, in steps of milliseconds.
    """
    assert sum(row.seconds for row in run.rows) == pytest.approx(run.step_seconds)
    assert {row.operator for row in run.rows if not row.phase} <= {OUTSIDE, WAITING}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_memory_snapshot_on_cuda(flags: list[str], tmp_path: Path) -> None:
    more = ["--memory_snapshot", f"--checkpoint_path={tmp_path}"]
    python("-m", "train", *flags, *SHORT, *PROFILE, *more, cwd=tmp_path)
    assert (tmp_path / "baseline" / "profile" / "memory-0.pickle").stat().st_size > 0
    found = summarize(read_recording(tmp_path / "baseline"))
    assert sum(row.seconds for row in found.rows) == pytest.approx(found.step_seconds)
