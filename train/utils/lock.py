"""One owner of a folder: whoever writes to it holds a lock file in it, and every other process is refused.

The kernel holds the lock (`flock`) and releases it when its process ends, however it ends. On file systems that
several machines share, flock may work on each machine alone, survive a dead machine for a while, or be missing. There
the file itself counts: it names its owner, whose thread renews the time of the file every `BEAT_SECONDS`. An owner on
another machine that does not renew it for `PATIENCE_SECONDS`, by the clock of the process that waits, is taken to be
dead. The owner looks into the file before everything that it writes or deletes in the folder through
`train.utils.files`, which is all but lines of a log: if it was taken over, it writes nothing more.
"""

import errno
import fcntl
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import Literal, NamedTuple

import psutil

from train.utils.errors import UserError

LOCK = ".gpt2flash.lock"
BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 60.0
LEASE_SECONDS = 120.0  # an NFS server keeps the locks of a dead machine for 90
POLL_SECONDS = 1.0
NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # what file systems without it answer


@dataclass(frozen=True)
class Owner:
    """The content of a lock file: a process, and since when it owns the folder."""

    host: str
    boot: str  # changes each time the machine starts
    process: int
    since: str
    command: str
    job: str = ""  # which its processes share with those that a launcher starts in their place

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since} ({self.command})"

    @property
    def is_on_this_machine(self) -> bool:
        return (self.host, self.boot) == (gethostname(), boot_id())


class Look(NamedTuple):
    """A lock file, opened and, where that is possible, locked by this process."""

    descriptor: int
    flock: Literal["ours", "held", "missing"]  # held by another process, missing in this file system
    empty: bool
    owner: Owner | None  # None if the file is empty or broken
    renewed: int  # time of the file in nanoseconds

    @property
    def is_alive(self) -> bool:
        """Whether the kernel of this machine holds the lock for another process."""
        return self.flock == "held" and (self.owner is None or self.owner.is_on_this_machine)

    @property
    def is_free(self) -> bool:
        """Whether there is no owner, or the kernel of this machine has released its lock."""
        here = self.owner is not None and self.owner.is_on_this_machine
        return self.flock != "held" and (self.empty or (here and self.flock == "ours"))


@dataclass
class FolderLock:
    """The lock of `folder`, which `flag` names in messages."""

    folder: Path
    flag: str
    job: str = ""
    restarted: bool = False  # whether an earlier process of the job owned the folder, and has ended
    descriptor: int | None = None
    owner: Owner | None = None  # this process, once it has acquired the lock
    _released: threading.Event = field(default_factory=threading.Event)
    _checking: threading.Lock = field(default_factory=threading.Lock)  # checkpoints are written by another thread

    @property
    def file(self) -> Path:
        return self.folder / LOCK

    def acquire(self) -> None:
        """Become the owner, or raise the `UserError` that names who is; see `owned`."""
        self.descriptor, certain = self._open_when_free()
        self.owner = Owner(
            host=gethostname(),
            boot=boot_id(),
            process=os.getpid(),
            since=datetime.now(UTC).isoformat(timespec="milliseconds"),
            command=shlex.join(["python", *sys.argv])[:500],
            job=self.job,
        )
        try:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, json.dumps(asdict(self.owner), indent=2).encode() + b"\n", 0)
            os.fsync(self.descriptor)
        except OSError:  # a full disk
            self.release()
            raise
        if not certain:  # a process on another machine may have written its name as well: the last one owns it
            time.sleep(2 * POLL_SECONDS)
            if (owner := self._read()) != self.owner:
                self._close()
                raise self._refusal(owner)

    def _open_when_free(self) -> tuple[int, bool]:
        """The descriptor of the file, and whether no other process can have got it at the same moment."""
        first: Look | None = None
        began = time.monotonic()
        while True:
            look = self._open()
            patience = LEASE_SECONDS if look.flock == "held" else PATIENCE_SECONDS
            is_renewed = first is not None and look.renewed != first.renewed
            is_over = first is not None and not is_renewed and time.monotonic() > began + patience
            is_own = self.restarted and look.owner is not None and look.owner.job == self.job
            if look.is_free or (look.flock != "held" and (is_own or is_over)):
                if look.owner is not None and not is_own:
                    print(f"{self.folder}: {look.owner} has ended without releasing it", file=sys.stderr, flush=True)
                return look.descriptor, look.flock == "ours" and not is_over
            os.close(look.descriptor)
            if look.is_alive or is_renewed:
                raise self._refusal(look.owner)
            if is_over:
                raise UserError(
                    f"{self.flag}: {self.folder} is locked by {look.owner}, which has given no sign of life for "
                    f"{patience:.0f} seconds: if it has ended, delete {self.file}"
                )
            if first is None:
                first = look
                owner = look.owner or "an unknown process"
                print(
                    f"{self.folder} is locked by {owner}: waiting up to {patience:.0f} seconds for a sign "
                    "that it lives",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(POLL_SECONDS)

    def _open(self) -> Look:
        """The lock file as it is, created if it is missing."""
        while True:
            try:
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # the last owner has just removed the folder, which was empty
                self.folder.mkdir(parents=True, exist_ok=True)
                continue
            flock = _try_flock(descriptor)
            if self._is_at_its_path(descriptor):
                status = os.fstat(descriptor)
                return Look(descriptor, flock, status.st_size == 0, read_owner(descriptor), status.st_mtime_ns)
            os.close(descriptor)  # its owner has just removed it

    def _refusal(self, owner: Owner | None) -> UserError:
        named = owner or "another process, which has just started"
        return UserError(
            f"{self.flag}: {self.folder} is being written by {named}: wait until it ends, stop it, or name another "
            f"{self.flag}"
        )

    def _is_at_its_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.file.stat())
        except OSError:
            return False

    def _read(self) -> Owner | None:
        """The owner by the file at its path, opened anew: NFS shows what other machines have written since."""
        try:
            descriptor = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return read_owner(descriptor)
        finally:
            os.close(descriptor)

    def renew(self) -> None:
        """Renew the file's time until the lock is released. For a thread."""
        while not self._released.wait(BEAT_SECONDS):
            try:
                if self.descriptor is not None:
                    os.utime(self.descriptor)
            except OSError:  # a file server that does not answer: the next beat tries again
                continue

    def check(self) -> None:
        """Raise a `UserError` if the folder is not at its path any more, or another process has taken it over."""
        with self._checking:
            self._check()

    def _check(self) -> None:
        owner = self._read()
        if owner == self.owner:
            return
        if owner is not None:
            raise UserError(f"{self.folder} has been taken over by {owner}: this process writes nothing more to it")
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder} was removed or renamed while this process was writing to it: nothing more is written; "
                f"start again, or resume from the step folders where they are now"
            )
        self._close()  # only the file was removed
        self.acquire()

    def release(self) -> None:
        """Remove the file, unless another process has written its name into it."""
        self._released.set()
        is_ours = self.descriptor is not None and self._is_at_its_path(self.descriptor)
        if is_ours and self._read() in (None, self.owner):
            self.file.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_held: dict[Path, FolderLock] = {}  # by this process


@contextmanager
def owned(folder: Path, flag: str, *, job: str = "", restarted: bool = False) -> Iterator[None]:
    """Own `folder` for the duration of the context; it is created first, and removed again if it is still empty then.

    `flag` is the one that names the folder, for error messages. In a job that was `restarted`, the lock of its earlier
    process is taken over without waiting for a sign of life, on whichever machine that was.

    Raises:
        UserError: if another process owns it, or if no folder can be there.
    """
    created = _create(folder, flag)
    lock = FolderLock(folder, flag, job, restarted)
    try:
        lock.acquire()
        os.register_at_fork(after_in_child=lock._close)  # a forked child would hold the lock after its parent's death
        os.register_at_fork(after_in_child=partial(_held.pop, folder, None))
        threading.Thread(target=lock.renew, daemon=True).start()
        _held[folder] = lock
        try:
            yield
        finally:
            _held.pop(folder, None)
            lock.release()
    finally:
        for each in created:
            try:
                each.rmdir()
            except OSError:
                break


def check(path: Path) -> None:
    """Raise a `UserError` if `path` is, or is in, a folder that this process has owned and has lost since."""
    for folder, held in list(_held.items()):
        if path.is_relative_to(folder):
            held.check()


def _create(folder: Path, flag: str) -> list[Path]:
    """Create a folder; return the folders that were missing, the innermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        there = next(each for each in (folder, *folder.parents) if os.path.lexists(each) and not each.is_dir())
        kind = f"a link to {there.readlink()}, where there is no folder" if there.is_symlink() else "a file"
        raise UserError(f"{flag}: {there} is {kind}; name another folder") from None
    return missing


def _try_flock(descriptor: int) -> Literal["ours", "held", "missing"]:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_FLOCK:
            return "missing"
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return "held"
        raise
    return "ours"


def read_owner(descriptor: int) -> Owner | None:
    """None for an empty file, and for one that is not (or half) a lock file."""
    try:
        return Owner(**json.loads(os.pread(descriptor, 1 << 16, 0)))
    except (ValueError, TypeError):
        return None


def boot_id() -> str:
    """An identifier of this start of the machine; where the kernel has none, the second in which it started."""
    known = Path("/proc/sys/kernel/random/boot_id")
    return known.read_text().strip() if known.exists() else f"{psutil.boot_time():.0f}"
