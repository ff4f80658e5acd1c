"""Where a run starts: each content of a run folder, and a kill at each change of it."""

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.preparations import watch_changes
from tests.run_folders import names, save_step, step_of_weights
from train.checkpoints import run_folder, starting
from train.checkpoints import step_folder as checkpoints
from train.checkpoints.loading import load_config, load_for_inference, load_model
from train.config.run_config import parse
from train.run.setup import resolve_start
from train.utils.errors import UserError

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.test_starting", "deepspeed"])  # all that a child would import


def in_a_fork(work: Callable[..., None], folder: Path, change: int) -> bool:
    """Whether `work` was done before this change in the folder was due, at which its process is killed."""
    process = SERVER.Process(target=_work, args=(work, folder, change))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -9)
    return process.exitcode == 0


def _work(work: Callable[[Path], None], folder: Path, change: int) -> None:
    torch.set_num_threads(1)
    watch_changes(str(folder), change)
    work(folder)


def second_step(run: Path) -> None:
    save_step(run, 2, keep=1)


def replace(run_folder: Path) -> None:
    starting.prepare_run_folder(run_folder, starting.decide(run_folder, None, overwrite=True))


def back_to_step_1(run_folder: Path) -> None:
    step = str(run_folder / "step-1")
    starting.prepare_run_folder(run_folder, starting.decide(run_folder, step, overwrite=False, delete_newer=True))


def resume(run_folder: Path) -> None:
    starting.prepare_run_folder(run_folder, starting.decide(run_folder, "latest", overwrite=False))


@pytest.mark.slow
def test_a_kill_at_each_change_of_a_save_leaves_one_step_to_every_reader(tmp_path: Path) -> None:
    run = tmp_path / "run"
    links_differ = pointers_differ = 0
    for change in range(1, 200):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        save_step(run, 1)
        done = in_a_fork(second_step, run, change)
        named = run_folder.latest(run)
        step = int(named.name.removeprefix("step-"))
        assert starting.find(str(named), run).step == step
        assert step_of_weights(run_folder.model_folder(run)) == step, "what hub uploads"
        assert all((each == step).all() for each in load_for_inference(run).parameters())
        links_differ += step_of_weights(run) != step  # for other tools, which read the run folder's own files
        resume(run)
        newest = starting.find("latest", run).step
        pointers_differ += newest != step
        assert newest >= step
        assert step_of_weights(run) == newest, "the links are mended at the next start"
        assert not {name for name in names(run) if name.startswith(".")}
        if done:
            break
    assert done
    assert change > 20
    assert links_differ > 0, "the kill that this test is about did not occur"
    assert pointers_differ > 0


def test_our_own_tools_never_read_the_links(tmp_path: Path) -> None:
    """Which a kill between `latest` and the links leaves at the step before."""
    for step in (1, 2):
        save_step(tmp_path, step)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    shutil.copy(tmp_path / "step-1" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text("{")
    for model in (load_for_inference(tmp_path), load_model(str(tmp_path), load_config(str(tmp_path)))):
        assert all((parameter == 2).all() for parameter in model.parameters())
    resume(tmp_path)
    assert step_of_weights(tmp_path) == 2
    assert (tmp_path / "config.json").read_bytes() == (tmp_path / "step-2" / "config.json").read_bytes()


def test_what_is_written_to_the_files_of_the_run_folder_does_not_change_a_checkpoint(tmp_path: Path) -> None:
    step = save_step(tmp_path, 1)
    assert not (step / "model.safetensors").stat().st_mode & 0o222
    for file in checkpoints.model_files(step):
        try:
            with (tmp_path / file.name).open("r+b") as opened:  # the same file as before, with another content
                opened.write(b"another")
        except PermissionError:
            assert file.name == "model.safetensors", "all others are copies"
    assert starting.read_intact(step)[1] is None
    resume(tmp_path)
    for file in checkpoints.model_files(step):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), "mended at the next start"


def finished(run_folder: Path) -> None:
    for step in (1, 2):
        save_step(run_folder, step)
    for name in ("metrics.json", "metrics.jsonl", "trackers.json", "notes.md"):
        (run_folder / name).write_text("{}")
    (run_folder / "tensorboard").mkdir()
    (run_folder / "tensorboard" / "events").touch()


def test_a_kill_while_a_run_is_replaced_leaves_what_the_same_command_replaces(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = set()
    for change in range(1, 200):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        finished(run)
        done = in_a_fork(replace, run, change)
        left = starting.look(run)
        try:
            starting.decide(run, None, overwrite=False)
        except UserError as error:
            said.add(str(error).partition(":")[0].removeprefix(f"{run} "))
            assert left.is_of_value
        else:
            assert not left.is_of_value
        assert starting.decide(run, "latest", overwrite=False).checkpoint is None or left.checkpoints
        replace(run)
        assert names(run) == {"notes.md"}, "what no run has written stays"
        if done:
            break
    assert done
    assert said == {"already holds a finished run", "already holds an unfinished run"}


@pytest.mark.slow
def test_a_kill_on_the_way_back_to_an_earlier_step_leaves_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for change in range(1, 200):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        finished(run)
        done = in_a_fork(back_to_step_1, run, change)
        assert run_folder.model_folder(run).name == f"step-{step_of_weights(run_folder.model_folder(run))}"
        assert starting.decide(run, "latest", overwrite=False).checkpoint is not None
        back_to_step_1(run)
        assert starting.find("latest", run).step == step_of_weights(run) == 1
        assert [path.name for path in run.glob("*step*")] == ["step-1"]
        if done:
            break
    assert done


@pytest.mark.slow
def test_a_kill_while_a_damaged_checkpoint_is_put_aside_loses_neither(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for change in range(1, 200):
        shutil.rmtree(run, ignore_errors=True)
        for step in (1, 2):
            save_step(run, step)
        (run / "step-2" / "optimizer.safetensors").write_bytes(b"1")
        done = in_a_fork(resume, run, change)
        resume(run)
        assert starting.find("latest", run).step == step_of_weights(run) == 1
        assert sorted(path.name for path in run.glob("*step*")) == ["step-1", "step-2.damaged"]
        if done:
            break
    assert done
    assert change > 5


# What a run folder can hold. "logs" is what a kill before the first checkpoint leaves.


def absent(run: Path) -> None:
    run.rmdir()


def empty(run: Path) -> None:
    assert not list(run.iterdir())


def foreign(run: Path) -> None:
    (run / "thesis.tex").touch()
    (run / "slurm-17.out").touch()


def logs(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "trackers.json").write_text("{}")


def half_written(run: Path) -> None:
    logs(run)
    save_step(run, 1)
    (run / "step-1").rename(run / ".step-1.77.tmp")
    for file in [*run.glob("*.*"), run / "latest"]:
        if file.is_file() and file.suffix != ".jsonl":
            file.unlink()


def half_deleted(run: Path) -> None:
    (run / "step-4").mkdir()
    (run / "step-4" / "config.json").touch()
    (run / ".step-3.old").mkdir()
    (run / "latest").write_text("step-4\n")


def checkpoint(run: Path) -> None:
    logs(run)
    save_step(run, 1)
    save_step(run, 2)


def without_pointer(run: Path) -> None:
    checkpoint(run)
    (run / "latest").unlink()


def dangling_pointer(run: Path) -> None:
    checkpoint(run)
    shutil.rmtree(run / "step-2")


def summed_up(run: Path) -> None:
    checkpoint(run)
    (run / "metrics.json").write_text("{}")


def only_a_summary(run: Path) -> None:
    logs(run)
    (run / "metrics.json").write_text("{}")


def only_weights(run: Path) -> None:
    checkpoint(run)
    for folder in (run / "step-1", run / "step-2"):
        (folder / "training_state.json").unlink()


def only_links(run: Path) -> None:
    checkpoint(run)
    for folder in (run / "step-1", run / "step-2"):
        shutil.rmtree(folder)


def model(run: Path) -> None:
    step = save_step(run.parent / "other", 1)
    for file in checkpoints.model_files(step):
        shutil.copy(file, run)


ANEW, STEP_1, STEP_2, REFUSED = "anew", "step-1", "step-2", "refused"
# Without a flag, with --resume_from_checkpoint, the same with a step folder elsewhere, with --overwrite
TABLE: list[tuple[Callable[[Path], None], str, str, str, str]] = [
    (absent, ANEW, ANEW, "step-3", ANEW),
    (empty, ANEW, ANEW, "step-3", ANEW),
    (foreign, ANEW, ANEW, "step-3", ANEW),
    (logs, ANEW, ANEW, "step-3", ANEW),
    (half_written, ANEW, ANEW, "step-3", ANEW),
    (half_deleted, ANEW, ANEW, "step-3", ANEW),
    (checkpoint, REFUSED, STEP_2, REFUSED, ANEW),
    (without_pointer, REFUSED, STEP_2, REFUSED, ANEW),
    (dangling_pointer, REFUSED, STEP_1, REFUSED, ANEW),
    (summed_up, REFUSED, STEP_2, REFUSED, ANEW),
    (only_a_summary, REFUSED, REFUSED, REFUSED, ANEW),
    (only_weights, REFUSED, REFUSED, REFUSED, ANEW),
    (only_links, REFUSED, REFUSED, REFUSED, ANEW),
    (model, REFUSED, REFUSED, REFUSED, REFUSED),
]


@pytest.mark.parametrize(
    ("content", "way", "expected"),
    [
        pytest.param(row[0], way, expected, id=f"{row[0].__name__}-{way}")
        for row in TABLE
        for way, expected in zip(("plain", "resume", "resume_elsewhere", "overwrite"), row[1:], strict=True)
    ],
)
def test_the_table_of_starts(tmp_path: Path, content: Callable[[Path], None], way: str, expected: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    content(run)
    elsewhere = str(save_step(tmp_path / "elsewhere", 3)) if way == "resume_elsewhere" else None
    requested = {"resume": "latest", "resume_elsewhere": elsewhere}.get(way)
    before = names(run) if run.exists() else set()
    if expected == REFUSED:
        with pytest.raises(UserError, match=str(run)):
            starting.decide(run, requested, overwrite=way == "overwrite")
        assert names(run) == before
        return
    start = starting.decide(run, requested, overwrite=way == "overwrite")
    assert (start.checkpoint.folder.name if start.checkpoint else ANEW) == expected
    starting.prepare_run_folder(run, start)
    left = starting.look(run)
    assert left.is_of_value == (expected in (STEP_1, STEP_2)), "nothing of another run is taken for this one's"
    assert not left.leftovers
    assert {"thesis.tex", "slurm-17.out"} & before <= names(run)
    if expected in (STEP_1, STEP_2):
        assert run_folder.latest(run).name == expected
        assert step_of_weights(run) == int(expected.removeprefix("step-"))
    if way == "resume":
        assert (start.note is None) == (content in (checkpoint, summed_up)), "what the user may not expect is said"


def test_the_run_folder_itself_may_be_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert starting.decide(run, str(run), overwrite=False).checkpoint is None
    save_step(run, 1)
    found = starting.decide(run, f"{tmp_path}/./run", overwrite=False).checkpoint
    assert found is not None
    assert found.step == 1


def test_newer_checkpoints_are_not_deleted_without_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    with pytest.raises(UserError) as error:
        starting.decide(tmp_path, str(tmp_path / "step-1"), overwrite=False)
    assert f"{tmp_path} has newer checkpoints (step-3, step-2)" in str(error.value)
    assert "--delete_newer_checkpoints" in str(error.value)
    back_to_step_1(tmp_path)
    assert "deleting step-3, step-2" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-1"]


def test_resuming_in_another_folder_deletes_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(tmp_path / "run", step)
    start = starting.decide(tmp_path / "other", str(tmp_path / "run" / "step-1"), overwrite=False)
    starting.prepare_run_folder(tmp_path / "other", start)
    assert {"step-1", "step-2"} <= names(tmp_path / "run")


def test_a_model_that_the_run_would_delete_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = save_step(tmp_path / "baseline", 1)
    for model in (step, tmp_path / "baseline"):
        with pytest.raises(UserError, match=f"--model {model}: --overwrite deletes it"):
            resolve_start(parse([f"--model={model}", "--overwrite", f"--checkpoint_path={tmp_path}"]))
    monkeypatch.chdir(tmp_path / "baseline")
    assert resolve_start(parse(["--model=gpt2", "--overwrite", f"--checkpoint_path={tmp_path}"])).delete


def test_a_run_folder_may_be_a_link(tmp_path: Path) -> None:
    save_step(tmp_path / "disk" / "run", 1)
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    resume(tmp_path / "run")
    replace(tmp_path / "run")
    assert names(tmp_path / "run") == set()
    assert (tmp_path / "run").is_symlink()
