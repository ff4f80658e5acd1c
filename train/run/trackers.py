"""Experiment trackers: where each keeps what it is told, and how a run that goes on finds its own record again.

Accelerate starts them, on the main process alone. Left to themselves they would write into the working directory or
the home folder; here it is the run's folder, unless their own environment variables say where. What a later attempt
needs to go on in the same record is in RUN/trackers.json.
"""

import json
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from train.utils.errors import UserError, first_line
from train.utils.files import write_json

PROJECT = "gpt2flash"
RECORDS = "trackers.json"


def check(report_to: str) -> None:
    """Refuse a tracker whose package is not installed (Accelerate would only warn)."""
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in map(str.strip, report_to.split(",")):
        if name != "none" and name not in available:
            raise UserError(f"--report_to {name}: its package is not installed; pip install {name}, or drop it")


def start(accelerator: Accelerator, run_folder: Path, config: dict[str, Any], step: int) -> None:
    """Start the trackers of a run at `step`, with its hyper-parameters where they are not recorded yet.

    Raises:
        UserError: when one cannot be started, as without a login or a server.
    """
    folder, file = run_folder.resolve(), run_folder / RECORDS
    places = {
        "WANDB_DIR": f"{folder}",
        "TRACKIO_DIR": f"{folder / 'trackio'}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }
    for variable, place in places.items():
        os.environ.setdefault(variable, place)
    records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    how = {name: _again(name, record, step) for name, record in records.items()}
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=how)
        for tracker in accelerator.trackers:
            if tracker.name not in records or tracker.name == "trackio":  # which forgets those it had
                tracker.store_init_configuration(config)
            records[tracker.name] = _record(tracker)
    except Exception as error:  # each has its own
        names = ", ".join(str(name) for name in accelerator.log_with)
        raise UserError(f"--report_to {names}: cannot be started: {first_line(error)}") from error
    if records:
        write_json(file, records)


def _again(name: str, record: str | None, step: int) -> dict[str, Any]:
    """What a tracker is told for it to go on in a record after `step`."""
    again: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": record, "resume": "allow"},
        "trackio": {"name": record, "resume": "allow"},
        "mlflow": {"run_id": record},
    }
    return again[name]


def _record(tracker: GeneralTracker) -> str | None:
    """What a tracker calls the run."""
    return {
        "tensorboard": lambda: None,
        "wandb": lambda: tracker.tracker.id,
        "trackio": lambda: tracker.tracker.name,
        "mlflow": lambda: tracker.tracker.info.run_id,
    }[tracker.name]()
