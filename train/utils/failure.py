"""When a process of a job of several fails: its rank and error come first on the screen, and the job ends.

A process that raises says so itself. One that a signal ends is named by its neighbour, which watches it: each rank
watches the next one on its machine, the last the first. All others keep still, since their own errors ("connection
closed by peer") are only consequences, until the launcher ends them; where none does, they end by themselves.
"""

import logging
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

PATIENCE_SECONDS = 10  # launchers end the others within one or two seconds
# What collectives say of a process that is gone: gloo's sockets, NCCL, and the store that rank 0 holds.
LOST = re.compile(
    r"gloo/|Connection (closed|reset|was likely closed)|[Rr]emote (process|peer|server|error)|Broken pipe"
    r"|communicator was aborted|failed to recv"
)


def job() -> tuple[int, int]:
    """(rank, processes) of the job that this process belongs to, by its launcher's word; (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def end(error: Exception) -> NoReturn:
    """End this process of a job because of `error`, with exit code 1. Call it while `error` is being handled."""
    rank, size = job()
    first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
        time.sleep(PATIENCE_SECONDS)
        _say(f"rank {rank} of {size}: lost another process of the job: {first_line}")
    else:
        _say(f"rank {rank} of {size}: {first_line}\n{traceback.format_exc()}")
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)  # for the summary that torchrun prints at the end
    sys.stdout.flush()
    os._exit(1)  # taking leave of processes that are gone can hang or abort


def leave() -> NoReturn:
    """End this process of a job, with exit code 0, when all is written and closed.

    Python's own way out takes the interpreter down first. Threads of the process group that then still let go of a
    collective's tensors, as after the last validation of FSDP2 or ZeRO-3, abort ("terminate called without an active
    exception").
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def watch(pids: Sequence[int]) -> None:
    """From now on say it when a signal ends the next rank on this machine, and end with the launcher.

    `pids` are those of all ranks, in their order. The launcher is torchelastic's agent or DeepSpeed's. Where the
    system has no pidfds, nothing is watched.
    """
    if len(pids) == 1 or not hasattr(os, "pidfd_open"):
        return
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    rank, local_rank = job()[0], int(os.environ.get("LOCAL_RANK", "0"))
    neighbour = rank - local_rank + (local_rank + 1) % local_size
    parent = os.getppid()
    files: dict[int, int | None] = {}
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_SIZE" in os.environ:  # else the parent may be a mere shell
            files[os.pidfd_open(parent)] = None
        if local_size > 1 and _parent_of(pids[neighbour]) == parent:
            files[os.pidfd_open(pids[neighbour])] = neighbour
    except OSError:
        return
    threading.Thread(target=_watch, args=(files, pids), daemon=True).start()


def _watch(files: dict[int, int | None], pids: Sequence[int]) -> None:
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    while files:
        for file, _ in poll.poll():
            poll.unregister(file)
            rank = files.pop(file)
            if rank is None:
                _say(f"rank {job()[0]} of {len(pids)}: the launcher is gone")
                os._exit(1)
            number = _ended_by(pids[rank])
            # The launcher itself ends processes by SIGTERM, and a person by Ctrl-C.
            if number not in (None, signal.SIGTERM, signal.SIGINT):
                _say(f"rank {rank} of {len(pids)}: ended by {signal.Signals(number).name} (process {pids[rank]})")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on (see proc_pid_stat(5)); empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent_of(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _ended_by(pid: int) -> int | None:
    """The signal that ended a process whose launcher has not yet asked for its exit status."""
    fields = _stat(pid)
    status = int(fields[49]) if len(fields) > 49 and fields[0] == "Z" else 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def _say(text: str) -> None:
    sys.stderr.write(f"\n{text}\n")  # begins a line: a progress bar may be standing there
    sys.stderr.flush()
