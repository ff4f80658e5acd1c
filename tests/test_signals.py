"""A run that is asked to end: it finishes the step, saves, says so and exits with 75, on all ranks."""

import json
import signal
import sys
from operator import attrgetter
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.conftest import python, ranks, records, train
from tests.jobs import Job, job, launcher, layout
from train.config.arguments import duration
from train.run.signals import DUPLICATE_SECONDS, MARGIN, SIGNALS, TimeNeeded, find_deadline, is_pressed_again
from train.run.validate import LOOK_SECONDS, next_interval

NAME = attrgetter("name")
ENDLESS = ["--max_steps=100000", "--max_new_tokens=0", "--eval_steps=1"]


@pytest.fixture
def endless(flags: list[str]) -> list[str]:
    return [flag for flag in flags if not flag.startswith(("--max_steps", "--max_new"))] + ENDLESS


def check_saved(run: Path, said: str) -> int:
    """The step of the newest checkpoint, which is that of the last record; a temporary one may be left before it."""
    step = records(run)[-1]["step"]
    saved = sorted(int(folder.name.removeprefix("step-")) for folder in run.glob("step-*"))
    assert saved[-1] == step
    assert len(saved) <= 2
    assert (run / "latest").read_text() == f"step-{step}\n"
    assert f"the run stops after step {step:,} of 100,000; {run}/step-{step} is saved" in said
    assert "Traceback" not in said
    assert not (run / "metrics.json").exists()
    return step


# Times


@pytest.mark.parametrize(
    ("text", "seconds"), [("11:50:00", 42_600), ("0:30", 30), ("1-00:00:10", 86_410), ("100:00:00", 360_000)]
)
def test_a_duration(text: str, seconds: float) -> None:
    assert duration(text) == seconds


def test_the_earlier_deadline_counts() -> None:
    slurm = {"SLURM_JOB_END_TIME": "5000"}
    assert find_deadline(None, {}, 1000) == (None, "")
    assert find_deadline(3600, {}, 1000) == (4600, "--max_time 1:00:00")
    assert find_deadline(3600, slurm, 1000) == (4600, "--max_time 1:00:00")
    assert find_deadline(7200, slurm, 1000) == (5000, "the end of the Slurm job")


def test_a_step_is_expected_to_take_what_steps_took() -> None:
    """Not what came before the first or between; and compilation, which is part of the first, only once."""
    needed = TimeNeeded(save_seconds=10)
    assert needed.seconds(now=900) == MARGIN + 20, "15 minutes of start-up are no step"
    needed.step_begins(900)
    assert needed.seconds(now=1100) == MARGIN + 200 + 20
    needed.step_done(1100, is_typical=True)
    assert needed.seconds(now=5000) == MARGIN + 200 + 20, "the next may be as slow as the first"
    needed.step_begins(5000)
    needed.step_done(5003, is_typical=True)
    needed.step_begins(6000)
    needed.step_done(6900, is_typical=False)
    assert needed.seconds(now=9000) == MARGIN + 2 * 3 + 20
    needed.step_begins(9000)
    assert needed.seconds(now=9100) == MARGIN + 100 + 20, "one that is slower than all before"


def test_a_validation_looks_up_about_every_second() -> None:
    assert next_interval(1, LOOK_SECONDS * 30) == 1, "at every batch, if batches are slow"
    assert next_interval(1, LOOK_SECONDS / 1000) == 2, "the first may be faster than the others"
    assert next_interval(64, LOOK_SECONDS / 1.5) == 96
    assert next_interval(64, LOOK_SECONDS * 2) == 32
    assert next_interval(64, 0.0) == 128


@pytest.mark.parametrize(
    ("times", "launched", "again"),
    [
        ([0.0], False, False),
        ([0.0, 0.1], False, True),  # nobody passes it on
        ([0.0, 0.1], True, False),  # a terminal and a launcher
        ([0.0, DUPLICATE_SECONDS], True, True),
        ([0.0, 0.1, 0.3], True, True),  # however fast a person is
    ],
)
def test_which_ctrl_c_is_a_second_press(times: list[float], launched: bool, again: bool) -> None:
    assert is_pressed_again(times, launched) == again


def test_a_time_that_is_none_is_refused(tmp_path: Path) -> None:
    done = python("-m", "train", "--max_time", "soon", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "--max_time: 'soon' is not a duration; write it as H:M:S" in done.stderr


def test_a_run_stops_in_time_and_the_same_command_continues(endless: list[str], tmp_path: Path) -> None:
    run = tmp_path / "baseline"
    for _ in range(2):  # each ends after one step, because what a save may need is more than the time that is left
        done = python(
            "-m", "train", *endless, "--max_time=0:01", f"--checkpoint_path={tmp_path}",
            *(["--resume_from_checkpoint"] if run.exists() else []), cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 75, done.stderr
        assert "--max_time 0:00:01: the run stops after step" in done.stderr
        step = check_saved(run, done.stderr)
    assert step == 2


@pytest.mark.faults
def test_checkpoints_by_time_replace_each_other(flags: list[str], tmp_path: Path) -> None:
    done = python(
        "-m",
        "train",
        *flags,
        "--save_minutes=1e-9",
        "--save_interval=4",
        f"--checkpoint_path={tmp_path}",
        cwd=tmp_path,
    )
    assert "checkpoints: every 4 steps, every 1e-09 minutes" in done.stdout
    assert sorted(folder.name for folder in (tmp_path / "baseline").glob("step-*")) == ["step-4", "step-7", "step-8"]


# Signals


@pytest.mark.parametrize(
    "number", [SIGNALS[0], *(pytest.param(each, marks=pytest.mark.faults) for each in SIGNALS[1:])]
)
def test_a_signal_ends_a_run_with_a_checkpoint(endless: list[str], tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "baseline"
    with job(sys.executable, "-m", "train", *endless, f"--checkpoint_path={tmp_path}", cwd=tmp_path) as started:
        started.until_step(3, run)
        started.process.send_signal(number)
        assert started.end() == 75, started.said()
        said = started.said()
    assert f"{number.name}: the run finishes this step, saves a checkpoint and stops" in said
    assert check_saved(run, said) >= 3


@pytest.mark.faults
def test_a_second_ctrl_c_ends_at_once(endless: list[str], tmp_path: Path) -> None:
    slow = [*endless, "--gradient_accumulation_steps=100000", f"--checkpoint_path={tmp_path}"]
    with job(sys.executable, "-m", "train", *slow, cwd=tmp_path) as started:
        started.until(lambda: "checkpoints: " in started.said())
        started.process.send_signal(signal.SIGINT)
        started.until(lambda: "Ctrl-C again ends at once" in started.said())
        started.process.send_signal(signal.SIGINT)
        assert started.end(60) == 130
        assert "ended by the second Ctrl-C" in started.said()
        assert "Traceback" not in started.said()
    assert not list((tmp_path / "baseline").glob("*step-*"))


@pytest.mark.faults
def test_what_is_ignored_at_the_start_stays_ignored(endless: list[str], tmp_path: Path) -> None:
    """By nohup, and by a shell that starts a command in the background; SIGUSR1 is a scheduler's, for the ranks."""
    run = tmp_path / "baseline"
    ignoring = ["env", "--ignore-signal=INT,HUP,USR1", sys.executable, "-m", "train", *endless]
    with job(*ignoring, f"--checkpoint_path={tmp_path}", cwd=tmp_path) as started:
        started.until_step(3, run)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT):
            started.process.send_signal(number)
        started.until_step(records(run)[-1]["step"] + 50, run)
        started.process.send_signal(signal.SIGUSR1)
        assert started.end() == 75, started.said()
        assert "SIGUSR1: the run stops" in started.said()
        assert "SIGHUP" not in started.said()


@pytest.fixture
def validating(endless: list[str], corpus: Path, tmp_path: Path) -> list[str]:
    """A run with a validation of a minute after each step."""
    own = [flag for flag in endless if not flag.startswith(("--eval_steps", "--val_data_path"))]
    (tmp_path / "val.bin").write_bytes((corpus / "train.bin").read_bytes() * 2000)
    return [*own, f"--val_data_path={tmp_path}/val.bin", "--eval_interval=1", f"--checkpoint_path={tmp_path}"]


def check_ended_within_validation(run: Path, done: CompletedProcess[str]) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == 75, said
    assert "the run stops after step 1 of" in said
    assert "validation:" in said, "the bar"
    assert "val_loss" not in records(run)[-1]
    assert (run / "latest").read_text() == "step-1\n"


@pytest.mark.faults
def test_a_time_limit_ends_a_validation(validating: list[str], tmp_path: Path) -> None:
    done = train(*validating, f"--max_time=0:{MARGIN + 15:.0f}", cwd=tmp_path, check=False)
    check_ended_within_validation(tmp_path / "baseline", done)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["zero3", "pipeline"])
def test_all_ranks_look_up_from_a_validation_at_once(validating: list[str], tmp_path: Path, name: str) -> None:
    """To save by time, and then to end, which the main process alone decides."""
    flags = layout("baseline" if name == "fsdp2" else name)
    timed = ["--save_minutes=0.2", f"--max_time=0:{MARGIN + 30:.0f}"]
    done = ranks(*validating, *flags, *timed, cwd=tmp_path, fsdp2=name == "fsdp2", check=False)
    (run,) = (path.parent for path in tmp_path.glob("*/latest"))
    check_ended_within_validation(run, done)
    assert json.loads((run / "step-1" / "training_state.json").read_text())["temporary"], "saved by time"


@pytest.mark.faults
def test_a_checkpoint_is_saved_before_a_trace_if_time_is_limited(flags: list[str], tmp_path: Path) -> None:
    for limit, saved in ([], ["step-8"]), (["--max_time=1:00:00"], ["step-4", "step-8"]):
        folder = tmp_path / f"{len(limit)}"
        words = [*flags, "--profile", "--profile_steps=3:5", "--async_save=false", "--max_new_tokens=0", *limit]
        train(*words, f"--checkpoint_path={folder}", cwd=tmp_path)
        assert sorted(path.name for path in (folder / "baseline").glob("step-*")) == saved


@pytest.mark.faults
def test_a_checkpoint_by_time_is_saved_within_a_validation(validating: list[str], tmp_path: Path) -> None:
    run = tmp_path / "baseline"
    with job(sys.executable, "-m", "train", *validating, "--save_minutes=0.1", cwd=tmp_path) as started:
        started.until_saved(run)
        assert len(records(run)) == 1
        assert "val_loss" not in records(run)[-1]
        started.process.send_signal(signal.SIGTERM)
        assert started.end(60) == 75, started.said()
        assert check_saved(run, started.said()) == 1


def test_a_signal_during_a_validation_ends_it(validating: list[str], tmp_path: Path) -> None:
    run = tmp_path / "baseline"
    with job(sys.executable, "-m", "train", *validating, cwd=tmp_path) as started:
        started.until_step(1, run)
        started.until(lambda: "validation:" in started.said())
        started.process.send_signal(signal.SIGTERM)
        assert started.end(60) == 75, started.said()
        assert check_saved(run, started.said()) == 1


def signal_to(started: Job, target: str, number: signal.Signals) -> None:
    (started.process if target == "launcher" else started.worker(int(target))).send_signal(number)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["baseline", "zero2", "pipeline"])
@pytest.mark.parametrize(("target", "number"), [("1", signal.SIGUSR1), ("0", signal.SIGTERM)])
def test_a_signal_to_one_rank_ends_all_after_the_same_step(
    endless: list[str], tmp_path: Path, name: str, target: str, number: signal.Signals
) -> None:
    run = tmp_path / ("baseline" if name == "baseline" else "optimized")
    words = [*launcher("torchrun"), "-m", "train", *endless, *layout(name), f"--checkpoint_path={tmp_path}"]
    with job(*words, cwd=tmp_path) as started:
        started.until_step(3, run)
        signal_to(started, target, number)
        assert started.end() == 1  # torchrun's own code for processes that ended with another than 0
        said = started.said()
    assert said.count("exitcode  : 75") >= 1, said
    assert check_saved(run, said.replace("Traceback (most recent call last)", "torchrun's own", 1)) >= 3
    assert f"{number.name}: the run stops" in said


@pytest.mark.faults
@pytest.mark.parametrize("program", ["torchrun", "accelerate", "deepspeed"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=NAME)
def test_a_signal_to_the_launcher_ends_all_with_a_checkpoint(
    endless: list[str], tmp_path: Path, program: str, number: signal.Signals
) -> None:
    run = tmp_path / "optimized"
    words = [*launcher(program), "-m" if program != "deepspeed" else "--module", "train", *endless, *layout("zero2")]
    with job(*words, f"--checkpoint_path={tmp_path}", cwd=tmp_path) as started:
        started.until_step(3, run)
        workers = [started.worker(rank) for rank in (0, 1)]
        started.process.send_signal(number)
        started.end()
        for worker in workers:
            worker.wait(60)
        said = started.said()
    assert "is saved, and --resume_from_checkpoint continues" in said, said
    assert (run / "latest").read_text() == f"step-{records(run)[-1]['step']}\n"
    assert (run / (run / "latest").read_text().strip() / "training_state.json").exists()


@pytest.mark.faults
def test_one_ctrl_c_of_a_terminal_ends_a_job_with_a_checkpoint(endless: list[str], tmp_path: Path) -> None:
    """It goes to the launcher and to its processes, which then get it twice."""
    run = tmp_path / "baseline"
    words = [*launcher("torchrun"), "-m", "train", *endless, *layout("baseline"), f"--checkpoint_path={tmp_path}"]
    with job(*words, cwd=tmp_path) as started:
        started.until_step(3, run)
        for process in [started.worker(0), started.worker(1), started.process]:
            process.send_signal(signal.SIGINT)
        started.end()
        said = started.said()
    assert "Ctrl-C again, after a second, ends at once" in said
    assert "is saved, and --resume_from_checkpoint continues" in said, said
    assert (run / "latest").read_text() == f"step-{records(run)[-1]['step']}\n"
