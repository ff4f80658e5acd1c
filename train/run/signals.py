"""How a run ends before its last step without losing work: signals, a time limit, and a launcher that is gone.

A signal to any process asks all of them to finish the step, save and exit; the request travels with the loss of the
step (`engines.base.Review`), so that all stop after the same one. A second Ctrl-C ends the process at once. The main
process alone keeps the time; within a validation all of them look about every second (`validate`).
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

from train.config.run_config import RunConfig
from train.job import rendezvous
from train.utils import processes
from train.utils.errors import INTERRUPTED, RUN_AGAIN, EarlyEnd

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Ignored at the start of a process, as by nohup and a shell's `&`, they stay so. The other two are for schedulers: a
# launcher ignores them (`trap '' USR1`), and its processes, which inherit that, do not.
LEFT_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DUPLICATE_SECONDS = 1.0  # within which a terminal and a launcher both send the same Ctrl-C to a process
MARGIN = 15.0  # seconds before a deadline that remain for everything that was not estimated
SLOW_DISK = 100e6  # bytes/s: how long the first save is expected to take


@dataclass
class TimeNeeded:
    """How long a run may need until one more step is computed and saved, from what it has measured."""

    save_seconds: float
    first_step: float | None = None  # the one that also compiles: only the step after it is expected to be so slow
    slowest_step: float = 0.0  # of those after it
    began: float | None = None  # the step that is under way

    def step_begins(self, now: float) -> None:
        self.began = now

    def step_done(self, now: float, *, is_typical: bool) -> None:
        """The weights are updated; `is_typical` unless it was slower than others are, as under the profiler."""
        assert self.began is not None
        seconds, self.began = now - self.began, None
        if self.first_step is None:
            self.first_step = seconds
        elif is_typical:
            self.slowest_step = max(self.slowest_step, seconds)

    def seconds(self, now: float) -> float:
        under_way = 0.0 if self.began is None else now - self.began
        return MARGIN + max(2 * self.slowest_step or self.first_step or 0.0, under_way) + 2 * self.save_seconds


class Interruptions(AbstractContextManager):
    """Collects what asks this process to end early, while it is entered.

    Args:
        checkpoint_bytes: size of a checkpoint, from which the time of the first save is estimated.
        keeps_time: whether this process watches the time limit and the time between checkpoints.
    """

    def __init__(self, config: RunConfig, checkpoint_bytes: int, keeps_time: bool) -> None:
        self.reason = ""  # why this process asks to stop; empty while it does not
        self.needed = TimeNeeded(checkpoint_bytes / SLOW_DISK)
        self.save_every = config.save_minutes * 60
        self.keeps_time = keeps_time
        # A launcher that restarts the run does not give it more time.
        start = rendezvous.job_start(process_start())
        self.deadline, self.limit = find_deadline(config.max_time, dict(os.environ), start)
        self.last_save = time.monotonic()
        self.at_once = False
        self.received: dict[int, list[float]] = {}  # when each signal came
        self.launched = "LOCAL_RANK" in os.environ

    def __enter__(self) -> "Interruptions":
        self.previous: dict[int, Any] = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if number not in LEFT_IGNORED or signal.getsignal(number) is not signal.SIG_IGN
        }
        # Python runs a handler when its main thread is back from C++, which may wait for another process: what is to
        # happen at once is done by a thread.
        self.wakeup, receiver = socket.socketpair()
        self.wakeup.setblocking(False)
        self.previous_wakeup = signal.set_wakeup_fd(self.wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(receiver,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.at_once = False
        signal.set_wakeup_fd(self.previous_wakeup)
        self.wakeup.close()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if (
            signal.SIGTERM in self.received
            and isinstance(error, RuntimeError)
            and processes.LOST_PEER.search(str(error))
        ):
            # The launcher ends this process because another has failed, and that one has printed its error.
            signal.raise_signal(signal.SIGTERM)

    def is_asked(self) -> bool:
        """Whether this process asks to stop."""
        return bool(self.reason)

    def request(self, reason: str) -> None:
        """Ask all processes to stop after this step."""
        self.reason = self.reason or reason

    def requests(self) -> tuple[bool, bool]:
        """(stop, save): what this process asks of all, before the update of a step and within a validation."""
        if not self.keeps_time:
            return bool(self.reason), False
        now = time.monotonic()
        if self.deadline is not None and time.time() + self.needed.seconds(now) > self.deadline:
            self.request(self.limit)
        return bool(self.reason), self.save_every > 0 and now - self.last_save >= self.save_every

    def saved(self, seconds: float | None) -> None:
        """A checkpoint was saved, which takes so many `seconds` to be complete; None if that is not known yet."""
        self.last_save = time.monotonic()
        if seconds is not None:
            self.needed.save_seconds = seconds

    def end_at_once(self) -> None:
        """From now on a signal raises `EarlyEnd` in the main thread: no other process waits for this one any more."""
        self.at_once = True
        self._raise_if_asked()

    def _raise_if_asked(self) -> None:
        if self.reason:
            raise EarlyEnd(
                f"{self.reason}: all steps are done and saved; --resume_from_checkpoint writes metrics.json", RUN_AGAIN
            )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
        if self.at_once:
            self._raise_if_asked()

    def _watch(self, receiver: socket.socket) -> None:
        """Report the first signal, and end the process at the second Ctrl-C."""
        while numbers := receiver.recv(16):
            for number in numbers:
                is_first = not self.received
                times = self.received.setdefault(number, [])
                times.append(time.monotonic())
                if number == signal.SIGINT and is_pressed_again(times, self.launched):
                    sys.stderr.write("\nended by the second Ctrl-C, without a checkpoint of this step\n")
                    sys.stderr.flush()
                    os._exit(INTERRUPTED)
                if not self.keeps_time or len(times) > 1:
                    continue
                parts = []
                if is_first:
                    parts = [
                        f"{signal.Signals(number).name}: the run finishes this step, saves a checkpoint and stops"
                    ]
                if number == signal.SIGINT:
                    parts.append(f"Ctrl-C again{', after a second,' * self.launched} ends at once")
                if parts:
                    sys.stderr.write(f"\n{'; '.join(parts)}\n")
                    sys.stderr.flush()
        receiver.close()


def is_pressed_again(times: list[float], launched: bool) -> bool:
    """Whether a Ctrl-C that came at the last of these times is a further press, and not the first one once more.

    A terminal sends it to all processes, and a launcher may then pass it on, once.
    """
    duplicates = 1 if launched and len(times) > 1 and times[1] - times[0] < DUPLICATE_SECONDS else 0
    return len(times) > 1 + duplicates


def find_deadline(max_time: float | None, environ: dict[str, str], start: float) -> tuple[float | None, str]:
    """(Unix time by which the run must have ended, what sets it): --max_time or the end of Slurm's job.

    `start` is when the job began, from which --max_time counts.
    """
    limits: list[tuple[float | None, str]] = []
    if max_time is not None:
        limits.append((start + max_time, f"--max_time {timedelta(seconds=max_time)}"))
    if environ.get("SLURM_JOB_END_TIME", "").isdigit():
        limits.append((float(environ["SLURM_JOB_END_TIME"]), "the end of the Slurm job"))
    return min(limits, default=(None, ""), key=lambda limit: limit[0] or 0)


def process_start() -> float:
    import psutil

    return psutil.Process().create_time()
