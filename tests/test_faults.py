"""A run is told to end in each of its phases; and random signals again and again (`tests.faults.soak`)."""

import shutil
import signal
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.conftest import LOSS_TOLERANCE, losses, python, ranks, records, train
from tests.faults.soak import Soak
from tests.forks import run_module
from tests.jobs import layout
from train.checkpoints.digests import digest_of_file
from train.checkpoints.starting import look
from train.utils.lock import LOCK

pytestmark = pytest.mark.faults

INTERVALS = ["--save_interval=4", "--eval_interval=4"]
PROFILE = ["--profile", "--profile_steps=3:5"]
WAITING = ["--async_save=false"]  # or the steps that are done meanwhile are another number each time
COMPILED = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")


def signalled(at: str, number: str, flags: list[str], folder: Path, *, forked: bool = True) -> CompletedProcess[str]:
    """A run that gets a signal at a place and call of `tests.signal_at`, as "train.run.loop:validate 2"."""
    place, _, call = at.partition(" ")
    words = [place, number, call or "1", *flags, f"--checkpoint_path={folder}"]
    if forked:
        return run_module("tests.signal_at", words, folder, check=False)
    return python("-m", "tests.signal_at", *words, cwd=folder, check=False)


def check_whole(run: Path, done: CompletedProcess[str]) -> None:
    """No traceback, and nothing half-written."""
    assert "Traceback" not in done.stdout + done.stderr
    assert [path.name for path in run.rglob(".*") if path.name != LOCK] == []
    assert not look(run).leftovers


def check_continues(flags: list[str], folder: Path, finished: Path) -> None:
    train(*flags, f"--checkpoint_path={folder}", "--resume_from_checkpoint", cwd=folder)
    run = folder / "baseline"
    assert losses(run) == losses(finished)
    assert [each.get("val_loss") for each in records(run)] == [each.get("val_loss") for each in records(finished)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert digest_of_file(run / "step-8" / name) == digest_of_file(finished / "step-8" / name), name
    check_whole(run, CompletedProcess([], 0, "", ""))


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("at", ["train.run.loop", "train.run.setup:resolve_data"])
def test_before_the_run_has_begun(flags: list[str], finished: Path, tmp_path: Path, at: str, number: str) -> None:
    """Importing and resolving write nothing, and a signal ends them at once."""
    done = signalled(at, number, [*flags, *INTERVALS], tmp_path, forked=":" in at)
    assert done.returncode == (130 if number == "SIGINT" else -signal.Signals[number])
    check_whole(tmp_path / "baseline", done)
    assert {path.name for path in (tmp_path / "baseline").glob("*")} <= {LOCK}
    check_continues([*flags, *INTERVALS], tmp_path, finished)


@pytest.mark.parametrize(
    ("at", "saved", "more"),
    [
        pytest.param("train.run.loop:load_model", 0, [], id="loading the model"),
        pytest.param("train.checkpoints.starting:prepare_run_folder", 0, [], id="preparing the run folder"),
        pytest.param("train.engines.base:Engine.train_step", 1, [], id="first step"),
        pytest.param("train.engines.base:Engine.train_step 6", 6, [], id="middle step"),
        pytest.param("train.engines.accelerated:AcceleratedEngine.eval_step 2", 4, [], id="validation"),
        pytest.param("train.run.loop:validate 2", 8, [], id="last validation"),
        pytest.param("train.checkpoints.step_folder:save", 4, WAITING, id="before the files of a checkpoint"),
        pytest.param("train.checkpoints.safetensors_writer:TensorFile.write 9", 4, WAITING, id="within a checkpoint"),
        pytest.param("train.checkpoints.step_folder:point_to", 4, WAITING, id="after the files of a checkpoint"),
        pytest.param("train.engines.base:Engine.train_step 3", 3, PROFILE, id="profiled step"),
        pytest.param("train.run.profiling:Profiler._write", 5, PROFILE, id="writing the trace"),
        pytest.param("train.run.loop:write_summary", 8, [], id="summary"),
        pytest.param(
            "transformers.modeling_utils:_get_resolved_checkpoint_files 2", 8, [], id="loading the summary's"
        ),
        pytest.param("train.run.summary:generate_text", 8, [], id="sample"),
        pytest.param("train.run.summary:measure_latency", 8, [], id="latency"),
        pytest.param("train.run.summary:write_json", 8, [], id="writing the summary"),
    ],
)
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_in_a_phase(
    flags: list[str], finished: Path, tmp_path: Path, at: str, saved: int, more: list[str], number: str
) -> None:
    """The step under way is finished and saved, and the same command continues to the same end.

    What comes after a step, as its checkpoint, is finished too; a validation is not.
    """
    run, words = tmp_path / "baseline", [*flags, *INTERVALS]
    done = signalled(at, number, [*words, *more], tmp_path)
    assert done.returncode == 75, done.stderr
    assert number in done.stderr
    check_whole(run, done)
    if saved:
        assert records(run)[-1]["step"] == saved
        assert (run / "latest").read_text() == f"step-{saved}\n"
    assert not (run / "metrics.json").exists()
    check_continues(words, tmp_path, finished)


@pytest.mark.parametrize("name", ["baseline", "zero1", "zero2", "zero3", "fsdp2", "pipeline"])
def test_in_a_phase_of_every_layout(flags: list[str], finished: Path, tmp_path: Path, name: str) -> None:
    """One rank gets it, within its backward pass, while a checkpoint is written, and while all steps are validated."""
    engine = "pipeline.engine:PipelinedEngine" if name == "pipeline" else "accelerated:AcceleratedEngine"
    words = [*flags, *layout("baseline" if name == "fsdp2" else name), "--save_interval=4", "--eval_interval=8"]
    run = tmp_path / ("baseline" if name in ("baseline", "fsdp2") else "optimized")
    for at, call, saved in (
        ("modeling_gpt2flash.modeling_gpt2flash:GPT2FlashMLP.forward/backward@0", 12 if name == "pipeline" else 6, 3),
        ("train.engines.base:Engine.train_step@0", 2, 5),  # of which the first has begun to save step 4
        (f"train.engines.{engine}.eval_step@1", 2, 8),
    ):
        more = [f"--checkpoint_path={tmp_path}", "--resume_from_checkpoint"]
        job = [at, "SIGTERM", call, *words, *more]
        done = ranks(*job, cwd=tmp_path, fsdp2=name == "fsdp2", check=False, module="tests.signal_at")
        assert done.returncode == 75, done.stdout
        step = records(run)[-1]["step"]
        assert step == saved, done.stdout
        assert (run / "latest").read_text() == f"step-{step}\n"
        check_whole(run, done)
    assert losses(run) == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@COMPILED
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_while_blocks_are_compiled(flags: list[str], tmp_path: Path, number: str) -> None:
    words = [*flags, *INTERVALS, "--torch_compile"]
    done = signalled("torch._inductor.compile_fx:compile_fx", number, words, tmp_path, forked=False)
    assert done.returncode == 75, done.stderr
    run = tmp_path / "baseline"
    check_whole(run, done)
    assert (run / "latest").read_text() == "step-1\n"
    python("-m", "train", *words, f"--checkpoint_path={tmp_path}", "--resume_from_checkpoint", cwd=tmp_path)
    assert [record["step"] for record in records(run)] == list(range(1, 9))


@pytest.mark.parametrize(("layout", "cycles"), [("single", 8), ("zero2", 2), ("pipeline", 2)])
def test_random_signals(tmp_path: Path, layout: str, cycles: int) -> None:
    done = Soak(layout, 20, tmp_path, seed=15).run(cycles)
    assert done.cycles == cycles
    assert done.runs > 0
