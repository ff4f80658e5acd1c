"""The guard: which updates a run does not make, the same in every layout, and how it goes on or ends."""

import json
import math
import warnings
from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.conftest import LOSS_TOLERANCE, ROOT, engine_steps, python, ranks, records, torchrun, train
from tests.forks import run_module
from tests.jobs import layout
from tests.tiny_gpt2 import make_ours
from train.checkpoints.step_folder import GuardState
from train.config.run_config import RunConfig, parse
from train.engines import zero
from train.engines.accelerated import AcceleratedEngine
from train.engines.base import Review
from train.run.guard import SIGMA, SKIPS_IN_A_ROW, WINDOW, Guard, is_spike

STEPS = ["--max_steps=8", "--save_interval=2", "--warmup_steps=2", "--max_new_tokens=0"]
PLANTED = ["5", "0", "transformer.h.1.mlp", "nan", "train"]  # in step 5, on rank 0
IN_GRADIENT = ["5", "0", "transformer.h.0.mlp:backward", "nan", "train"]


def config(*flags: str) -> RunConfig:
    return parse(list(flags))


# The rule


def test_a_spike_is_six_standard_deviations_above_the_mean_of_the_window() -> None:
    earlier = deque([2.0, 4.0] * (WINDOW // 2), maxlen=WINDOW)  # mean 3, standard deviation a little above 1
    deviation = math.sqrt(WINDOW / (WINDOW - 1))
    assert not is_spike(3 + SIGMA * deviation - 1e-9, earlier)
    assert is_spike(3 + SIGMA * deviation + 1e-9, earlier)
    assert not is_spike(-1e9, earlier), "only what is above"
    assert not is_spike(1e9, deque([2.0, 4.0] * (WINDOW // 4 - 1))), "half a window is needed"
    assert is_spike(1e9, deque([2.0, 4.0] * (WINDOW // 4)))


@pytest.mark.parametrize("numbers", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_not_finite_stops_and_leaves_no_trace(numbers: tuple[float, float]) -> None:
    before = GuardState(7, losses=[1.0], grad_norms=[2.0])
    guard = Guard(config("--on_spike=warn"), before)
    assert not guard.accepts(*numbers)
    assert (guard.reason, guard.action) == ("non-finite", "stop")
    assert guard.state() == before


def test_skipping_has_an_end() -> None:
    guard = Guard(config("--on_nonfinite=skip"), GuardState(0))
    for _ in range(SKIPS_IN_A_ROW):
        assert not guard.accepts(math.nan, 1.0)
        assert guard.action == "skip"
    assert guard.accepts(2.0, 1.0)
    for _ in range(SKIPS_IN_A_ROW):
        assert not guard.accepts(2.0, math.inf)
    assert not guard.accepts(2.0, math.inf)
    assert guard.action == "stop"
    assert guard.has_given_up
    assert guard.state() == GuardState(1, SKIPS_IN_A_ROW)
    for count, left in ((SKIPS_IN_A_ROW, SKIPS_IN_A_ROW), (SKIPS_IN_A_ROW - 1, 1)):
        resumed = Guard(config("--on_nonfinite=skip"), GuardState(1, count))
        decisions = [resumed.accepts(math.nan, 1.0) or resumed.action for _ in range(left + 1)]
        assert decisions == ["skip"] * left + ["stop"], "a run that has given up counts anew when it resumes"


@pytest.mark.parametrize(("action", "updates"), [("warn", 65), ("skip", 64), ("stop", 64)])
@pytest.mark.parametrize("spike", [(9.0, 1.0), (2.0, 9.0)])
def test_what_is_done_about_a_spike(action: str, updates: int, spike: tuple[float, float]) -> None:
    guard = Guard(config(f"--on_spike={action}"), GuardState(0))
    for step in range(WINDOW // 2):
        assert guard.accepts(2.0 + step % 2, 1.0 + step % 2)
        assert not guard.reason
    assert guard.accepts(*spike) == (action == "warn")
    assert (guard.reason, guard.action) == ("spike", action)
    state = guard.state()
    assert state.updates == updates
    assert (state.losses[-1] == spike[0]) == (action != "stop"), "a resumed run meets it again"
    # As in OLMo-core, it belongs to the window of the next, which are judged by a larger deviation.
    assert guard.accepts(2.0, 1.0)


# Whole runs


def check_decisions(flags: list[str], tmp_path: Path, processes: int, fsdp2: bool = False) -> None:
    """A planted NaN stops the run, its weights saved; skipped, the run resumes exactly from before and after it."""
    kind = "optimized" if any("optimized" in flag for flag in flags) else "baseline"
    planted = [*PLANTED, *flags, *STEPS]
    run_planted = partial(ranks, cwd=tmp_path, processes=processes, fsdp2=fsdp2, module="tests.planted")
    stopped = run_planted(*planted, f"--checkpoint_path={tmp_path}/stop", check=False)
    said = stopped.stdout
    assert stopped.returncode == 3, said
    assert "step 5: the loss is nan (rank " in said
    assert f"{tmp_path}/stop/{kind}/step-4 has the weights before it" in said
    assert len(records(tmp_path / "stop" / kind)) == 4
    assert (tmp_path / "stop" / kind / "latest").read_text() == "step-4\n"

    skip = [*planted, "--on_nonfinite=skip"]
    run_planted(*skip, f"--checkpoint_path={tmp_path}/skip")
    run = tmp_path / "skip" / kind
    assert [record["step"] for record in records(run) if record.get("skipped")] == [5]
    guard = json.loads((run / "step-8" / "training_state.json").read_text())["guard"]
    assert guard["updates"] == 7
    for step in (4, 6):
        resume = [f"--resume_from_checkpoint={run}/step-{step}", f"--checkpoint_path={tmp_path}/from-{step}"]
        run_planted(*skip, *resume)
        for file in ("model.safetensors", "optimizer.safetensors"):
            resumed = tmp_path / f"from-{step}" / kind / "step-8" / file
            assert resumed.read_bytes() == (run / "step-8" / file).read_bytes(), (step, file)


def without_steps(flags: list[str]) -> list[str]:
    return [flag for flag in flags if not flag.startswith(("--max_steps", "--save_interval", "--warmup_steps"))]


@pytest.fixture
def small(flags: list[str]) -> list[str]:
    return without_steps(flags)


@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.faults)])
def test_one_process_stops_or_skips_and_resumes_exactly(small: list[str], tmp_path: Path, precision: str) -> None:
    check_decisions([*small, f"--mixed_precision={precision}"], tmp_path, processes=1)


def test_a_run_that_has_given_up_resumes_as_it_says(small: list[str], tmp_path: Path) -> None:
    run = tmp_path / "baseline"
    planted = [f"3:{2 + SKIPS_IN_A_ROW + 5}", *PLANTED[1:], *small, "--max_steps=30", "--on_nonfinite=skip"]
    planted += ["--max_new_tokens=0", f"--checkpoint_path={tmp_path}"]
    stopped = run_module("tests.planted", planted, tmp_path, check=False)
    assert stopped.returncode == 3, stopped.stderr
    assert f"the last {SKIPS_IN_A_ROW} updates are skipped; {run}/step-22 has the weights since" in stopped.stderr
    resumed = run_module("tests.planted", [*planted, "--resume_from_checkpoint"], tmp_path, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert [record["step"] for record in records(run) if record.get("skipped")] == list(range(3, 28))
    slower = [*planted, "--resume_from_checkpoint=" + str(run / "step-30"), "--learning_rate=1e-3", "--max_steps=32"]
    slower += [f"--checkpoint_path={tmp_path}/slower", "--allow_changes"]
    run_module("tests.planted", slower, tmp_path, check=True)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_a_stop_is_told_although_its_checkpoint_cannot_be_saved(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setenv("LARGEST_FILE", str(1 << 20))
    words = [*PLANTED, *small, "--max_steps=8", "--max_new_tokens=0", f"--checkpoint_path={tmp_path}"]
    words += ["--train_micro_batch_size_per_gpu=2"] * (processes == 2)
    done = ranks(*words, cwd=tmp_path, processes=processes, module="tests.planted", check=False)
    assert done.returncode == 3, done.stdout
    said = done.stdout
    assert said.index("step 5: the loss is nan") < said.index("could not be saved")
    assert f"could not be saved: {tmp_path}/baseline/step-4: File too large; there is no checkpoint yet" in said
    assert "Traceback" not in said


def test_weights_that_are_not_finite(small: list[str], small_model: Path, tmp_path: Path) -> None:
    """They are refused where they are loaded; where an update makes them so, the stop says it."""
    huge = [
        "--learning_rate=1e30",
        "--weight_decay=1e20",
        "--warmup_steps=0",
        "--max_steps=8",
        f"--checkpoint_path={tmp_path}",
    ]
    done = train(*small, *huge, cwd=tmp_path, check=False)
    assert done.returncode == 3, done.stderr
    assert "the weights themselves are not finite: transformer." in done.stderr
    assert "there is no checkpoint yet" in done.stderr
    assert not list((tmp_path / "baseline").glob("step-*"))

    damaged = GPT2LMHeadModel.from_pretrained(small_model)
    damaged.transformer.ln_f.bias.data[3] = math.nan
    damaged.save_pretrained(tmp_path / "damaged")
    words = [*small, f"--model={tmp_path}/damaged", "--max_steps=8", f"--checkpoint_path={tmp_path}/from"]
    done = train(*words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert f"--model {tmp_path}/damaged: transformer.ln_f.bias holds NaN or infinity" in done.stderr


def test_the_checkpoint_of_a_stop_deletes_no_other(small: list[str], tmp_path: Path) -> None:
    run = tmp_path / "baseline"
    words = [*PLANTED, *small, "--max_steps=8", "--save_interval=3", "--save_total_limit=1", "--max_new_tokens=0"]
    words.append(f"--checkpoint_path={tmp_path}")
    stopped = ranks(*words, cwd=tmp_path, processes=1, module="tests.planted", check=False)
    assert stopped.returncode == 3, stopped.stdout
    assert sorted(path.name for path in run.glob("step-*")) == ["step-3", "step-4"]
    state = json.loads((run / "step-4" / "training_state.json").read_text())
    assert state["stopped_by_guard"]
    words += ["--on_nonfinite=skip", "--resume_from_checkpoint"]
    ranks(*words, cwd=tmp_path, processes=1, module="tests.planted")
    assert [path.name for path in run.glob("step-*")] == ["step-8"]


@pytest.mark.faults
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ["baseline", "zero1", "zero2", "zero3", "fsdp2", "pipeline"])
def test_every_layout_stops_or_skips_and_resumes_exactly(
    small: list[str], tmp_path: Path, name: str, precision: str
) -> None:
    own = [flag for flag in layout("baseline" if name == "fsdp2" else name) if "mixed_precision" not in flag]
    check_decisions([*small, *own, f"--mixed_precision={precision}"], tmp_path, processes=2, fsdp2=name == "fsdp2")


@pytest.fixture(scope="module")
def skipped(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The records of one process that skips step 5, in which a gradient is NaN and every loss is finite."""
    folder = tmp_path_factory.mktemp("skipped")
    words = [*IN_GRADIENT, *without_steps(flags), *STEPS, "--mixed_precision=no", "--on_nonfinite=skip"]
    ranks(*words, f"--checkpoint_path={folder}", cwd=folder, processes=1, module="tests.planted")
    return records(folder / "baseline")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["baseline", "zero1", "zero2", "zero2_offload", "zero3", "fsdp2", "pipeline"])
def test_a_gradient_that_is_not_finite_is_skipped_in_every_layout(
    small: list[str], tmp_path: Path, skipped: list[dict], name: str
) -> None:
    own = layout("baseline" if name == "fsdp2" else name)
    words = [*IN_GRADIENT, *small, *STEPS, *own, "--on_nonfinite=skip", f"--checkpoint_path={tmp_path}"]
    done = ranks(*words, cwd=tmp_path, fsdp2=name == "fsdp2", module="tests.planted")
    assert "step 5: the gradient norm is not finite" in done.stdout
    found = records(tmp_path / ("baseline" if name in ("baseline", "fsdp2") else "optimized"))
    assert [each["step"] for each in found if each.get("skipped")] == [5]
    assert [each["step"] for each in skipped if each.get("skipped")] == [5]
    for key in ("loss", "grad_norm"):
        ours, theirs = ([each[key] for each in each_run if each["step"] != 5] for each_run in (found, skipped))
        assert ours == pytest.approx(theirs, rel=1e-4), key
    assert math.isfinite(found[4]["loss"])
    assert found[4]["loss"] == pytest.approx(skipped[4]["loss"], abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("name", ["one process", pytest.param("pipeline", marks=pytest.mark.faults)])
def test_a_gradient_that_is_not_finite_stops_a_run(small: list[str], tmp_path: Path, name: str) -> None:
    own, processes = (layout(name), 2) if name == "pipeline" else (["--mixed_precision=no"], 1)
    words = [*IN_GRADIENT, *small, *STEPS, *own, f"--checkpoint_path={tmp_path}"]
    done = ranks(*words, cwd=tmp_path, processes=processes, check=False, module="tests.planted")
    assert done.returncode == 3, done.stdout
    assert "the gradient norm is not finite, but the losses of all micro-batches on all ranks are" in done.stdout
    assert "python -m train.replay" in done.stdout
    (run,) = (path.parent for path in tmp_path.glob("*/latest"))
    assert (run / "latest").read_text() == "step-4\n"


@pytest.mark.faults
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "pipeline"])
def test_zero_reads_no_value_from_the_device(small: list[str], tmp_path: Path, name: str) -> None:
    """But the review. It looks at the norm, which is in host memory (the next test). ZeRO-3 first traces two steps."""
    steps = engine_steps("reading", tmp_path / name, *small, *layout(name), "--max_steps=3", "--warmup_steps=0")
    assert {place for rank in steps for place in rank[-1]["reads"]} == {"utils.py:is_invalid_grad_norm"}


@pytest.mark.parametrize("accepted", [True, False])
def test_zero_gets_the_norm_in_host_memory(accepted: bool) -> None:
    """Its optimizers are stood in for by the methods that are replaced, on a device whose values cannot be read."""
    on_device = torch.tensor(2.5, device="meta")
    two = SimpleNamespace(scaled_global_norm=lambda: on_device)
    three = SimpleNamespace(_get_norm_groups=lambda: [on_device])
    for optimizer in (two, three):
        zero.review_updates(SimpleNamespace(optimizer=optimizer), lambda norm: 2.5 if accepted else math.inf)
    norms = [two.scaled_global_norm(), *three._get_norm_groups()]
    assert [norm.device.type for norm in norms] == ["cpu", "cpu"]
    assert [norm.item() for norm in norms] == [2.5 if accepted else math.inf] * 2


@pytest.mark.faults
@pytest.mark.parametrize("restarts", [0, 2])
def test_the_launcher_reports_a_stop_which_is_not_repeated(small: list[str], tmp_path: Path, restarts: int) -> None:
    words = [*PLANTED, *small, *STEPS, *layout("baseline"), f"--checkpoint_path={tmp_path}"]
    done = torchrun(f"--max_restarts={restarts}", "-m", "tests.planted", *words, cwd=tmp_path, check=False)
    assert done.returncode == 1, "torchrun has one exit code for all failures of its processes"
    said = done.stdout + done.stderr
    assert "exitcode  : 3" in said
    assert said.count("step 5: the loss is nan") == 1
    assert said.count("not started again, because it would end as before: stopped by the guard") == restarts
    assert "restarted by the launcher" not in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_for_the_device_once() -> None:
    """Before the guard it waited twice: for the loss and for the norm."""
    engine = AcceleratedEngine(config("--run_type=optimized", "--mixed_precision=bf16"), {})
    engine.prepare(make_ours())
    ids = torch.arange(24).reshape(2, 12)
    review = Review(Guard(config("--on_spike=warn"), GuardState(0)).accepts, lambda: (False, False))
    for step in range(3):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                engine.train_step(step, [{"input_ids": ids, "shift_labels": ids}], 1e-4, review)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) == 1


def test_a_norm_that_is_not_computed_cannot_be_judged(tmp_path: Path) -> None:
    file = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    file["zero_optimization"]["compute_grad_norm"] = False
    (tmp_path / "zero2.json").write_text(json.dumps(file))
    done = python(
        "-m", "train", "--run_type=optimized", f"--deepspeed_config={tmp_path}/zero2.json", cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert "compute_grad_norm" in done.stderr
