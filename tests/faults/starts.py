"""A run that the soak starts and ends: `python -m train` in a fork, or the processes of a launcher."""

import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

import psutil

from tests.conftest import ROOT
from tests.forks import SERVER
from tests.jobs import Job, launcher

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TRACEBACK = "Traceback (most recent call last)"
LAUNCHERS_CODE = re.compile(r"torch/distributed/(run|launcher|elastic)|bin/torchrun\"")
OURS = re.compile(re.escape(str(ROOT)) + r"/(train|modeling_gpt2flash)/")
MARK = "GPT2FLASH_SOAK"


class Fork:
    """One process: a fork of a server that has imported the trainer, which runs its real main."""

    def __init__(self, flags: list[str], folder: Path) -> None:
        self.log = folder / f"start-{uuid4().hex}.log"
        self.process = SERVER.Process(target=_train, args=(flags, folder, self.log))
        self.process.start()
        while not self.log.exists() and self.process.exitcode is None:
            time.sleep(0.001)  # until it has blocked the signals, because what comes before is not the trainer

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def targets(self) -> dict[str, int]:
        """Whom a signal may be sent to."""
        return {"the process": self.process.pid or 0}

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def left(self) -> list[psutil.Process]:
        """The processes of this start that are still there."""
        group = self.process.pid
        return [each for each in psutil.process_iter() if _group(each.pid) == group and _is_alive(each)]


class Launched:
    """Two processes and their launcher."""

    def __init__(self, flags: list[str], folder: Path) -> None:
        self.mark = uuid4().hex
        words = [*launcher("torchrun"), "-m", "train", *flags]
        self.job = Job(words, folder, {MARK: self.mark})

    def said(self) -> str:
        return self.job.said()

    def targets(self) -> dict[str, int]:
        ranks = {f"rank {rank}": self._rank(rank) for rank in (0, 1)}
        return {"the launcher": self.job.process.pid} | {name: pid for name, pid in ranks.items() if pid}

    def _rank(self, rank: int) -> int | None:
        try:
            return self.job.worker(rank).pid
        except (KeyError, psutil.Error):
            return None  # not started yet

    def poll(self) -> int | None:
        return self.job.process.poll()

    def wait(self, timeout: float) -> int | None:
        try:
            return self.job.process.wait(timeout)
        except psutil.TimeoutExpired:
            return None

    def left(self) -> list[psutil.Process]:
        return [
            each for each in psutil.process_iter() if _environment(each).get(MARK) == self.mark and _is_alive(each)
        ]


def tracebacks(said: str) -> list[str]:
    """Those in the output of a start that are not a launcher's report of how its processes ended."""
    parts = said.split(TRACEBACK)[1:]
    return [part for part in parts if OURS.search(part) or not LAUNCHERS_CODE.search(part)]


def _train(flags: list[str], folder: Path, log: Path) -> NoReturn:
    """The target of the fork. Until the main function begins, signals wait: what comes before it is ours."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    os.setpgid(0, 0)
    os.chdir(folder)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv[1:] = flags
    code = 1
    try:
        from train import __main__ as command
        from train.utils.command import run_command

        def main() -> None:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            command.main()

        run_command(main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
