"""Failures in a job of several processes: the failed rank and its error are printed first, and the job ends.

A process that raises reports its own error. A process that a signal ends is reported by a peer: each rank watches the
next rank on its machine, and the last one watches the first. All other ranks stay silent, since their errors
("connection closed by peer") are only consequences. The launcher ends them; without one, they exit by themselves.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from train.utils.errors import FAILED, first_line

WATCH = "watch_"  # what the names of threads begin with that only watch the job
LAUNCHERS = {"accelerate", "torchrun", "torch.distributed.run", "deepspeed", "deepspeed.launcher.launch"}
GRACE_SECONDS = 10  # launchers end the other processes within one or two seconds
# Errors that collectives raise when a peer has exited: gloo's sockets, NCCL, and the store that rank 0 hosts.
LOST_PEER = re.compile(
    r"gloo/|Connection (closed|reset|was likely closed)|[Rr]emote (process|peer|server|error)|Broken pipe"
    r"|communicator was aborted|failed to recv"
)


def rank() -> int:
    """Rank of this process as its launcher set it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes of the job as the launcher set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def machines() -> int:
    """Number of machines of the job, each with as many processes as this one."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())
    return -(-world_size() // local_size)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(of: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that this process can get: what the system has available, within the limits of its cgroups.

    A container, a Slurm job or a systemd unit is a cgroup. `of` lists this process's, which are folders in `cgroups`
    (cgroups(7)): "0::/PATH" for version 2, "N:memory:/PATH" for version 1. A limit of an outer group holds for all
    in it. In a container PATH may be that of the machine, where its own group is at the root. Pages of files that
    are not in use count as free, because the kernel drops them before it refuses memory.
    """
    import psutil

    available = psutil.virtual_memory().available
    try:
        lines = [line.split(":", 2) for line in of.read_text().splitlines()]
    except OSError:  # another system than Linux
        return available
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        root, limit, usage, unused = (
            (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else (cgroups, "memory.max", "memory.current", "inactive_file")
        )
        group = root / path.strip("/")
        for folder in (each for each in (group, *group.parents) if each.is_relative_to(root)):
            try:
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # there is none, or the limit is "max"
                continue
            available = min(available, max(0, most - used + int(counts.get(unused, 0))))
    return available


def exit_with_error(error: Exception) -> NoReturn:
    """Print `error` with this process's rank and exit with code 1. Call it while `error` is being handled."""
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        time.sleep(GRACE_SECONDS)
        print_line(f"rank {rank()} of {world_size()}: lost another process of the job: {_with_type(error)}")
    else:
        print_line(f"rank {rank()} of {world_size()}: {_with_type(error)}\n{traceback.format_exc()}")
        record_for_launcher(error)
    sys.stdout.flush()
    os._exit(FAILED)  # a regular exit can hang or abort when peers have already exited


def record_for_launcher(error: Exception) -> None:
    """Leave the error for the summary that torchrun prints at the end."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def exit_process(code: int = 0) -> NoReturn:
    """Exit this process of a job, once everything is written and closed.

    A regular exit finalizes the interpreter first. Threads of the process group that release a collective's tensors
    after that, as after the last validation of FSDP2 or ZeRO-3, abort ("terminate called without an active
    exception").
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def print_line(text: str) -> None:
    """Print to stderr, on a line of its own."""
    sys.stderr.write(f"\n{text}\n")  # starts on a new line: a progress bar may be on the current one
    sys.stderr.flush()


def watch_peer(pids: Sequence[int], launcher_exited: Callable[[], None]) -> None:
    """Start a thread that reports the signal that ends the next rank on this machine, and the end of the launcher.

    `pids` are the process ids of all ranks, in rank order. The launcher is torchelastic's agent, DeepSpeed's or
    Accelerate's. On a system without pidfds, nothing is watched.
    """
    if not hasattr(os, "pidfd_open"):
        return
    import psutil

    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    peer = rank() - local_rank + (local_rank + 1) % local_size
    parent = os.getppid()
    watched: dict[int, int | None] = {}  # pidfd -> rank, None for the launcher
    try:
        for ancestor in psutil.Process().parents():
            by_torchrun = ancestor.pid == parent and "TORCHELASTIC_RUN_ID" in os.environ
            if not (by_torchrun or _is_launcher(ancestor.cmdline())):
                break
            watched[os.pidfd_open(ancestor.pid)] = None
        if local_size > 1 and psutil.Process(pids[peer]).ppid() == parent:
            watched[os.pidfd_open(pids[peer])] = peer
    except (OSError, psutil.Error):
        return
    arguments = (watched, pids, launcher_exited)
    threading.Thread(target=_watch, args=arguments, daemon=True, name=f"{WATCH}peer").start()


def _is_launcher(command: Sequence[str]) -> bool:
    """Whether a command is a launcher's. DeepSpeed has two, of which one starts the other; a parent may be a shell."""
    return any(Path(word).name in LAUNCHERS for word in command[:4])


def _watch(watched: dict[int, int | None], pids: Sequence[int], launcher_exited: Callable[[], None]) -> None:
    poll = select.poll()
    for pidfd in watched:
        poll.register(pidfd, select.POLLIN)
    while watched:
        for pidfd, _ in poll.poll():
            poll.unregister(pidfd)
            ended = watched.pop(pidfd)
            if ended is None:
                launcher_exited()
                continue
            number = _ended_by(pids[ended])
            # The launcher itself ends processes by SIGTERM, and a person by Ctrl-C.
            if number not in (None, signal.SIGTERM, signal.SIGINT):
                print_line(
                    f"rank {ended} of {len(pids)}: ended by {signal.Signals(number).name} (process {pids[ended]})"
                )


def _ended_by(pid: int) -> int | None:
    """Signal that ended a process whose exit status the launcher has not read yet."""
    try:  # the fields from the third on, see proc_pid_stat(5)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    status = int(fields[49]) if len(fields) > 49 and fields[0] == "Z" else 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def _with_type(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
