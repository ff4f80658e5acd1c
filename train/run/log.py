"""The log of a run: a line for each step in metrics.jsonl, the trackers, and the progress bar."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from train.checkpoints.run_folder import read_steps
from train.metrics.table import STEP_METRICS
from train.run import trackers
from train.utils.files import write_text
from train.utils.json_files import json_safe


class RunLog:
    """The records of one run, kept by the main process; on the other processes every method does nothing."""

    def __init__(self, accelerator: Accelerator, run_folder: Path, config: dict[str, Any], total_steps: int) -> None:
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.file = run_folder / "metrics.jsonl"
        self.total_steps = total_steps
        self.records: list[dict[str, Any]] = []
        known = (bool, int, float, str)
        self.config = {k: v if isinstance(v, known) else str(v) for k, v in config.items()}

    def start(self, step: int, earlier: Path) -> None:
        """Open the log at `step`, with the records up to it of the file `earlier`, a resumed run's."""
        if not self.main:
            return
        trackers.start(self.accelerator, self.file.parent, self.config, step)
        records = read_steps(earlier, until_broken=True) if earlier.exists() else []
        self.records = [record for record in records if record["step"] <= step]
        write_text(self.file, "".join(json.dumps(record) + "\n" for record in self.records))
        self.stream = self.file.open("a", encoding="utf-8")
        self.bar = tqdm(total=self.total_steps, initial=step, desc="training", unit="step", mininterval=0.5)

    def write(self, record: dict[str, Any]) -> None:
        if not self.main:
            return
        self.records.append(record)
        self.stream.write(json.dumps(json_safe(record)) + "\n")
        self.stream.flush()
        self.accelerator.log({k: v for k, v in record.items() if v is not None and k != "step"}, step=record["step"])
        shown = [metric for metric in STEP_METRICS if metric.log and record.get(metric.key) is not None]
        self.bar.set_postfix({metric.title: f"{record[metric.key]:{metric.log}}" for metric in shown}, refresh=False)
        self.bar.update()

    def message(self, sentence: str) -> None:
        """Print a sentence above the progress bar."""
        if self.main:
            tqdm.write(sentence)

    def close(self) -> None:
        if self.main:
            self.bar.close()
            self.stream.close()
