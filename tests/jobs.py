"""Jobs for tests to interrupt: a launcher in the background and its workers, found by their rank."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.conftest import ROOT, free_port

END_SECONDS = 60  # a job with a dead process is over by then


def launcher(name: str, *options: str) -> list[str]:
    """How `name` starts two processes; what they run follows."""
    if name == "torchrun":
        return ["torchrun", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *options]
    if name == "accelerate":
        config = f"--config_file={ROOT}/accelerate_configs/deepspeed.yaml"
        return ["accelerate", "launch", config, "--num_processes=2", "--main_process_port=0", *options]
    return ["deepspeed", "--num_gpus=2", f"--master_port={free_port()}", *options]


def layout(name: str) -> list[str]:
    """Flags of two processes: data parallel, ZeRO-1 or a pipeline; the step is the 4 sequences of `flags`."""
    shared = ["--train_micro_batch_size_per_gpu=2", "--mixed_precision=no"]
    if name == "baseline":
        return shared
    shared += ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/{name}.json"]
    return [*shared, "--pipeline_stages=2", "--gradient_accumulation_steps=2"] if name == "pipeline" else shared


class Job:
    def __init__(self, words: list[str], cwd: Path, env: dict[str, str]) -> None:
        self.log = cwd / f"job-{free_port()}.log"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        with self.log.open("w") as stream:
            self.process = psutil.Popen(
                words, cwd=cwd, env={**os.environ, "PATH": path, **env}, stdout=stream, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def until(self, condition: Callable[[], bool], timeout: float = 400) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def until_step(self, step: int, run_folder: Path) -> None:
        file = run_folder / "metrics.jsonl"
        self.until(lambda: file.exists() and f'"step": {step},' in file.read_text())

    def until_saved(self, run_folder: Path) -> None:
        """Until the first checkpoint is complete, which is written in the background."""
        self.until((run_folder / "latest").exists)

    def processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def worker(self, rank: int) -> psutil.Process:
        found = {}
        for process in self.processes():
            try:
                found[process.environ().get("RANK")] = process  # a worker comes after the launcher that began it
            except psutil.Error:
                continue
        return found[str(rank)]

    def end(self, timeout: float = 400) -> int:
        """The launcher's exit code."""
        try:
            return self.process.wait(timeout)
        except psutil.TimeoutExpired:
            raise AssertionError(f"still there after {timeout} s\n{self.said()}") from None


@contextmanager
def job(*words: object, cwd: Path, **env: str) -> Iterator[Job]:
    """A command in the background; whatever is left of it at the end is killed."""
    started = Job([str(word) for word in words], cwd, env)
    try:
        yield started
    finally:
        left = started.processes() if started.process.poll() is None else []
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        started.process.wait()
