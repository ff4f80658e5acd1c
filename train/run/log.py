"""What a run says while it runs: a line a step in metrics.jsonl, the trackers, and the progress bar."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from train.metrics.summary import json_safe
from train.run import trackers
from train.utils.files import write_text


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a crash is left out."""
    if not file.exists():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


class RunLog:
    """Records of one run, kept by the main process; on the others every method does nothing."""

    def __init__(self, accelerator: Accelerator, run_folder: Path, config: dict[str, Any], total_steps: int) -> None:
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.file = run_folder / "metrics.jsonl"
        self.total_steps = total_steps
        self.records: list[dict[str, Any]] = []
        known = (bool, int, float, str)
        self.config = {k: v if isinstance(v, known) else str(v) for k, v in config.items()}

    def start(self, step: int, earlier: Path) -> None:
        """Open the log at `step`, after the records up to it that the file `earlier` holds (a resumed run's)."""
        if not self.main:
            return
        trackers.start(self.accelerator, self.file.parent, self.config, step)
        self.records = [record for record in read_records(earlier) if record["step"] <= step]
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
        shown = {"loss": f"{record['loss']:.3f}", "tokens/s": f"{record['tokens_per_second']:,.0f}"}
        if "val_loss" in record:
            shown["val_loss"] = f"{record['val_loss']:.3f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def say(self, sentence: str) -> None:
        if self.main:
            tqdm.write(sentence)

    def close(self) -> None:
        if self.main:
            self.bar.close()
            self.stream.close()
