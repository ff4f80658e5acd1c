"""Run folders after failures, and resuming from them."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from tests.conftest import SMALL, losses
from tests.run_folders import save_step
from train.checkpoints import starting
from train.checkpoints import step_folder as checkpoints
from train.optim.parameter_groups import moments_of
from train.utils.errors import UserError


@pytest.fixture(scope="module")
def model() -> GPT2FlashForCausalLM:
    torch.manual_seed(0)
    return GPT2FlashForCausalLM(GPT2FlashConfig(**SMALL, vocab_size=50257))


def states_of(
    model: GPT2FlashForCausalLM,
    step: int,
    optimizer: str = "adamw",
    change: Callable[[str, dict[str, torch.Tensor]], None] = lambda name, tensors: None,
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The tensors of a checkpoint whose moments are all `step`; `change` may change those of each parameter."""
    for name, p in model.named_parameters():
        own = {"weight": p.detach(), **{key: torch.full_like(p, step) for key in moments_of(optimizer, name)}}
        change(name, own)
        yield name, own


def save(
    folder: Path,
    model: GPT2FlashForCausalLM,
    step: int,
    keep: int | None = None,
    optimizer: str = "adamw",
    states: Iterable[tuple[str, Mapping[str, torch.Tensor]]] | None = None,
) -> Path:
    state = checkpoints.TrainingState(
        step=step,
        tokens=step * 64,
        model={"n_layer": model.config.n_layer},
        train_data={},
        seed=0,
        block_size=64,
        sequences_per_step=1,
        optimizer=optimizer,
        total_steps=10,
        config={},
    )
    return checkpoints.save(folder, model.config, None, states or states_of(model, step, optimizer), state, keep)


def test_save_find_read(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    save(tmp_path, model, 3)
    weights = (tmp_path / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "step-3" / "model.safetensors").read_bytes()
    found = starting.find("latest", tmp_path)
    assert (found.step, found.folder) == (3, tmp_path / "step-3")
    weights, moments = checkpoints.read_tensors(found, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter)
        assert torch.equal(moments[f"exp_avg.{name}"], torch.full_like(parameter, 3))
    assert starting.find(str(tmp_path), Path("elsewhere")).step == 3
    assert starting.find(str(tmp_path / "step-3"), Path("elsewhere")).step == 3


def test_muon_keeps_one_moment_of_a_matrix(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    save(tmp_path, model, 3, optimizer="muon")
    _, moments = checkpoints.read_tensors(starting.find("latest", tmp_path), model)
    kept = [moment for moment in moments if moment.endswith(("wte.weight", "h.0.mlp.c_fc.weight"))]
    assert sorted(kept) == [
        "exp_avg.transformer.wte.weight",
        "exp_avg_sq.transformer.wte.weight",
        "momentum_buffer.transformer.h.0.mlp.c_fc.weight",
    ]


def test_a_checkpoint_from_before_there_was_a_choice_is_adamws(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    file = save(tmp_path, model, 3) / "training_state.json"
    state = json.loads(file.read_text())
    del state["optimizer"], state["document_mask"], state["digests"]
    file.write_text(json.dumps(state))
    found = starting.find("latest", tmp_path).state
    assert (found.optimizer, found.document_mask) == ("adamw", False)


def test_only_the_newest_are_kept(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    for step in (2, 9, 10):
        save(tmp_path, model, step, keep=2)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-10", "step-9"]


def test_no_more_are_deleted_than_there_are_too_many(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    for step in range(1, 6):
        save(tmp_path, model, step, keep=4)
        (tmp_path / "step-2" / "training_state.json").unlink(missing_ok=True)
    kept = ["step-1", "step-2", "step-3", "step-4", "step-5"]
    assert sorted(path.name for path in tmp_path.glob("*step*")) == kept, "step-2 is no checkpoint: it does not count"


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints.step_folders(folder)]


@pytest.mark.parametrize("keep", [None, 1])
def test_two_checkpoints_are_kept_as_long_as_one_of_them_is_temporary(tmp_path: Path, keep: int | None) -> None:
    for step, left in ((1, [1]), (2, [1, 2]), (3, [2, 3]), (4, [3, 4])):
        save_step(tmp_path, step, keep, temporary=True)
        assert steps_in(tmp_path) == left
    save_step(tmp_path, 5, keep)
    assert steps_in(tmp_path) == [4, 5], "the newest may be damaged"
    save_step(tmp_path, 6, keep)
    assert steps_in(tmp_path) == ([5, 6] if keep is None else [6])
    save_step(tmp_path, 7, keep, temporary=True)
    assert steps_in(tmp_path) == ([5, 6, 7] if keep is None else [6, 7])


@pytest.mark.parametrize("keep", [None, 1])
def test_the_checkpoint_before_a_stop_of_the_guard_stays_until_a_later_one_is_complete(
    tmp_path: Path, keep: int | None
) -> None:
    for step in (1, 2):
        save_step(tmp_path, step, keep, temporary=True)
    save_step(tmp_path, 3, keep, stopped_by_guard=True)
    assert steps_in(tmp_path) == [1, 2, 3], "whose weights may diverge already"
    checkpoints.rotate(tmp_path, keep)  # by a run that resumes
    assert steps_in(tmp_path) == [1, 2, 3]
    save_step(tmp_path, 4, keep, stopped_by_guard=True)
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    save_step(tmp_path, 5, keep, temporary=True)
    assert steps_in(tmp_path) == [2, 5]


def test_a_checkpoint_that_cannot_be_read_is_not_rotated_away(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    (tmp_path / "step-1" / "training_state.json").write_text("{")
    (tmp_path / "step-2").rename(tmp_path / "step-0")
    save_step(tmp_path, 4, keep=1)
    assert steps_in(tmp_path) == [0, 1, 4]


def test_what_cannot_be_deleted_ends_no_run_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on NFS, where a file that another process reads keeps a hidden name in its folder."""
    remove = os.unlink

    def in_use(path: str, **where: object) -> None:
        if str(path).endswith("optimizer.safetensors"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        remove(path, **where)

    save_step(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", in_use)
        save_step(tmp_path, 2, keep=1)
        said = capsys.readouterr().err
        assert "cannot be deleted yet: Device or resource busy; tried again after the next checkpoint" in said
        (left,) = tmp_path.glob(".step-1.*")
        assert [path.name for path in left.iterdir()] == ["optimizer.safetensors"]
        save_step(tmp_path, 1)
        starting.prepare_run_folder(tmp_path, starting.decide(tmp_path, "latest", overwrite=False))
        assert "cannot be deleted yet" in capsys.readouterr().err
    assert steps_in(tmp_path) == [1, 2]
    save_step(tmp_path, 3, keep=1)
    assert steps_in(tmp_path) == [3]
    assert not list(tmp_path.glob(".step*"))
    assert "cannot be deleted" not in capsys.readouterr().err


def test_resuming_from_an_earlier_step_deletes_the_later_ones(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    for step in (4, 8):
        save(tmp_path, model, step)
    (tmp_path / "step-8-copy").mkdir()
    start = starting.decide(tmp_path, str(tmp_path / "step-4"), overwrite=False, delete_newer=True)
    starting.prepare_run_folder(tmp_path, start)
    assert starting.find("latest", tmp_path).step == 4
    save(tmp_path, model, 5, keep=1)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-5", "step-8-copy"]


def test_a_missing_tensor_is_named(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    optimizer = save(tmp_path, model, 1) / "optimizer.safetensors"
    save_file({"exp_avg.transformer.wte.weight": torch.ones(1)}, optimizer)
    with pytest.raises(UserError, match=r"exp_avg\.transformer\.h\.0\.attn\.c_attn\.bias is missing"):
        checkpoints.read_tensors(starting.find("latest", tmp_path), model)


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    save(tmp_path, model, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, limits[1]))  # the moments take 6.4 MB
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path, model, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step-1"]
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_saving_the_same_step_again_replaces_it(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    save(tmp_path, model, 1)
    (tmp_path / "step-1" / "foreign").touch()
    save(tmp_path, model, 1)
    assert not (tmp_path / "step-1" / "foreign").exists()


def test_an_unfinished_folder_is_never_read_as_a_checkpoint(tmp_path: Path, model: GPT2FlashForCausalLM) -> None:
    save(tmp_path, model, 1)
    shutil.copytree(tmp_path / "step-1", tmp_path / ".step-2.tmp")
    assert starting.find("latest", tmp_path).step == 1
    starting.prepare_run_folder(tmp_path, starting.decide(tmp_path, "latest", overwrite=False))
    assert not (tmp_path / ".step-2.tmp").exists()


def replace(file: Path, content: bytes) -> None:
    file.unlink()  # it may be read-only
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda run: (run / "step-1" / "training_state.json").unlink(), ["training_state.json", "--overwrite"]),
        (lambda run: (run / "step-1" / "training_state.json").write_text("{"), ["training_state.json"]),
        (lambda run: (run / "step-1" / "training_state.json").write_text("{}"), ["training_state.json"]),
        (lambda run: shutil.rmtree(run / "step-1"), ["step-1"]),
        (lambda run: replace(run / "step-1" / "model.safetensors", b"123"), ["damaged", "model.safetensors"]),
        (lambda run: (run / "step-1" / "optimizer.safetensors").unlink(), ["cannot be read", "optimizer.safetensors"]),
    ],
)
def test_damage_is_named(tmp_path: Path, model: GPT2FlashForCausalLM, damage, names: list[str]) -> None:
    save(tmp_path, model, 1)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        checkpoints.read_tensors(starting.find("latest", tmp_path), model)
    assert all(name in str(error.value) for name in names), str(error.value)


def test_a_killed_run_resumes_from_its_last_checkpoint(flags: list[str], finished: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "train", *flags, "--save_interval=1", f"--checkpoint_path={tmp_path}"]
    latest = tmp_path / "baseline" / "latest"
    process = subprocess.Popen(
        argv, cwd=tmp_path, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not latest.exists() or latest.read_text().strip() in ("", "step-1"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "baseline" / "metrics.json").exists()
    step = starting.find("latest", tmp_path / "baseline").step
    assert 2 <= step < 8
    subprocess.run([*argv, "--resume_from_checkpoint"], cwd=tmp_path, check=True, capture_output=True)
    assert losses(tmp_path / "baseline") == losses(finished)
    assert json.loads((tmp_path / "baseline" / "metrics.json").read_text())["steps"] == 8
