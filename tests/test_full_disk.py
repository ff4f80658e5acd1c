"""A disk that is full ends a preparation with a sentence; with more room the same command goes on.

Under a tracker it does not end a run.
"""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import pytest

from tests.conftest import ROOT, command, records
from tests.preparations import (
    COMMAND,
    check_pairs,
    contents,
    fork_prepare,
    pieces_of_the_standard_library,
    prepare,
    sentence,
    write_lines,
)

# A mount namespace lives as long as a process in it. This one ends when its standard input does: with this test.
HOLD = ["sh", "-c", 'mount -t tmpfs -o size="$1" tmpfs "$0" && echo ready && exec cat']
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Disk:
    """A small file system that only the commands in its namespace see at `mount`."""

    holder: int
    mount: Path

    @property
    def enter(self) -> list[str]:
        return ["nsenter", "--user", "--mount", "--preserve-credentials", "--target", str(self.holder)]

    @property
    def seen_from_here(self) -> Path:
        return Path(f"/proc/{self.holder}/root{self.mount}")

    def resize(self, size: int) -> None:
        subprocess.run([*self.enter, "mount", "-o", f"remount,size={size}", str(self.mount)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Of 2 MiB; where none can be mounted, the injected faults below are the proof."""
    mount = tmp_path / "disk"
    mount.mkdir()
    make = ["unshare", "--user", "--map-root-user", "--mount", *HOLD, str(mount), str(2 * MEBIBYTE)]
    try:
        holder = subprocess.Popen(make, stdin=PIPE, stdout=PIPE, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    with holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != "ready\n":
                pytest.skip("no file system can be mounted here")
            yield Disk(holder.pid, mount)
        finally:
            holder.kill()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 MB of text, 11 MB of tokens."""
    folder = tmp_path_factory.mktemp("source")
    texts = pieces_of_the_standard_library()
    for number in range(3):
        write_lines(folder / f"{number}.jsonl", texts[number::3])
    return folder


SPLITS = {"hash": ["--split=hash"], "nanogpt": ["--split=nanogpt", "--order=nanogpt"]}


def words(source: Path, split: str, out: Path | str) -> list[str]:
    files = ["--dataset=json", "--data_files", f"{source}/*.jsonl", "--val_fraction=0.05"]
    return [*files, *SPLITS[split], "--tokenizer=tiktoken", "--num_proc=1", f"--out_dir={out}"]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["hash", "nanogpt"])
def test_a_full_disk_keeps_what_is_whole(disk: Disk, source: Path, tmp_path: Path, split: str) -> None:
    prepare(*words(source, split, tmp_path / "whole"), cwd=tmp_path)
    out = disk.mount / "out"
    here = disk.seen_from_here / "out"
    rows = []
    for size in itertools.count(2, 2):
        disk.resize(size * MEBIBYTE)
        command_line = [*disk.enter, sys.executable, *COMMAND, *words(source, split, out)]
        done = command(*command_line, cwd=ROOT, check=False)
        if done.returncode == 0:
            break
        said = sentence(done)
        assert "No space left on device" in said
        assert str(out) in said
        left = contents(here)
        assert not {"train.bin", "train.json", "val.bin", "val.json"} <= set(left)
        if ".preparing" in left:
            kept = contents(here / ".preparing")["journal.json"]
            rows.append(kept["rows"])
            for name, part in kept["parts"].items():
                assert (here / ".preparing" / f"{name}.bin").stat().st_size >= 2 * part["tokens"]
        assert size < 64, said
    assert contents(here) == contents(tmp_path / "whole")
    assert rows == sorted(rows)
    assert len(rows) > 2
    assert rows[-1] > rows[0], "nothing was kept from one to the next"


@pytest.mark.slow
def test_no_room_from_any_change_on(tmp_path: Path) -> None:
    """As on file systems that find it out late, or have no room for one more name; every other time it is a quota."""
    out = tmp_path / "out"
    write_lines(tmp_path / "0.jsonl", [f"document {i} " * 9 for i in range(2000)])
    prepare(*words(tmp_path, "nanogpt", tmp_path / "whole"), cwd=tmp_path)
    for change, number in enumerate(itertools.cycle([errno.ENOSPC, errno.EDQUOT]), start=1):
        code, said = fork_prepare(words(tmp_path, "nanogpt", out), tmp_path, change=change, error=number)
        if code == 0:
            break
        assert code == 2, said
        assert said.splitlines()[-1].startswith("error: "), said
        assert os.strerror(number) in said.splitlines()[-1]
        assert "Traceback" not in said
        check_pairs(out) if out.exists() else None
        code, said = fork_prepare(words(tmp_path, "nanogpt", out), tmp_path)
        assert code == 0, f"no room from change {change} on, then\n{said}"
        assert contents(out) == contents(tmp_path / "whole")
        shutil.rmtree(out)
    assert change > 10
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.faults
def test_a_full_disk_under_tensorboard_does_not_end_a_run(disk: Disk, flags: list[str], tmp_path: Path) -> None:
    run = tmp_path / "baseline"
    run.mkdir()
    (run / "tensorboard").symlink_to(disk.mount)
    (disk.seen_from_here / "filler").write_bytes(bytes(2 * MEBIBYTE - 4 * 4096))
    own = [*flags, "--report_to=tensorboard", "--max_steps=60", "--max_new_tokens=0", f"--checkpoint_path={tmp_path}"]
    done = command(*disk.enter, sys.executable, "-m", "train", *own, cwd=ROOT)
    assert "Traceback" not in done.stderr
    assert done.stdout.count("--report_to tensorboard: failed and is not called again: [Errno 28] No space left") == 1
    assert [record["step"] for record in records(run)] == list(range(1, 61))
    assert (run / "metrics.json").exists()
