"""Experiment trackers: where each stores its records, and how a resumed run continues its own record.

Accelerate starts them, on the main process only. By default they write into the working directory or the home folder;
here they write into the run folder, unless their own environment variables are set. RUN/trackers.json has what a later
attempt needs to continue the same record.
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
    """Start the trackers of a run at `step`; hyper-parameters are recorded at the first start.

    Raises:
        UserError: when one cannot be started, for example without a login or a server.
    """
    folder, file = run_folder.resolve(), run_folder / RECORDS
    folders = {
        "WANDB_DIR": f"{folder}",
        "TRACKIO_DIR": f"{folder / 'trackio'}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }
    for variable, value in folders.items():
        os.environ.setdefault(variable, value)
    records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    arguments = {name: _resume_arguments(name, record, step) for name, record in records.items()}
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=arguments)
        for tracker in accelerator.trackers:
            if tracker.name not in records or tracker.name == "trackio":  # trackio drops the ones it had
                tracker.store_init_configuration(config)
            records[tracker.name] = _record_id(tracker)
    except Exception as error:  # each has its own
        names = ", ".join(str(name) for name in accelerator.log_with)
        raise UserError(f"--report_to {names}: cannot be started: {first_line(error)}") from error
    if records:
        write_json(file, records)


def _resume_arguments(name: str, record: str | None, step: int) -> dict[str, Any]:
    """The init arguments with which a tracker continues a record after `step`."""
    arguments: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": record, "resume": "allow"},
        "trackio": {"name": record, "resume": "allow"},
        "mlflow": {"run_id": record},
    }
    return arguments[name]


def _record_id(tracker: GeneralTracker) -> str | None:
    """The name or id that a tracker gave the run."""
    return {
        "tensorboard": lambda: None,
        "wandb": lambda: tracker.tracker.id,
        "trackio": lambda: tracker.tracker.name,
        "mlflow": lambda: tracker.tracker.info.run_id,
    }[tracker.name]()
