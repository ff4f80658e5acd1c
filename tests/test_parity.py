"""The parity test passes for correct runs and fails for others: real runs, sabotaged ones among them."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from train.parity import __main__ as parity
from train.parity import cases, results
from train.parity.__main__ import run_cases
from train.parity.cases import LAYOUTS, Case, error_line, launch
from train.parity.differences import TOLERANCES, Difference, differences, relative
from train.parity.reference import (
    BETA1,
    CLIP,
    LEARNING_RATE,
    STEPS,
    Reference,
    train_reference,
    write_problem,
)
from train.parity.results import Result
from train.utils.errors import UserError

MICRO_BATCH, ACCUMULATION = "--train_micro_batch_size_per_gpu", "--gradient_accumulation_steps"
SMALL_DIFFERENCE = {kind: Difference(tolerance / 2, "step 1") for kind, tolerance in TOLERANCES.items()}


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problem")
    write_problem(folder)
    return folder


@pytest.fixture(scope="module")
def reference(problem: Path) -> Reference:
    return train_reference(problem, CLIP)


@pytest.fixture
def run(reference: Reference, tmp_path: Path) -> Path:
    """A run folder as a perfect fp32 trainer would leave it."""
    moments = {name: torch.zeros_like(weight) for name, weight in reference.steps[0].weights.items()}
    records = []
    for number, step in enumerate(reference.steps, start=1):
        folder = tmp_path / f"step-{number}"
        folder.mkdir()
        moments = {name: BETA1 * m + (1 - BETA1) * step.gradients[name] for name, m in moments.items()}
        save_file({name: weight.float() for name, weight in step.weights.items()}, folder / "model.safetensors")
        save_file({f"exp_avg.{name}": m.float() for name, m in moments.items()}, folder / "optimizer.safetensors")
        records.append({"step": number, "tokens": number, "loss": step.loss, "grad_norm": step.grad_norm})
    write_records(tmp_path, records)
    return tmp_path


def write_records(folder: Path, records: list[dict]) -> None:
    lines = [json.dumps({"tokens_per_second": 1.0, "step_time_seconds": 1.0, **record}) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def red(found: dict[str, Difference]) -> set[str]:
    return {kind for kind, difference in found.items() if not difference.value <= TOLERANCES[kind]}


# The reference implementation


def test_the_reference_moves_every_tensor_and_clips_at_every_step(problem: Path, reference: Reference) -> None:
    initial = load_file(problem / "model" / "model.safetensors")
    assert len(reference.steps) == STEPS
    for step in reference.steps:
        assert step.grad_norm > CLIP
        clipped = sum(float(gradient.square().sum()) for gradient in step.gradients.values()) ** 0.5
        assert clipped == pytest.approx(CLIP, rel=1e-5)
    for name, weight in reference.steps[-1].weights.items():
        assert weight.dtype == torch.float64
        moved = relative(weight, initial[name]).value
        assert moved > 10 * TOLERANCES["weight"], f"{name}: a missed update has to show"
    with pytest.raises(AssertionError, match="is not clipped"):
        train_reference(problem, 1e6)


# What a run's files say


def test_a_perfect_run_is_green(run: Path, reference: Reference) -> None:
    found = differences(run, reference)
    assert not red(found), found
    assert found["gradient"].value > 0, "fp32 files are not exact"


def test_each_difference_is_red_in_its_column(run: Path, reference: Reference) -> None:
    records = records_of(run)
    write_records(run, [records[0], {**records[1], "loss": records[1]["loss"] + 1e-5}, *records[2:]])
    found = differences(run, reference)
    assert red(found) == {"loss"}
    assert found["loss"].where == "step 2"
    write_records(run, [*records[:-1], {**records[-1], "grad_norm": None}])
    assert differences(run, reference)["grad_norm"] == Difference(math.inf, "step 5")
    write_records(run, records)

    model = run / "step-3" / "model.safetensors"
    weights = load_file(model)
    bias = "transformer.h.1.mlp.c_fc.bias"
    one = weights[bias].clone()
    one[0] += LEARNING_RATE
    save_file({**weights, bias: one}, model)
    found = differences(run, reference)
    assert red(found) == {"weight"}, "a step of one element"
    assert found["weight"].where == f"step 3, {bias}"
    save_file(weights, model)

    file = run / "step-5" / "optimizer.safetensors"
    moments = load_file(file)
    scaled = "transformer.h.3.ln_1.weight"
    save_file({**moments, f"exp_avg.{scaled}": moments[f"exp_avg.{scaled}"] * 1.0001}, file)
    found = differences(run, reference)
    assert red(found) == {"gradient"}
    assert found["gradient"].where == f"step 5, {scaled}"


def test_key_biases_count_by_what_they_do(run: Path, reference: Reference) -> None:
    model = run / "step-2" / "model.safetensors"
    weights = load_file(model)
    bias = weights["transformer.h.0.attn.c_attn.bias"]
    width = len(bias) // 3
    bias[width : 2 * width] += torch.randn(width)
    save_file(weights, model)
    assert not red(differences(run, reference)), "the softmax does not see them"
    bias[width] = math.nan
    save_file(weights, model)
    assert red(differences(run, reference)) == {"key_bias"}
    bias[width] = 0
    bias[0] += 0.01
    save_file(weights, model)
    assert red(differences(run, reference)) == {"weight"}, "the queries' bias is compared"


def test_what_is_not_there_is_not_green(run: Path, reference: Reference) -> None:
    records = records_of(run)
    write_records(run, records[:-1])
    with pytest.raises(ValueError, match="4 steps of 5"):
        differences(run, reference)
    write_records(run, records)
    model = run / "step-1" / "model.safetensors"
    weights = load_file(model)
    save_file({name: weight for name, weight in weights.items() if "wpe" not in name}, model)
    with pytest.raises(ValueError, match=r"weights have different tensors: .*wpe"):
        differences(run, reference)
    save_file({**weights, "transformer.wpe.weight": weights["transformer.wpe.weight"][:1]}, model)
    with pytest.raises(ValueError, match=r"step 1, transformer\.wpe\.weight: .* is not the shape"):
        differences(run, reference)
    model.unlink()
    with pytest.raises(FileNotFoundError):
        differences(run, reference)


# The matrix and what is said of it


def test_every_case_has_the_same_global_batch(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        for accumulation in (1, 2, 8):
            words = Case(layout, accumulation, False, True).argv(tmp_path, tmp_path / "out")
            batch = [words[words.index(flag) + 1] for flag in (MICRO_BATCH, ACCUMULATION)]
            assert math.prod(map(int, batch)) * LAYOUTS[layout].data_parallel == 32
            assert f"--max_grad_norm={CLIP}" in words
            assert "--activation_checkpointing" not in words
    words = Case("single", 1, True, False).argv(tmp_path, tmp_path)
    assert words[words.index("--activation_checkpointing") + 1] == "full"
    assert "--max_grad_norm=0.0" in words


def test_the_table_shows_the_worst_and_names_what_is_red() -> None:
    case = Case("pp2", 8, True, False)
    good = Result(case, 1.0, SMALL_DIFFERENCE)
    bad = Result(case, 1.0, {**SMALL_DIFFERENCE, "gradient": Difference(0.5, "step 1, transformer.wte.weight")})
    failed = Result(Case("fsdp2-x2", 1, False, True), 1.0, error="exit code 2: error: no")
    assert good.reason == ""
    assert bad.reason == "gradient 5.0e-01 (at most 1e-05) at step 1, transformer.wte.weight"
    assert results.verdict([good]) == "All 1 runs are green"
    assert results.verdict([good, bad, failed]) == "2 of 3 runs are RED"
    lines = results.table([good, bad, failed]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[3] == ["pp2", "2", "5.0e-07", "5.0e-06", "5.0e-01", "5.0e-06", "5.0e-13", "1 RED"]
    assert cells[4] == ["fsdp2-x2", "1", "-", "-", "-", "-", "-", "1 RED"]
    text = results.report([good, bad, failed])
    assert f"- pp2 accumulation 8 checkpointing: {bad.reason}" in text
    assert "- fsdp2-x2 accumulation 1 clipping: exit code 2: error: no" in text
    endless = dataclasses.replace(bad, differences={**SMALL_DIFFERENCE, "loss": Difference(math.inf, "step 4")})
    written = json.loads(json.dumps(results.as_json([endless]), allow_nan=False))
    assert written["green"] is False
    assert written["rows"][0]["differences"]["loss"] == {"value": None, "where": "step 4"}


def test_a_failed_run_is_known_by_its_error() -> None:
    assert error_line("a\nerror: --seed 1: no\nW1 Sending SIGTERM\ntorch.X.ChildFailedError: \n") == (
        "error: --seed 1: no"
    )
    assert error_line("[rank1]: ValueError: so\n[rank1]: more\n") == "[rank1]: ValueError: so"
    assert error_line("only this\n\n") == "only this"
    assert error_line("") == "it printed nothing"


def test_commands_are_run_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    assert launch([sys.executable, "-c", "import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == ''"], log) is None
    assert launch([sys.executable, "-c", "raise KeyError('x')"], log) == "exit code 1: KeyError: 'x'"
    monkeypatch.setattr(cases, "RUN_LIMIT", 2)
    monkeypatch.setattr(cases, "STOP_LIMIT", 2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert launch([sys.executable, "-c", deaf], log) == "it was not done after 2 seconds"


def test_configurations_are_those_of_the_folder_else_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = Case("zero1-x2", 1, False, False).argv(tmp_path, tmp_path)
    file = Path(words[words.index("--config_file") + 1])
    assert file.samefile(ROOT / "accelerate_configs" / "deepspeed.yaml")
    (tmp_path / "accelerate_configs").mkdir()
    (tmp_path / "accelerate_configs" / "deepspeed.yaml").touch()
    commands = [Case(layout, 1, False, False).argv(tmp_path, tmp_path) for layout in LAYOUTS]
    assert sum("accelerate_configs/deepspeed.yaml" in words for words in commands) == 6
    assert {words[0] for words in commands} == {sys.executable}


def test_mistakes_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file: give a folder"):
        parity.main(["--layouts", "single", "--out", "file"])


# Real runs


@pytest.mark.slow
def test_one_process_and_two_compute_what_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = run_cases([Case(name, 2, True, True) for name in ("single", "zero2-x2")])
    assert [each.reason for each in found] == ["", ""]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_other_layouts_do_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = ["ddp-x2", "zero1-x2", "zero3-x2", "pp2-dp2"]
    found = run_cases([Case(name, 8, False, index % 2 == 0) for index, name in enumerate(names)])
    assert [each.reason for each in found] == [""] * len(names)


@pytest.mark.slow
def test_a_run_that_fails_is_a_red_row_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("accelerate_configs", "ds_configs"):
        (tmp_path / name).mkdir()
    (tmp_path / "accelerate_configs" / "deepspeed.yaml").symlink_to(ROOT / "accelerate_configs" / "deepspeed.yaml")
    (tmp_path / "ds_configs" / "zero1.json").write_text('{"zero_optimization": {"stage": 9}}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        parity.main(["--layouts", "zero1-x2", "--accumulation", "1", "--out", "report"])
    assert exit.value.code == 1
    assert "4 of 4 runs are RED" in capsys.readouterr().out
    written = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert len(written["rows"]) == 4
    assert '"zero_optimization" needs a "stage" of 0, 1, 2 or 3' in written["rows"][0]["error"]
    assert "zero1-x2 accumulation 1 clipping: exit code" in (tmp_path / "report" / "parity.md").read_text()


# A stage divides what the next one sends it by the accumulation, as DeepSpeed 0.19.2 did.
DIVIDED = """
from deepspeed.runtime.pipe import engine, schedule
receive = engine.PipelineEngine._exec_recv_grads
def receive_and_divide(self, buffer_id):
    receive(self, buffer_id)
    received = self.grad_layer
    for gradient in [received] if hasattr(received, "div_") else received:
        gradient.div_(self.gradient_accumulation_steps())
engine.PipelineEngine._INSTRUCTION_MAP[schedule.RecvGrad] = receive_and_divide
"""
# The squares of the gradient are not summed over the stages.
CLIPPED_ALONE = """
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
DeepSpeedZeroOptimizer._model_parallel_all_reduce = lambda self, tensor, op: None
"""
TRAIN = """
import runpy
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


def pipeline_run(sabotage: str, case: Case, problem: Path, folder: Path) -> Path:
    """Train the case, a pipeline of two stages, with DeepSpeed changed by `sabotage`; the run's folder."""
    script = folder / "sabotage.py"
    script.write_text(sabotage + TRAIN)
    words = case.argv(problem, folder / "out")
    torchrun = ["torchrun", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"]
    error = launch([*torchrun, str(script), *words[words.index("train") + 1 :]], folder / "log")
    assert error is None, (folder / "log").read_text()
    return folder / "out" / "optimized"


@pytest.mark.slow
def test_a_pipeline_is_green_and_its_sabotage_red(
    problem: Path, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    unclipped, clipped = (Case("pp2", 2, False, clipping) for clipping in (False, True))
    for name in ("good", "divided", "alone"):
        (tmp_path / name).mkdir()

    good = differences(pipeline_run("", clipped, problem, tmp_path / "good"), reference)
    assert not red(good), good

    run = pipeline_run(DIVIDED, unclipped, problem, tmp_path / "divided")
    found = differences(run, train_reference(problem, 0))
    assert red(found) >= {"gradient", "grad_norm"}, found
    assert found["gradient"].value == pytest.approx(0.5, abs=0.01), "the first stage's, divided by 2 once more"

    alone = differences(pipeline_run(CLIPPED_ALONE, clipped, problem, tmp_path / "alone"), reference)
    assert red(alone) >= {"gradient", "grad_norm"}, alone
    assert alone["loss"].value < 1e-4, "AdamW hides it from whoever looks at losses"
    assert alone["gradient"].value > 0.1
