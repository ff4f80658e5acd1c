"""Measure a command as a complete process, including its start and its children: seconds, memory, disk (Linux)."""

import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.rounds import Round

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Peaks:
    """Peaks in bytes.

    `memory` is the sum of the proportional set sizes of a process and its children: a page that n processes share
    counts 1/n in each. `anonymous` excludes the pages of mapped files, which the system may reclaim at any time.
    """

    memory: int
    anonymous: int
    disk: int


def measure(command: list[str], scratch: Path) -> Round:
    """Run a command to its end, undisturbed; CPU seconds include its children's. Its caches are in `scratch`."""
    os.sync()  # what an earlier command wrote must not slow this one down
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = start(command, scratch)
    process.wait()
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    check(process, scratch)
    return Round(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def sample(command: list[str], scratch: Path) -> Peaks:
    """Run a command to its end, sampled every `SAMPLE_SECONDS`; disk use is that of `scratch`."""
    process = start(command, scratch)
    root = psutil.Process(process.pid)
    samples = [(0, 0, 0)]
    while process.poll() is None:
        samples.append((*resident_bytes(root), disk_bytes(scratch)))
        time.sleep(SAMPLE_SECONDS)
    check(process, scratch)
    return Peaks(*map(max, zip(*samples, strict=True)))


def start(command: list[str], scratch: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1"}
    with (scratch / "log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def check(process: subprocess.Popen[bytes], scratch: Path) -> None:
    """Exit with the log of a command that has failed."""
    if process.returncode:
        sys.exit(f"{process.args!r}\n{(scratch / 'log').read_text()}")


def resident_bytes(root: psutil.Process) -> tuple[int, int]:
    """Proportional set size of a process and its children, in bytes: total, and its anonymous part."""
    total = anonymous = 0
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in processes:
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it has ended in the meantime
            continue
        sizes = dict(re.findall(r"^(Pss|Pss_Anon): +(\d+) kB$", rollup, re.MULTILINE))
        total += 1024 * int(sizes["Pss"])
        anonymous += 1024 * int(sizes["Pss_Anon"])
    return total, anonymous


def disk_bytes(folder: Path) -> int:
    """Bytes that the files in a folder occupy."""
    blocks = 0
    for path in folder.rglob("*"):
        try:
            blocks += path.lstat().st_blocks
        except FileNotFoundError:  # renamed in the meantime
            continue
    return 512 * blocks
