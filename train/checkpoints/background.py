"""Checkpoints written in the background: a copy of the training state in host memory, and a thread that writes it.

Training waits for the copy only. One checkpoint is written at a time, and the next one waits for it. The thread calls
the same writer as a save that training waits for, so a kill at any moment leaves the same: complete checkpoints.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np
import torch

from train.job.watchdog import working
from train.utils import processes
from train.utils.errors import first_line

NOTICEABLE_SECONDS = 1.0
COPY_THREADS = 4  # at most: so many saturate the memory of most machines
PIECE = 1 << 22  # values that a thread copies at once: 16 MiB
MOST_OF_MEMORY = 0.8  # of what is available: the rest is left to training, the page cache and other processes
States = Iterable[tuple[str, Mapping[str, torch.Tensor]]]


class HostCopy:
    """Host memory that holds a copy of the training state, pinned for an accelerator.

    It is allocated once and kept for the next copy: memory that the system has to clear first takes three times as
    long to copy to.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, dict[str, torch.Tensor]] = {}
        # Not torch's threads: at the end of each tensor they wait for each other, longer than they copy on busy cores.
        self._threads = ThreadPoolExecutor(min(COPY_THREADS, processes.usable_cores()), "checkpoint copy")

    def fill(self, states: States) -> None:
        """Copy the tensors of every parameter, from any device."""
        pieces: list[Future[None]] = []
        for name, state in states:
            buffers = self.buffers.setdefault(name, {})
            for key, value in state.items():
                on_host = value.device.type == "cpu"
                if key not in buffers:
                    buffers[key] = torch.empty(value.shape, dtype=torch.float32, pin_memory=not on_host)
                if not on_host:
                    buffers[key].copy_(value, non_blocking=True)
                    continue
                to, of = buffers[key].view(-1).numpy(), value.detach().float().reshape(-1).numpy()
                for start in range(0, to.size, PIECE):
                    piece = slice(start, start + PIECE)
                    pieces.append(self._threads.submit(np.copyto, to[piece], of[piece]))
        for copied in pieces:
            copied.result()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
        yield from self.buffers.items()


class BackgroundWriter(AbstractContextManager):
    """Writes one checkpoint at a time in a thread; leaving the context waits for the last one.

    An error of the thread is raised by the next call, whichever that is. On all but the main process it does nothing.
    `seconds` is how long the last checkpoint took to be complete, None before there is one; `say` prints.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.seconds: float | None = None
        self._say = say
        self._copy: HostCopy | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def has_room(self, size: int) -> bool:
        """Whether the host has memory for a copy of `size` bytes; says so if not."""
        # PyTorch allocates pinned memory in powers of two, for each tensor.
        needed = size * (2 if torch.accelerator.is_available() else 1)
        available = processes.available_memory()
        if self._copy is not None or needed <= MOST_OF_MEMORY * available:
            return True
        self._say(
            f"training waits for this checkpoint: writing it in the background needs a copy of "
            f"up to {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are available"
        )
        return False

    def start(self, states: States, write: Callable[[States], object]) -> None:
        """Copy the training state, and have `write` called with the copy in the background."""
        self.wait()
        began = time.monotonic()
        copy = self._copy = self._copy or HostCopy()
        copy.fill(states)

        def write_copy() -> None:
            write(copy)
            self.seconds = time.monotonic() - began

        self._begin(write_copy)

    def then(self, work: Callable[[], object]) -> None:
        """Have `work` called once the checkpoint that is being written is complete: now, if none is."""
        before = self._thread
        if before is None:
            work()
            return

        def work_after() -> None:
            before.join()
            if self._error is None:
                work()

        self._begin(work_after)

    def _begin(self, work: Callable[[], object]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A daemon: a second Ctrl-C ends the process at once, and what is half written has no name yet.
        self._thread = threading.Thread(target=run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error with which the thread has ended, if there is one."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until nothing is being written, and raise the thread's error, if there is one."""
        began = time.monotonic()
        if self._thread is not None:
            with working("waiting for the last checkpoint to be written"):
                self._thread.join()
            self._thread = None
        waited = time.monotonic() - began
        if waited >= NOTICEABLE_SECONDS:
            self._say(f"waited {waited:.1f} s until the last checkpoint was written")
        self.check()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            self._say(f"the last checkpoint was not written: {first_line(error)}")
