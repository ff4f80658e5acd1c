"""A job that stands still is ended: its ranks watch each other's progress and name those that hold it up.

A collective waits for all ranks, so one that is stopped or stuck stops all others, in C++, without an error. Each
process therefore runs two threads besides the main one. The reporter writes this rank's status to the job's store
every few seconds and reads those of all ranks; it may itself block, if rank 0, which hosts the store, is stopped. The
judge waits for nobody: once no rank has made progress for `--timeout` seconds, or one has given no sign of life for as
long, it prints which ranks hold the job up, and the Python stacks of this process, and exits.

Progress is what the main thread marks: steps, micro-batches, batches of a validation, tensors of a checkpoint. Work
that takes longer than the timeout in total is left alone as long as any rank makes progress. Work of one rank that
cannot be divided, as a download or a flush to the disk (`working`), is progress for up to `WORK_TIMEOUTS` timeouts.
Time counts only while this process runs: a job that is suspended as a whole and continued resumes. The watch of a rank
ends with its last collective (`stop`): the others expect no more signs of life from it.
"""

import atexit
import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from socket import gethostname
from typing import Any, TypeVar

import psutil
import torch
from torch.distributed import TCPStore

from train.utils import processes
from train.utils.errors import FAILED

Item = TypeVar("Item")

BEATS = 20  # signs of life within a timeout
LONGEST_BEAT_SECONDS = 5.0
PRINT_SECONDS = 30.0
WORK_TIMEOUTS = 6  # how many timeouts work may take that shows no progress
# Where the main thread is while it waits for other ranks, as far as Python sees it.
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/pipe/p2p.py")


@dataclass
class Progress:
    """What the main thread has marked."""

    marks: int = 0
    phase: str = "the start"
    work_began: float | None = None  # when it began what `working` surrounds


PROGRESS = Progress()


def mark(phase: str) -> None:
    """Record that the main thread makes progress, and in what: "step 7", "validation"."""
    PROGRESS.phase = phase
    PROGRESS.marks += 1


@contextlib.contextmanager
def working(phase: str) -> Iterator[None]:
    """Surrounds work of this rank alone that may take longer than the timeout and cannot be divided by marks."""
    mark(phase)
    before, PROGRESS.work_began = PROGRESS.work_began, time.monotonic()
    try:
        yield
    finally:
        PROGRESS.work_began = before
        mark(phase)


def marked(items: Iterable[Item], phase: str) -> Iterator[Item]:
    """The items, each of which is progress in `phase`; so is their end."""
    for item in items:
        mark(phase)
        yield item
    mark(phase)


@dataclass
class Status:
    """What a rank reports of itself."""

    rank: int
    host: str
    pid: int
    created: float  # when the process was, which tells it from a later one with its number
    beat: int  # number of this report
    marks: int
    phase: str
    place: str  # innermost function of the main thread
    waits: bool  # whether that is a collective
    collectives: int  # that it has started in the group of all ranks
    ended: bool = False  # whether its watch has ended: it is in no collective any more


def own_status(beat: int, *, ended: bool = False) -> Status:
    process = psutil.Process()
    place, waits = _place()
    return Status(
        rank=processes.rank(),
        host=gethostname(),
        pid=process.pid,
        created=process.create_time(),
        beat=beat,
        marks=PROGRESS.marks,
        phase=PROGRESS.phase,
        place=place,
        waits=waits,
        collectives=_collectives(),
        ended=ended,
    )


class Watchdog:
    """The threads that watch a job of several processes; see the module."""

    def __init__(self, store: TCPStore, timeout: float) -> None:
        self.hosted = store  # by rank 0, as long as it is held
        # A connection of its own: requests through one connection wait for each other.
        self.store = TCPStore(store.host, store.port, is_master=False)
        self.timeout = timeout
        self.interval = min(LONGEST_BEAT_SECONDS, timeout / BEATS)
        self.world_size = processes.world_size()
        self.statuses: dict[int, Status] = {}  # by rank, as read last
        self.stopped = threading.Event()
        self.threads = [
            threading.Thread(target=run, daemon=True, name=f"{processes.WATCH}{run.__name__}")
            for run in (self._report, self._judge)
        ]

    def start(self) -> None:
        """Call it on all ranks; the first report is written before it returns."""
        self.store.set(_key(processes.rank()), json.dumps(asdict(own_status(0))))
        # `kill -QUIT` prints the stacks of a rank at any time, also where the GIL is held.
        faulthandler.register(signal.SIGQUIT)
        atexit.register(self.stop)  # no thread may be in C++ code when the interpreter is finalized
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopped.set()
        atexit.unregister(self.stop)
        for thread in self.threads:
            thread.join(1.0)

    def _report(self) -> None:
        beat = 0
        known: list[int] = []  # ranks that have reported: a request for others would wait for them
        while not self.stopped.wait(self.interval):
            beat += 1
            began = PROGRESS.work_began
            if began is not None and time.monotonic() - began < WORK_TIMEOUTS * self.timeout:
                PROGRESS.marks += 1
            status = own_status(beat)
            try:
                self.store.set(_key(status.rank), json.dumps(asdict(status)))
                if len(known) < self.world_size:
                    known = [rank for rank in range(self.world_size) if self.store.check([_key(rank)])]
                reports = self.store.multi_get([_key(rank) for rank in known])
            except RuntimeError:  # rank 0 has exited, or cannot be reached: its silence tells
                continue
            self.statuses = {each.rank: each for each in (Status(**json.loads(report)) for report in reports)}
        with contextlib.suppress(RuntimeError):  # rank 0 has exited
            self.store.set(_key(processes.rank()), json.dumps(asdict(own_status(beat + 1, ended=True))))

    def _judge(self) -> None:
        silence = Silence(self.world_size)
        while not self.stopped.wait(self.interval):
            silence.look(self.statuses, PROGRESS.marks, self.interval)
            if silence.longest() >= self.timeout and not self.stopped.is_set():
                self._end(silence)

    def _end(self, silence: "Silence") -> None:
        """Print what is known, and exit."""
        timer = threading.Timer(PRINT_SECONDS, os._exit, [1])  # should stderr be a pipe that nobody reads
        timer.name = f"{processes.WATCH}end"
        timer.start()
        try:
            rank, host = processes.rank(), gethostname()
            silent = silence.silent(self.timeout / 2)
            here = [each for each in self.statuses.values() if each.host == host]
            report = describe(self.statuses, silence, silent, self.timeout)
            if rank == min((each.rank for each in here if each.rank not in silent), default=rank):
                processes.print_line(report)
                for each in here:
                    if each.rank in silent:
                        _ask_for_stacks(each, self.world_size)
            processes.print_line(f"rank {rank} of {self.world_size} (process {os.getpid()} on {host}):\n{stacks()}")
            try:
                raise TimeoutError(report)
            except TimeoutError as error:
                processes.record_for_launcher(error)
            time.sleep(2 * self.interval + 1)  # the other ranks print theirs before the launcher ends them
        finally:
            os._exit(FAILED)


_running: list[Watchdog] = []


def start(store: TCPStore | None, timeout: float) -> None:
    """Watch the job from now on; all ranks call it. A single process (no store) is not watched."""
    if store is not None:
        _running.append(Watchdog(store, timeout))
        _running[-1].start()


def stop() -> None:
    """End the watch, after the last collective of the job."""
    while _running:
        _running.pop().stop()


@dataclass
class Silence:
    """For how many seconds each rank has given no sign of life, and all of them have made no progress."""

    world_size: int
    awake: float = 0.0  # seconds that this process has been running for
    looked: float = field(default_factory=time.monotonic)
    beats: dict[int, tuple[int, float]] = field(default_factory=dict)  # rank -> (beat, when it came)
    ended: set[int] = field(default_factory=set)  # ranks whose watch has ended
    marks: dict[int, int] = field(default_factory=dict)
    moved: float = 0.0

    def look(self, statuses: dict[int, Status], own_marks: int, interval: float) -> None:
        now = time.monotonic()
        self.awake += min(now - self.looked, 2 * interval)  # more has passed if the process was stopped meanwhile
        self.looked = now
        for rank, each in statuses.items():
            if each.beat > self.beats.get(rank, (-1, 0.0))[0]:
                self.beats[rank] = (each.beat, self.awake)
        self.ended = {rank for rank, each in statuses.items() if each.ended}
        marks = {rank: each.marks for rank, each in statuses.items()} | {processes.rank(): own_marks}
        if marks != self.marks:
            self.marks, self.moved = marks, self.awake

    def of(self, rank: int) -> float:
        return 0.0 if rank in self.ended else self.awake - self.beats.get(rank, (0, 0.0))[1]

    def without_progress(self) -> float:
        return self.awake - self.moved

    def longest(self) -> float:
        return max(self.without_progress(), *map(self.of, range(self.world_size)))

    def silent(self, seconds: float) -> list[int]:
        """The ranks of which nothing has been heard for so long: rank 0 if of none, since it hosts the store."""
        silent = [rank for rank in range(self.world_size) if self.of(rank) >= seconds]
        return [0] if len(silent) == self.world_size and processes.rank() != 0 else silent


def describe(statuses: dict[int, Status], silence: Silence, silent: list[int], timeout: float) -> str:
    """A line for each rank that holds the job up, and one for what the job does about it."""
    lines = []
    for rank in silent:
        last = f"{_state(statuses[rank])}; it was in {statuses[rank].phase}" if rank in statuses else "since the start"
        lines.append(
            f"rank {rank} of {silence.world_size}: no sign of life for {silence.of(rank):.0f} seconds: {last}"
        )
    present = [each for each in statuses.values() if not each.ended]
    behind = [] if silent else _behind(present)
    for each in behind:
        lines.append(
            f"rank {each.rank} of {silence.world_size}: no progress for {silence.without_progress():.0f} seconds: "
            f"process {each.pid} on {each.host} is in {each.phase}, in {each.place}"
        )
    if not silent and len(behind) == len(present):
        lines.append(
            "no rank is known to be the cause: all ranks are waiting in collectives, which may differ, or the network "
            "is down"
        )
    lines.append(f"the job stands still, and ends as --timeout {timeout:g} says; the Python stacks of its processes:")
    return "\n".join(lines)


def _behind(statuses: list[Status]) -> list[Status]:
    """The ranks that all others wait for; all of them if that cannot be told."""
    outside = [each for each in statuses if not each.waits]
    if 0 < len(outside) < len(statuses):
        return outside
    # Python sees no collective where they are part of the backward pass, or asynchronous as on GPUs.
    fewest = min((each.collectives for each in statuses), default=0)
    return [each for each in statuses if each.collectives == fewest]


def _state(status: Status) -> str:
    """What can be told of a silent process from here."""
    where = f"process {status.pid} on {status.host}"
    if status.host != gethostname():
        return f"{where}, or the network to it"
    return f"{where} is {_os_status(status)}"


def _os_status(status: Status) -> str:
    """What the operating system says of a process of this machine: "running", "stopped", "disk-sleep", ..."""
    try:
        process = psutil.Process(status.pid)
        return process.status() if abs(process.create_time() - status.created) < 1 else "gone"
    except psutil.Error:
        return "gone"


def _ask_for_stacks(status: Status, world_size: int) -> None:
    """A process whose threads wait for the GIL prints its stacks in a signal handler. A stopped one cannot."""
    if _os_status(status) not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, "gone"):
        processes.print_line(f"rank {status.rank} of {world_size} ({_state(status)}):")
        os.kill(status.pid, signal.SIGQUIT)


def stacks() -> str:
    """The Python stack of each thread of this process but those that watch, the main thread's first."""
    frames = sys._current_frames()
    main = threading.main_thread()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not main)
    shown = [thread for thread in threads if thread.ident in frames and not thread.name.startswith(processes.WATCH)]
    return "\n".join(f"{each.name}:\n{''.join(traceback.format_stack(frames[each.ident or 0]))}" for each in shown)


def _place() -> tuple[str, bool]:
    """The innermost function of the main thread, and whether it is a collective's."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "the end", False
    code = frame.f_code
    place = f"{code.co_name} ({'/'.join(Path(code.co_filename).parts[-3:])}:{frame.f_lineno})"
    return place, any(name in code.co_filename for name in COLLECTIVES)


def _collectives() -> int:
    """How many collectives this rank has started in the group of all ranks."""
    try:
        group: Any = torch.distributed.distributed_c10d._get_default_group()
        return group._get_sequence_number_for_group()
    except (RuntimeError, ValueError):  # there is no group yet
        return 0


def _key(rank: int) -> str:
    return f"gpt2flash/status/{rank}"
