"""What a run tells wandb, trackio and MLflow, read back by their own readers. Nothing is sent anywhere."""

import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import python, records, torchrun

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def network() -> Iterator[socket.socket]:
    """Where whatever asks for an address by http would have to come."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.fixture(scope="module")
def places(network: socket.socket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder and a working directory of their own, and no way out."""
    folder = tmp_path_factory.mktemp("trackers")
    (folder / "home").mkdir()
    (folder / "work").mkdir()
    proxy = f"http://127.0.0.1:{network.getsockname()[1]}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "TRACKIO_DIR", "MLFLOW_TRACKING_URI", "NO_PROXY", "no_proxy"):
            patch.delenv(name, raising=False)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, proxy)
            patch.setenv(name.lower(), proxy)
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.setenv("DO_NOT_TRACK", "true")  # MLflow's
        yield folder


@pytest.fixture(scope="module")
def run(places: Path, flags: list[str]) -> Path:
    """Four steps on two processes, and four more by the same run resumed on one; all trackers at once."""
    own = [*flags, "--report_to=tensorboard,wandb,trackio,mlflow", f"--checkpoint_path={places}/runs"]
    torchrun("-m", "train", *own, "--train_micro_batch_size_per_gpu=2", "--max_steps=4", cwd=places / "work")
    python("-m", "train", *own, "--resume_from_checkpoint", "--max_steps=8", "--allow_changes", cwd=places / "work")
    return places / "runs" / "baseline"


def losses_of(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run)}


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log as LevelDB's, in blocks of 32 KiB, of wandb's own protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)  # behind a checksum
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def test_wandb(run: Path) -> None:
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2, "two starts, and of each one process"
    config, losses, names = {}, {}, set()
    for file in files:
        for record in wandb_records(file):
            if record.HasField("run"):
                names.add((record.run.project, record.run.run_id))
            for item in record.config.update:
                config[item.key] = json.loads(item.value_json)
            values = {
                item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item
            }
            if "loss" in values:
                losses[int(values["_step"])] = float(values["loss"])
    assert [project for project, _ in names] == ["gpt2flash"], "one run that goes on"
    assert losses == pytest.approx(losses_of(run))
    assert (config["learning_rate"], config["max_steps"]) == (0.01, 4)


READ_TRACKIO = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = list(trackio.Api().runs("gpt2flash"))
logs = SQLiteStorage.get_logs("gpt2flash", runs[0].name, run_id=runs[0].id)
losses = {log["step"]: log["loss"] for log in logs if "loss" in log}  # a validation follows in a log of its own
print(json.dumps({"runs": len(runs), "config": runs[0].config, "losses": losses}))
"""


def test_trackio(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(run / "trackio"))
    said = json.loads(python("-c", READ_TRACKIO, cwd=run).stdout.splitlines()[-1])
    assert said["runs"] == 1
    assert {int(step): loss for step, loss in said["losses"].items()} == pytest.approx(losses_of(run))
    assert (said["config"]["learning_rate"], said["config"]["max_steps"]) == (0.01, 8)


def test_mlflow(run: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run}/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "gpt2flash"]
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {entry.step: entry.value for entry in history} == pytest.approx(losses_of(run))
    assert (found.data.params["learning_rate"], found.data.params["max_steps"]) == ("0.01", "4")
    assert found.info.status == "FINISHED"


def test_everything_stays_in_the_runs_folder(run: Path, places: Path, network: socket.socket) -> None:
    assert sorted(path.name for path in (places / "work").iterdir()) == []
    left = {path.parent.relative_to(places / "home") for path in (places / "home").rglob("*") if path.is_file()}
    assert left == {Path(".cache/wandb/logs")}, "of wandb's own service"
    with pytest.raises(BlockingIOError):
        network.accept()


def test_ones_own_places_are_kept(places: Path, run: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(places / name))
    (places / "WANDB_DIR").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{places}/own.db")
    own = [*flags, "--report_to=wandb,trackio,mlflow", "--max_steps=1", f"--checkpoint_path={places}/own"]
    python("-m", "train", *own, cwd=places / "work")
    assert list((places / "WANDB_DIR" / "wandb").glob("offline-run-*"))
    assert (places / "TRACKIO_DIR").is_dir()
    assert (places / "own.db").exists()
    assert not {"wandb", "trackio", "mlflow.db"} & {path.name for path in (places / "own" / "baseline").iterdir()}


def test_a_tracker_that_cannot_start_is_a_sentence(
    places: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://mlflow")
    own = [*flags, "--report_to=mlflow", "--max_steps=1", f"--checkpoint_path={places}/failing"]
    done = python("-m", "train", *own, cwd=places / "work", check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "error: --report_to mlflow: cannot be started" in done.stderr
