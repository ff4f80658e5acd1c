"""What a run tells TensorBoard, read back by its own reader; the others are in test_integration_trackers.py."""

import json
from pathlib import Path

import pytest
from accelerate.tracking import get_available_trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.conftest import records, torchrun, train
from train import trackers
from train.utils.errors import UserError


def test_a_tracker_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trackers.check(["tensorboard"])
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [])
    with pytest.raises(UserError, match=r"--report_to wandb: its package is not installed; pip install wandb"):
        trackers.check(["wandb"])
    assert "tensorboard" in map(str, get_available_trackers())


@pytest.mark.parametrize("content", ["[1", "[]", '{"tensorboard": 3}'])
def test_a_damaged_file_of_records_is_a_sentence(content: str, flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "trackers.json").write_text(content)
    done = train(*flags, "--report_to=tensorboard", f"--checkpoint_path={tmp_path}", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert f"error: {tmp_path}/baseline/trackers.json" in done.stderr
    assert "Traceback" not in done.stderr


def scalars(folder: Path, tag: str) -> dict[int, float]:
    accumulator = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def hyper_parameters(folder: Path) -> list[dict]:
    """Of each start that recorded them."""
    found = []
    for file in sorted(folder.glob("*/events.out.tfevents.*")):
        accumulator = EventAccumulator(str(file)).Reload()
        content = accumulator.PluginTagToContent("hparams")["_hparams_/session_start_info"]
        values = HParamsPluginData.FromString(content).session_start_info.hparams
        found.append({name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()})
    return found


@pytest.mark.slow
def test_a_run_of_two_processes_is_recorded_once_and_goes_on(flags: list[str], tmp_path: Path) -> None:
    own = [*flags, "--report_to=tensorboard", "--train_micro_batch_size_per_gpu=2", f"--checkpoint_path={tmp_path}"]
    torchrun("-m", "train", *own, "--max_steps=8", "--save_interval=4", cwd=tmp_path)
    run = tmp_path / "baseline"
    folder = run / "tensorboard" / "gpt2flash"
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    (given,) = hyper_parameters(folder)
    assert (given["learning_rate"], given["max_steps"], given["run_type"]) == (0.01, 8, "baseline")
    first = scalars(folder, "loss")
    assert first == pytest.approx({record["step"]: record["loss"] for record in records(run)})

    again = [f"--resume_from_checkpoint={run}/step-4", "--delete_newer_checkpoints", "--allow_changes"]
    again += ["--train_micro_batch_size_per_gpu=4"]
    train(*own, *again, "--max_steps=6", cwd=tmp_path)
    assert scalars(folder, "loss") == pytest.approx({record["step"]: record["loss"] for record in records(run)})
    assert sorted(scalars(folder, "loss")) == [1, 2, 3, 4, 5, 6], "what came after the checkpoint is gone"
    assert len(hyper_parameters(folder)) == 1
    assert json.loads((run / "trackers.json").read_text()) == {"tensorboard": None}
