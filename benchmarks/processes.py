"""What a command costs as a whole process, its start and its children included: seconds, memory, disk (Linux)."""

import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Timed:
    wall: float  # seconds
    cpu: float  # seconds, children included


@dataclass(frozen=True)
class Watched:
    """Peaks in bytes.

    `memory` is the sum of a process's and its children's proportional set sizes: a page that n processes share counts
    1/n in each. `anonymous` leaves out the pages of mapped files, which the system may take back at any time.
    """

    memory: int
    anonymous: int
    disk: int


def measure(words: list[str], scratch: Path) -> Timed:
    """Run to the end, undisturbed. The command's caches are in `scratch`."""
    os.sync()  # what an earlier run wrote is not to burden this one
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = start(words, scratch)
    process.wait()
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    check(process, words, scratch)
    return Timed(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def watch(words: list[str], scratch: Path) -> Watched:
    """Run to the end, sampled every `SAMPLE_SECONDS`; disk use is that of `scratch`."""
    process = start(words, scratch)
    family = psutil.Process(process.pid)
    samples = [Watched(0, 0, 0)]
    while process.poll() is None:
        samples.append(Watched(*resident(family), disk_use(scratch)))
        time.sleep(SAMPLE_SECONDS)
    check(process, words, scratch)
    return Watched(*(max(getattr(sample, name) for sample in samples) for name in ("memory", "anonymous", "disk")))


def start(words: list[str], scratch: Path) -> subprocess.Popen[bytes]:
    places = {"HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1"}
    with (scratch / "log").open("wb") as log:
        return subprocess.Popen(words, env={**os.environ, **places}, stdout=log, stderr=log)


def check(process: subprocess.Popen[bytes], words: list[str], scratch: Path) -> None:
    if process.returncode:
        sys.exit(f"{' '.join(words)}\n{(scratch / 'log').read_text()}")


def resident(process: psutil.Process) -> tuple[int, int]:
    """Proportional set size of a process and its children, in bytes: all of it, and what of it is anonymous."""
    total = anonymous = 0
    try:
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for member in members:
        try:
            rollup = Path(f"/proc/{member.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        sizes = dict(re.findall(r"^(Pss|Pss_Anon): +(\d+) kB$", rollup, re.MULTILINE))
        total += 1024 * int(sizes["Pss"])
        anonymous += 1024 * int(sizes["Pss_Anon"])
    return total, anonymous


def disk_use(folder: Path) -> int:
    """Bytes that the files in a folder occupy."""
    blocks = 0
    for path in folder.rglob("*"):
        try:
            blocks += path.lstat().st_blocks
        except FileNotFoundError:  # renamed meanwhile
            continue
    return 512 * blocks
