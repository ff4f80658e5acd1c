"""Experiment trackers: where each stores its records, and how a resumed run continues its own record.

Accelerate starts them, on the main process only. By default they write into the working directory or the home folder;
here they write into the run folder, unless their own environment variables are set. RUN/trackers.json has what a later
attempt needs to continue the same record.
"""

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from train.config.run_config import RunConfig
from train.utils.errors import UserError, first_line
from train.utils.files import from_json, read_json, write_json

PROJECT = "gpt2flash"
RECORDS = "trackers.json"
RECORD_IDS: dict[str, Callable[[Any], str | None]] = {  # the name or id that a tracker gave its record
    "tensorboard": lambda record: None,
    "wandb": attrgetter("id"),
    "trackio": attrgetter("name"),
    "mlflow": attrgetter("info.run_id"),
}


def check(names: Iterable[str]) -> None:
    """Refuse a tracker whose package is not installed (Accelerate would only warn)."""
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise UserError(f"--report_to {name}: its package is not installed; pip install {name}, or drop it")


class Trackers:
    """The trackers of a run. One that fails is reported and is not called again: the run continues without it."""

    def __init__(self, accelerator: Accelerator, config: RunConfig, step: int) -> None:
        start(accelerator, config, step)
        # Accelerate would finish them in `end_training`, after a failure as well, and end the run by what they raise.
        self.working, accelerator.trackers = accelerator.trackers, []

    def log(self, values: Mapping[str, Any], step: int, report: Callable[[str], None]) -> None:
        self._call(lambda tracker: tracker.log(values, step=step), report)

    def finish(self, report: Callable[[str], None]) -> None:
        self._call(lambda tracker: tracker.finish(), report)

    def _call(self, action: Callable[[Any], None], report: Callable[[str], None]) -> None:
        for tracker in list(self.working):
            try:
                action(tracker)
            except Exception as error:  # each has its own: a full disk, a server that is gone
                self.working.remove(tracker)
                report(
                    f"--report_to {tracker.name}: failed and is not called again: {first_line(error)}; training "
                    "continues, and metrics.jsonl has its records"
                )


def start(accelerator: Accelerator, config: RunConfig, step: int) -> None:
    """Start the trackers of a run at `step`; hyper-parameters are recorded at the first start.

    A `UserError` if one cannot be started, for example without a login or a server.
    """
    folder, file = config.run_folder.resolve(), config.run_folder / RECORDS
    folders = {
        "WANDB_DIR": f"{folder}",
        "TRACKIO_DIR": f"{folder / 'trackio'}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }
    for variable, value in folders.items():
        os.environ.setdefault(variable, value)
    records: dict[str, str | None] = {}
    if file.exists():
        records = from_json(dict[str, str | None], read_json(file), file, "training")
        records = {name: record for name, record in records.items() if name in RECORD_IDS}
    arguments = {name: _resume_arguments(record, step)[name] for name, record in records.items()}
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=arguments)
        for tracker in accelerator.trackers:
            if tracker.name not in records or tracker.name == "trackio":  # trackio drops the ones it had
                flags = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in vars(config).items()}
                tracker.store_init_configuration(flags)
            records[tracker.name] = RECORD_IDS[tracker.name](tracker.tracker)
    except Exception as error:  # each has its own
        names = ", ".join(str(name) for name in accelerator.log_with)
        raise UserError(f"--report_to {names}: cannot be started: {first_line(error)}") from error
    if records:
        write_json(file, records)
    _silence_writer_threads()


def _silence_writer_threads() -> None:
    """Print no traceback of TensorBoard's writer thread: its next call raises the same error again."""
    default = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard."):
            default(failed)

    threading.excepthook = hook


def _resume_arguments(record: str | None, step: int) -> dict[str, dict[str, Any]]:
    """The init arguments with which each tracker continues a record after `step`."""
    return {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {"id": record, "resume": "allow"},
        "trackio": {"name": record, "resume": "allow"},
        "mlflow": {"run_id": record},
    }
