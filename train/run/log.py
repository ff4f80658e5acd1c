"""The log of a run: a line for each step in metrics.jsonl, the trackers, and the progress bar.

A run outlives its log. What cannot be written is reported once for each cause, and training continues: records are
kept in memory and written to `metrics.jsonl` as soon as that is possible again, a tracker that failed is not called
again, and `train.utils.command` drops what a closed stdout or stderr cannot take.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from train.checkpoints.run_folder import STEPS_FILE, missing_steps, read_steps
from train.job.watchdog import working
from train.metrics.table import STEP_METRICS
from train.run.setup import ResolvedRun
from train.trackers import Trackers
from train.utils.files import json_safe, write_text


class RunLog:
    """The records of one run, kept by the main process; on the other processes every method does nothing."""

    def __init__(self, accelerator: Accelerator, run: ResolvedRun) -> None:
        """Opens the log, with the records of the run whose checkpoint is resumed."""
        self.main = accelerator.is_main_process
        self.records: list[dict[str, Any]] = []
        if not self.main:
            return
        self.reported: set[tuple[str, int | None]] = set()  # the failures of the file that were reported
        self.trackers = Trackers(accelerator, run.config, run.first_step)
        if run.checkpoint is not None:
            earlier = run.checkpoint.folder.parent / STEPS_FILE
            found, fault = read_steps(earlier)
            self.records = [record for record in found if record["step"] <= run.first_step]
            if missing := missing_steps(self.records, run.first_step):
                self.message(
                    f"{earlier}: {missing} cannot be read ({fault or 'no line'}); the run resumes without them"
                )
        self.file = StepsFile(run.config.run_folder / STEPS_FILE, self.records)
        self.bar = tqdm(total=run.total_steps, initial=run.first_step, desc="training", unit="step", mininterval=0.5)

    def write(self, record: dict[str, Any]) -> None:
        """Log the record of a step, as soon as it is done."""
        if not self.main:
            return
        self.records.append(record)
        self._log(record)
        self.bar.update()

    def amend(self, more: Mapping[str, Any]) -> None:
        """Add values that were measured after the last step's record was written.

        The file gets a second, complete line for the step; of two lines the later counts.
        """
        if not self.main or not more:
            return
        self.records[-1] |= more
        self._log(more)

    def flush(self) -> None:
        """Have every record on the disk before a checkpoint becomes visible, after which the run may resume."""
        if self.main:
            with working("flushing the log"):
                self._attempt(lambda: self.file.sync(self.records))

    def lacks_validation(self, step: int) -> bool:
        """Whether the last record is that of `step` and has no validation."""
        last = self.records[-1] if self.records else {}
        return last.get("step") == step and "val_loss" not in last

    def message(self, sentence: str) -> None:
        """Print a sentence above the progress bar."""
        if self.main:
            tqdm.write(sentence)
            sys.stdout.flush()  # a log file shows at once what the run says

    def close(self) -> None:
        """Complete the file, finish the trackers and end the progress bar."""
        if not self.main:
            return
        self.flush()
        with working("closing the trackers"):  # one may upload what it has
            self.trackers.finish(self.message)
        self.bar.close()
        if self.file.pending:
            tqdm.write(
                f"{self.file.path}: its last {len(self.file.pending):,} bytes could not be written and are lost"
            )
        self.file.close()

    def _log(self, values: Mapping[str, Any]) -> None:
        """Log the last record; the trackers get `values` only."""
        record = self.records[-1]
        self._attempt(lambda: self.file.append(record))
        numbers = {key: value for key, value in values.items() if value is not None and key != "step"}
        self.trackers.log(numbers, record["step"], self.message)
        shown = [metric for metric in STEP_METRICS if metric.label and record.get(metric.key) is not None]
        self.bar.set_postfix({metric.label: f"{record[metric.key]:{metric.log}}" for metric in shown}, refresh=False)

    def _attempt(self, write: Callable[[], str]) -> None:
        """Write to the file; what it reports and how it fails is a message, the latter once for each cause."""
        try:
            report = write()
        except OSError as error:
            if ("failed", error.errno) not in self.reported:
                self.reported.add(("failed", error.errno))
                self.message(
                    f"{self.file.path} cannot be written: {error.strerror}; training continues, and its records are "
                    "written as soon as that is possible"
                )
            return
        if report:
            self.message(report)


class StepsFile:
    """`metrics.jsonl` of a run: lines are appended; those that could not be written are tried again with the next."""

    def __init__(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        self.path = path
        self.size = 0
        self._write(records)

    def append(self, record: Mapping[str, Any]) -> str:
        self.pending += _line(record)
        return self._write_pending()

    def sync(self, records: Sequence[Mapping[str, Any]]) -> str:
        """Flush the file to disk; if it was removed or changed, write it again with all `records`."""
        report = self._write_pending()
        try:
            found = self.path.stat()
            there = (found.st_dev, found.st_ino, found.st_size) == (*self.identity, self.size)
        except FileNotFoundError:
            there = False
        if not there:
            outdated = self.file
            self._write(records)
            outdated.close()
            return f"{self.path} was removed or changed by something else: written again, {len(records)} records"
        try:
            os.fsync(self.file.fileno())
        except OSError:
            self.size = -1  # the system may have dropped what it failed to write, and says so once: write all again
            raise
        return report

    def close(self) -> None:
        self.file.close()

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        write_text(self.path, "".join(_line(record).decode() for record in records))
        self.file = self.path.open("ab", buffering=0)  # a buffer would keep a line that failed
        found = os.fstat(self.file.fileno())
        self.identity, self.size = (found.st_dev, found.st_ino), found.st_size
        self.pending = b""
        self.failed = False

    def _write_pending(self) -> str:
        failed_before, self.failed = self.failed, True
        while self.pending:  # a disk that gets full takes a part of a line
            written = self.file.write(self.pending)
            self.pending, self.size = self.pending[written:], self.size + written
        self.failed = False
        return f"{self.path} can be written again: no record is missing" if failed_before else ""


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(json_safe(record)).encode() + b"\n"
