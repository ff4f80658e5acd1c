"""The ranks of a job as forks of one process that has imported the trainer already, which takes some 5 CPU seconds.

For jobs that test what ranks compute, and not how they are started: no launcher, no new interpreter.
"""

import multiprocessing
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from tests.conftest import free_port

SERVER = multiprocessing.get_context("forkserver")


def run_ranks(module: str, arguments: list[str], folder: Path, processes: int, timeout: float = 300) -> None:
    """Call `module`'s `main` with these arguments in each rank; its output is in `folder`, and shown if one fails."""
    SERVER.set_forkserver_preload([module])
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if processes > 1:
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [folder / f"rank{rank}.log" for rank in range(processes)]
    ranks = [
        SERVER.Process(target=_run, args=(module, arguments, environment, rank if processes > 1 else None, log))
        for rank, log in enumerate(logs)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + timeout
    while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
        assert time.monotonic() < deadline, f"still running after {timeout} s\n{_read(logs)}"
        time.sleep(0.05)
    for rank in ranks:
        rank.join(1 if rank.exitcode is None else None)
        rank.kill()
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * processes, f"{module} {' '.join(arguments)}\n{_read(logs)}"


def _run(module: str, arguments: list[str], environment: dict[str, str], rank: int | None, log: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if rank is not None:
        os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.chdir(log.parent)
    with log.open("wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    import_module(module).main(*arguments)


def _read(logs: list[Path]) -> str:
    return "\n".join(f"{log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())
