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
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.conftest import ROOT, free_port

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


def run_ranks(
    module: str, arguments: list[str], cwd: Path, processes: int, check: bool, own: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The same in each rank of a job, as torchrun does, with `own` variables; the exit code is that of the first
    rank that fails, and the output that of one rank after the other.
    """
    cwd.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **(own or {})}
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        ranks, logs = [], [Path(folder, str(rank)) for rank in range(processes)]
        for rank, log in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            ranks.append(_start(module, arguments, environment | place, cwd, log, log))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
            assert time.monotonic() < deadline, "\n".join(["still running", *map(_read, logs)])
            time.sleep(0.05)
        first = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        for rank in ranks:
            rank.join(5)
            rank.kill()
            rank.join()
        said = "\n".join(map(_read, logs))
    code = first or next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    assert not check or code == 0, f"{module} {' '.join(arguments)}\n{said}"
    return subprocess.CompletedProcess(arguments, code, said, "")


@cache
def fsdp2_environment() -> dict[str, str]:
    """What `accelerate launch` with our fsdp2.yaml sets."""
    file = str(ROOT / "accelerate_configs" / "fsdp2.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", file, "--num_processes", "2", "train"])
    resolved, _, _ = _validate_launch_command(arguments)
    return {
        name: value
        for name, value in prepare_multi_gpu_env(resolved).items()
        if name.startswith(("ACCELERATE_", "FSDP_"))
    }


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
