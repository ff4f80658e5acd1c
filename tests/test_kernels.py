"""The analysis of traces: real ones of a CPU, made here, and one of a GPU, built by hand in the profiler's format."""

import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from tests.conftest import python
from tests.tiny_gpt2 import make_ours, tokens
from train.engines.transforms import checkpoint_arguments, checkpoint_blocks
from train.kernels import __main__ as kernels
from train.kernels.attribution import CATEGORIES
from train.kernels.breakdown import BETWEEN_OPERATORS, OUTSIDE, WAITING, summarize
from train.kernels.op_costs import flops, moved_bytes
from train.kernels.summary import SCHEMA, KernelsFile, group
from train.kernels.traces import read_recording
from train.metrics.annotations import annotate
from train.run.profiling import annotate_modules
from train.utils.errors import UserError
from train.utils.files import from_json

FACTS: dict[str, Any] = {
    "schema": 1, "run_type": "baseline", "rank": 0, "world_size": 1, "first_step": 3, "steps": 2,
    "tokens_per_step": 128, "block_size": 32, "micro_batch_size": 4, "accumulation": 1, "model": {"n_layer": 2},
    "attn_implementation": "eager", "activation_checkpointing": None, "torch_compile": False, "precision": "fp32",
    "device": "cpu", "device_name": "cpu", "peak_flops": None, "peak_bytes_per_second": None, "torch": "2.13.0",
    "pipeline_stages": None, "pipeline_schedule": None,
}  # fmt: skip
SLOWER = 20  # times that the slow layer takes another tanh,
SLOWED_BY = torch.zeros(10_000_000)  # of this: about a second a step, which no pause of a busy machine comes near


def write_trace(run: Path, content: dict[str, Any], rank: int = 0) -> Path:
    (run / "profile").mkdir(parents=True, exist_ok=True)
    file = run / "profile" / f"rank-{rank}.json.gz"
    file.write_bytes(gzip.compress(json.dumps(content).encode()))
    return file


def record(run: Path, slow_layer: int | None = None, checkpointing: bool = False, **fields: Any) -> Path:
    """A real trace of two real steps, with the annotations of a run; one layer's activation may be a slow one."""
    model = make_ours(n_embd=48, **fields).train()
    if slow_layer is not None:
        act = model.transformer.h[slow_layer].mlp.act
        forward = act.forward

        def slow(hidden_states: torch.Tensor) -> torch.Tensor:
            for _ in range(SLOWER):
                torch.tanh(SLOWED_BY)
            return forward(hidden_states)

        act.forward = slow
    if checkpointing:
        checkpoint_blocks(model, checkpoint_arguments("full"))
    optimizer = torch.optim.AdamW(model.parameters())
    annotations = annotate_modules(model.named_modules())
    ids = tokens(4, 32)
    (run / "profile").mkdir(parents=True)
    plain = run / "trace.json"
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=0, warmup=1, active=2, repeat=1),
        record_shapes=True,
        on_trace_ready=lambda ready: ready.export_chrome_trace(str(plain)),
    ) as recorded:
        for step in range(3):
            with annotate("forward"):
                loss = model(ids, shift_labels=ids, skip_logits=True).loss
            with annotate("backward"):
                loss.backward()
            with annotate("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
            if step == 1:
                recorded.add_metadata_json("gpt2flash", json.dumps(FACTS))
            recorded.step()
    annotations.close()
    write_trace(run, json.loads(plain.read_text()))
    plain.unlink()
    return run


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("eager") / "eager", attn_implementation="eager")


@pytest.fixture(scope="module")
def slowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("slowed") / "slowed", slow_layer=1, attn_implementation="eager")


def test_every_microsecond_of_a_step_is_in_one_row(eager: Path) -> None:
    run = summarize(read_recording(eager))
    assert sum(row.seconds for row in run.rows) == pytest.approx(run.step_seconds)
    assert {row.operator: row.seconds for row in run.rows if not row.phase} == {
        OUTSIDE: pytest.approx(run.unattributed_seconds)
    }
    assert {row.category for row in run.rows} <= set(CATEGORIES)


def test_a_cpu_that_waits_for_another_thread_to_communicate(eager: Path, tmp_path: Path) -> None:
    plain = read_recording(eager)
    [trace], rows = plain.traces, summarize(plain).rows
    content = json.loads(gzip.decompress(trace.file.read_bytes()))
    for step in trace.steps:  # from the middle of the step on, in two operators that overlap
        middle = (step.start + step.end) / 2
        for start, end in ((middle, step.end - 1), (middle + 1, step.end)):
            event = {"ph": "X", "cat": "cpu_op", "name": "gloo:all_reduce", "pid": 1, "tid": "gloo", "args": {}}
            content["traceEvents"].append({**event, "ts": start, "dur": end - start})
    write_trace(tmp_path / "run", content)
    waiting = summarize(read_recording(tmp_path / "run"))
    assert sum(row.seconds for row in waiting.rows) == pytest.approx(waiting.step_seconds)
    seconds = {row.operator: row.seconds for row in group(waiting.rows, "operator").values()}
    idle = sum(row.seconds for row in rows if row.operator in (BETWEEN_OPERATORS, OUTSIDE))
    assert 0 < seconds[WAITING] < idle
    assert seconds[WAITING] + seconds[BETWEEN_OPERATORS] + seconds.get(OUTSIDE, 0) == pytest.approx(idle)


def test_operators_belong_to_their_module_forward_and_backward(eager: Path) -> None:
    rows = group(summarize(read_recording(eager)).rows, "module", "phase", "category", "operator")
    per_step = {key: row.launches for key, row in rows.items()}
    layers = 2
    attn = ("transformer.h.*.attn", "attention", "aten::bmm")
    assert per_step[attn[0], "forward", *attn[1:]] == 2 * layers  # scores, values
    assert per_step[attn[0], "backward", *attn[1:]] == 4 * layers
    for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        name = f"transformer.h.*.{module}"
        assert per_step[name, "forward", "matmul", "aten::addmm"] == layers
        assert per_step[name, "backward", "matmul", "aten::mm"] == 2 * layers
    normal = "normalization and elementwise"
    assert per_step["transformer.h.*.mlp.act", "backward", normal, "aten::tanh_backward"] == layers
    assert per_step["transformer.ln_f", "backward", normal, "aten::native_layer_norm_backward"] == 1
    assert per_step["transformer.wte", "backward", normal, "aten::embedding_dense_backward"] == 1
    assert {key[2] for key in per_step if key[0] == "loss"} >= {"loss", "matmul"}
    assert {key[2] for key in per_step if key[1] == "optimizer"} == {"optimizer", "idle and launch gaps"}


def test_recomputed_operators_have_a_phase_of_their_own(tmp_path: Path) -> None:
    run = summarize(read_recording(record(tmp_path / "run", checkpointing=True)))
    launches = {key: row.launches for key, row in group(run.rows, "module", "phase", "operator").items()}
    assert launches["transformer.h.*.mlp.c_fc", "forward", "aten::addmm"] == 2
    assert launches["transformer.h.*.mlp.c_fc", "recompute", "aten::addmm"] == 2
    assert launches["transformer.h.*.mlp.c_fc", "backward", "aten::mm"] == 4


def test_an_injected_slow_down_is_found_and_named(
    eager: Path, slowed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels.main([str(eager), str(slowed), "--out", str(tmp_path)])
    found = json.loads((tmp_path / "kernels.json").read_text())["comparison"]
    worst = found["operators"][0]
    where = ("transformer.h.*.mlp.act", "forward", "normalization and elementwise")
    assert (worst["module"], worst["phase"], worst["category"], worst["operator"]) == (*where, "aten::tanh")
    assert worst["launches"] == [2, 2 + SLOWER]
    assert worst["saved_seconds"][0] < 0
    assert found["rows"][0]["largest"][1][0] == "aten::tanh"
    assert (found["layers"][0]["module"], found["layers"][0]["phase"]) == ("transformer.h.1.mlp.act", "forward")
    for part in ("rows", "operators", "layers"):
        assert sum(row["saved_seconds"][0] for row in found[part]) == pytest.approx(found["saved_seconds"])
        assert sum(row["share_of_gain"][0] for row in found[part]) == pytest.approx(1)
    # Not that it is below 1: what else the machine does may have slowed the other run down by more.
    assert found["speedup"] == pytest.approx(found["step_seconds"][0] / found["step_seconds"][1])
    printed = capsys.readouterr().out
    assert "The largest change is aten::tanh in transformer.h.*.mlp.act, forward" in printed
    assert printed.strip() in (tmp_path / "kernels.md").read_text()


def test_the_json_of_one_run(eager: Path, tmp_path: Path) -> None:
    kernels.main([str(eager), "--out", str(tmp_path)])
    file = tmp_path / "kernels.json"
    found = from_json(KernelsFile, json.loads(file.read_text()), file, "train.kernels")
    [run] = found.runs
    assert (found.schema, found.comparison, run.facts.device, run.processes) == (SCHEMA, None, "cpu", 1)
    for part in (run.categories, run.phases, run.modules, run.rows, run.layers):
        assert sum(row.seconds for row in part) == pytest.approx(run.step_seconds)
    points = run.roofline_points
    assert {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"} == {point.operator for point in points}
    for point in points:
        assert point.intensity == pytest.approx(point.flops / point.bytes)


def gpu_trace() -> dict[str, Any]:
    """Built by hand in torch.profiler's format, not recorded: one step of 1,000 microseconds on a GPU.

    Its backward pass runs in a thread of its own, its all-reduce in a stream of its own, beside the backward matmul
    for 40 microseconds, and the next batch's copy beside the attention. Between kernels are launch gaps, the last
    kernel outlasts the step, one has lost its launch, and there are events that stand for no work of their own.
    """
    main, backward = 11, 12
    compute, network, copying = 7, 20, 24
    events: list[dict[str, Any]] = []

    def on_cpu(name: str, start: float, end: float, thread: int = main, category: str = "cpu_op", **args: Any) -> None:
        events.append(
            {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": end - start,
             "args": args}
        )  # fmt: skip

    def annotate(name: str, start: float, end: float) -> None:
        on_cpu(name, start, end, category="user_annotation")

    def launch(
        kernel: str,
        at: float | None,
        start: float,
        end: float,
        thread: int = main,
        category: str = "kernel",
        stream: int = compute,
    ) -> None:
        number = len(events)
        call = {"kernel": "cudaLaunchKernel", "gpu_memcpy": "cudaMemcpyAsync", "gpu_memset": "cudaMemsetAsync"}
        if at is not None:
            on_cpu(call[category], at, at + 5, thread, "cuda_runtime", correlation=number)
            arrow = {"cat": "ac2g", "name": "ac2g", "id": number}
            events.append({"ph": "s", "pid": 1, "tid": thread, "ts": at, **arrow})
            events.append({"ph": "f", "pid": 0, "tid": stream, "ts": start, "bp": "e", **arrow})
        events.append(
            {"ph": "X", "cat": category, "name": kernel, "pid": 0, "tid": stream, "ts": start, "dur": end - start,
             "args": {"correlation": number, "stream": stream, "device": 0}}
        )  # fmt: skip

    half = {"Input type": ["c10::BFloat16"] * 3}
    annotate("ProfilerStep#2", 0, 1000)
    annotate("data", 0, 50)
    on_cpu("aten::to", 30, 48)
    on_cpu("aten::copy_", 32, 46)
    launch("Memcpy HtoD (Pinned -> Device)", 35, 90, 130, category="gpu_memcpy", stream=copying)
    annotate("forward", 50, 300)
    annotate("attention: transformer.h.0.attn", 60, 200)
    shape = [2, 4, 8, 16]
    on_cpu("aten::_scaled_dot_product_flash_attention", 70, 100, **{"Input Dims": [shape] * 3, **half})
    launch("void flash_fwd_kernel<...>", 80, 100, 200)
    annotate("module: transformer.h.0.attn.c_proj", 120, 190)
    on_cpu("aten::addmm", 130, 160, **{"Input Dims": [[64], [16, 64], [64, 64]], **half})
    launch("sm90_xmma_gemm_bf16", 140, 200, 300)
    annotate("backward", 300, 600)
    launch("a kernel whose launch the trace has lost", None, 320, 330)
    on_cpu("aten::zero_", 305, 315, backward)
    launch("Memset (Device)", 308, 340, 345, backward, category="gpu_memset")
    on_cpu("autograd::engine::evaluate_function: AddmmBackward0", 320, 400, backward)
    on_cpu("AddmmBackward0", 325, 395, backward)
    on_cpu("aten::mm", 330, 350, backward, **{"Input Dims": [[16, 64], [64, 64]], **half})
    launch("sm90_xmma_gemm_bf16_bwd", 340, 360, 460, backward)
    on_cpu("c10d::allreduce_", 410, 440, backward)
    launch("ncclDevKernel_AllReduce_Sum_bf16", 420, 420, 560, backward, stream=network)
    annotate("optimizer", 600, 700)
    on_cpu("aten::_fused_adamw_", 610, 690)
    launch("void multi_tensor_apply_kernel<...>", 640, 650, 800)
    annotate("communication", 700, 1000)
    on_cpu("aten::item", 705, 990)
    launch("Memcpy DtoH (Device -> Pinned)", 710, 800, 810, category="gpu_memcpy")
    on_cpu("cudaStreamSynchronize", 715, 985, category="cuda_runtime", correlation=9999)
    on_cpu("aten::zeros", 986, 989)
    launch("void at::native::fill_kernel<...>", 987, 990, 1200)
    for category, name in (
        ("gpu_user_annotation", "forward"),
        ("python_function", "loop.py"),
        ("overhead", "Unknown"),
    ):
        on_cpu(name, 100, 900, compute, category)
    events.append({"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "ts": 0, "args": {"name": "python"}})
    events.append({"ph": "i", "name": "Iteration Start: PyTorch Profiler", "pid": "Traces", "tid": "T", "ts": 0})
    flow = {"cat": "fwdbwd", "name": "fwdbwd", "pid": 1, "id": 1}
    events.append({"ph": "s", "tid": main, "ts": 130, **flow})
    events.append({"ph": "f", "tid": backward, "ts": 325, "bp": "e", **flow})
    rates = {"device_name": "NVIDIA H100 80GB HBM3", "peak_flops": 989.5e12, "peak_bytes_per_second": 3350e9}
    return {"schemaVersion": 1, "traceEvents": events, "gpt2flash": {**FACTS, "steps": 1, **rates}}


@pytest.mark.parametrize("runtime", ["cuda", "xpu"])
def test_a_gpu_trace_to_the_microsecond(tmp_path: Path, runtime: str) -> None:
    trace = gpu_trace()
    for event in trace["traceEvents"]:
        if event.get("cat") == "cuda_runtime":
            event["cat"] = f"{runtime}_runtime"
    write_trace(tmp_path / "run", trace)
    run = summarize(read_recording(tmp_path / "run"))
    microseconds = {
        (row.module, row.phase, row.category, row.operator): round(row.seconds * 1e6, 3) for row in run.rows
    }
    idle = ("idle and launch gaps", "no kernel runs")
    assert microseconds == {
        ("transformer.h.*.attn", "forward", "attention", "aten::_scaled_dot_product_flash_attention"): 100,
        ("transformer.h.*.attn.c_proj", "forward", "matmul", "aten::addmm"): 100,
        ("transformer.h.*.attn.c_proj", "backward", "matmul", "aten::mm"): 100,
        ("", "backward", "communication", "c10d::allreduce_"): 100,  # of its 140, those not beside the matmul
        ("", "optimizer", "optimizer", "aten::_fused_adamw_"): 150,
        ("", "data", "copies", "aten::copy_"): 10,  # of its 40, those not beside the attention
        ("", "", "normalization and elementwise", ""): 10,  # the one without a launch, by its own name
        ("", "backward", "copies", "aten::zero_"): 5,
        ("", "communication", "copies", "aten::item"): 10,
        ("", "communication", "communication", "aten::zeros"): 10,  # and 200 after the step
        ("", "data", *idle): 50,
        ("", "forward", *idle): 40,
        ("", "backward", *idle): 85,
        ("", "optimizer", *idle): 50,
        ("", "communication", *idle): 180,
    }
    assert sum(microseconds.values()) == pytest.approx(1000)
    assert run.unattributed_seconds == pytest.approx(10e-6)
    [allreduce] = [row for row in run.rows if row.operator == "c10d::allreduce_"]
    assert allreduce.busy_seconds == pytest.approx(140e-6)
    rates = {point.operator: point.flops_per_second for point in run.roofline_points}
    assert rates["aten::addmm"] == pytest.approx(2 * 16 * 64 * 64 / 100e-6)
    assert rates["aten::_scaled_dot_product_flash_attention"] == pytest.approx(4 * 2 * 4 * 8 * 8 * 16 / 100e-6)
    assert run.facts.peak_flops == 989.5e12


def test_flops_and_bytes_of_shapes() -> None:
    def args(*dims: list[int], kind: str = "float") -> dict[str, Any]:
        return {"Input Dims": list(dims), "Input type": [kind] * len(dims)}

    assert flops("aten::mm", args([2, 3], [3, 5])) == 60
    assert flops("aten::bmm", args([7, 2, 3], [7, 3, 5])) == 420
    assert flops("aten::addmm", args([5], [2, 3], [3, 5])) == 60
    assert flops("aten::mm", {}) is flops("aten::relu", args([2])) is None
    backward = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
    assert flops(backward, args(*[[1, 2, 4, 8]] * 4)) == 10 * 2 * 4 * 4 * 8
    assert moved_bytes("aten::mm", args([2, 3], [3, 5])) == 4 * (6 + 15 + 10)
    assert moved_bytes("aten::addmm", args([5], [2, 3], [3, 5], kind="c10::BFloat16")) == 2 * (5 + 6 + 15 + 10)
    assert moved_bytes("aten::add", args([4, 8], [8])) == 4 * (32 + 8 + 32)
    assert moved_bytes("aten::copy_", args([32], [32])) == 4 * 64
    expanded = args([64, 32], [64, 32]) | {"Input Strides": [[32, 1], [0, 1]]}
    assert moved_bytes("aten::copy_", expanded) == 4 * (64 * 32 + 32)
    assert moved_bytes("aten::view", args([4])) is None


def damaged(kind: str, eager: Path, folder: Path) -> Path:
    run = folder / "run"
    shutil.copytree(eager, run)
    file = run / "profile" / "rank-0.json.gz"
    complete = file.read_bytes()
    content = json.loads(gzip.decompress(complete))
    facts = content["gpt2flash"]
    match kind:
        case "empty":
            file.write_bytes(b"")
        case "truncated":
            file.write_bytes(complete[: len(complete) // 2])
        case "no gzip":
            file.write_bytes(b"{}")
        case "cut before packing":
            file.write_bytes(gzip.compress(b'{"traceEvents": [{"ph"'))
        case "nested":
            file.write_bytes(gzip.compress(b"[" * 100_000))
        case "thousand digits":
            file.write_bytes(gzip.compress(b'{"traceEvents": [' + b"9" * 5000 + b"]}"))
        case "no duration":
            events = [{**each, "ts": 1e90} for each in content["traceEvents"] if "ts" in each]
            write_trace(run, {**content, "traceEvents": events})
        case "infinite duration":
            events = [{**each, "dur": math.inf} for each in content["traceEvents"] if "dur" in each]
            write_trace(run, {**content, "traceEvents": events})
        case "other JSON":
            file.write_bytes(gzip.compress(b"[1, 2]"))
        case "foreign":
            write_trace(run, {"traceEvents": content["traceEvents"]})
        case "later version":
            write_trace(run, {**content, "gpt2flash": {**facts, "schema": 99}})
        case "few facts":
            write_trace(run, {**content, "gpt2flash": {"schema": 1, "rank": 0, "steps": 2}})
        case "odd link":
            write_trace(run, {"traceEvents": [{"cat": "fwdbwd", "ph": "s"}], "gpt2flash": facts})
        case "folder":
            file.unlink()
            file.mkdir()
        case "no step":
            write_trace(run, {"traceEvents": [], "gpt2flash": facts})
        case "odd event":
            write_trace(run, {"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "x"}], "gpt2flash": facts})
        case "lone rank":
            write_trace(run, {**content, "gpt2flash": {**facts, "world_size": 2}})
        case "other run's rank":
            write_trace(run, {**content, "gpt2flash": {**facts, "world_size": 2}})
            write_trace(run, {**content, "gpt2flash": {**facts, "world_size": 2, "rank": 1, "block_size": 64}}, rank=1)
        case "no trace":
            shutil.rmtree(run / "profile")
    return run


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "rank-0.json.gz: is not a complete trace .Expecting value"),
        ("truncated", "rank-0.json.gz: is not a complete trace .Compressed file ended"),
        ("no gzip", "rank-0.json.gz: is not a complete trace .Not a gzipped file"),
        ("cut before packing", "rank-0.json.gz: is not a complete trace .Expecting .:. delimiter"),
        ("nested", "rank-0.json.gz: is not a complete trace .maximum recursion depth"),
        ("thousand digits", "rank-0.json.gz: is not a complete trace .Exceeds the limit"),
        ("no duration", "rank-0.json.gz: holds no complete step"),
        ("infinite duration", "rank-0.json.gz: has an event that torch.profiler does not write"),
        ("other JSON", "rank-0.json.gz: is JSON, but not a trace"),
        ("foreign", "rank-0.json.gz: is a trace of another program"),
        ("later version", "rank-0.json.gz: has facts of version 99"),
        ("few facts", 'rank-0.json.gz: "run_type" is missing: it is not what python -m train --profile writes'),
        ("folder", "rank-0.json.gz: is not a complete trace .*Is a directory"),
        ("no step", "rank-0.json.gz: holds no complete step"),
        ("odd event", "rank-0.json.gz: has an event that torch.profiler does not write"),
        ("odd link", "rank-0.json.gz: has an event that torch.profiler does not write"),
        ("lone rank", "holds 1 traces of a run of 2 processes"),
        ("other run's rank", "block_size is 64, not 32"),
        ("no trace", "holds no trace"),
    ],
)
def test_a_trace_that_is_none_is_named(kind: str, words: str, eager: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        kernels.main([str(damaged(kind, eager, tmp_path)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_steps_of_other_work_are_not_compared(eager: Path, tmp_path: Path) -> None:
    content = gpu_trace()
    content["gpt2flash"]["tokens_per_step"] = 64
    write_trace(tmp_path / "run", content)
    done = python("-m", "train.kernels", eager, tmp_path / "run", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "do not do the same work in a step: tokens_per_step is 128 and 64" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(UserError, match="3 runs"):
        kernels.main([str(eager)] * 3)
    with pytest.raises(UserError, match="no such run folder or trace"):
        kernels.main([str(tmp_path / "missing")])
