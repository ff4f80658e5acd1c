"""Processes that are forked from one that has imported the trainer already, which takes some 5 CPU seconds.

For tests of what a run or its ranks compute, and not of how they are started: no launcher, no new interpreter.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.conftest import free_port

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.engine_steps", "train.__main__"]
SERVER.set_forkserver_preload(PRELOADED)
TIMEOUT_SECONDS = 300


def run_module(module: str, arguments: list[str], cwd: Path, check: bool) -> subprocess.CompletedProcess[str]:
    """What `python -m MODULE ARGUMENTS` does, in a fork."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        process = _start(module, arguments, dict(os.environ), cwd, out, err)
        process.join(TIMEOUT_SECONDS)
        process.kill()
        process.join()
        assert process.exitcode is not None
        done = subprocess.CompletedProcess(arguments, process.exitcode, _read(out), _read(err))
    if check:
        assert done.returncode == 0, f"{module} {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done


def run_ranks(module: str, arguments: list[str], folder: Path, processes: int) -> None:
    """The same in each rank of a job, as torchrun does; its output is in `folder`, and shown if one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks, logs = [], [folder / f"rank{rank}.log" for rank in range(processes)]
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        ranks.append(_start(module, arguments, environment | own, folder, log, log))
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        assert time.monotonic() < deadline, "\n".join(["still running", *map(_read, logs)])
        time.sleep(0.05)
    for rank in ranks:
        rank.join(5)
        rank.kill()
        rank.join()
    failed = "\n".join([f"{module} {' '.join(arguments)}", *map(_read, logs)])
    assert [rank.exitcode for rank in ranks] == [0] * processes, failed


def _start(
    module: str, arguments: list[str], environment: dict[str, str], cwd: Path, out: Path, err: Path
) -> BaseProcess:
    process = SERVER.Process(target=_run, args=(module, arguments, environment, cwd, out, err))
    process.start()
    return process


def _run(module: str, arguments: list[str], environment: dict[str, str], cwd: Path, out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv[1:] = arguments
    for name in PRELOADED:  # all that they import stays
        sys.modules.pop(name, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
