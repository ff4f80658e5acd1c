"""The log of a run: a line for each step in metrics.jsonl, the trackers, and the progress bar."""

import json
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from train.checkpoints.run_folder import read_steps
from train.metrics.table import STEP_METRICS
from train.run import trackers
from train.run.setup import ResolvedRun
from train.utils.files import json_safe, write_text


class RunLog:
    """The records of one run, kept by the main process; on the other processes every method does nothing."""

    def __init__(self, accelerator: Accelerator, run: ResolvedRun) -> None:
        """Opens the log, with the records of the run whose checkpoint is resumed."""
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.records: list[dict[str, Any]] = []
        if not self.main:
            return
        trackers.start(accelerator, run.config, run.first_step)
        file = earlier = run.config.run_folder / "metrics.jsonl"
        if run.checkpoint is not None:
            earlier = run.checkpoint.folder.parent / "metrics.jsonl"
        records = read_steps(earlier, until_broken=True) if earlier.exists() else []
        self.records = [record for record in records if record["step"] <= run.first_step]
        write_text(file, "".join(json.dumps(record) + "\n" for record in self.records))
        self.stream = file.open("a", encoding="utf-8")
        self.bar = tqdm(total=run.total_steps, initial=run.first_step, desc="training", unit="step", mininterval=0.5)

    def write(self, record: dict[str, Any]) -> None:
        if not self.main:
            return
        self.records.append(record)
        self.stream.write(json.dumps(json_safe(record)) + "\n")
        self.stream.flush()
        self.accelerator.log({k: v for k, v in record.items() if v is not None and k != "step"}, step=record["step"])
        shown = [metric for metric in STEP_METRICS if metric.label and record.get(metric.key) is not None]
        self.bar.set_postfix({metric.label: f"{record[metric.key]:{metric.log}}" for metric in shown}, refresh=False)
        self.bar.update()

    def message(self, sentence: str) -> None:
        """Print a sentence above the progress bar."""
        if self.main:
            tqdm.write(sentence)

    def close(self) -> None:
        if self.main:
            self.bar.close()
            self.stream.close()
