"""Errors of the file system, which the kernel or a fault injected below the libraries raises, end each command in a
sentence and leave nothing half-written."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.finished_runs import write_run
from tests.preparations import fork_prepare, write_lines


def limited(size: int, *words: object, cwd: Path) -> str:
    """What a command says at its end that may write no file beyond `size` bytes: EFBIG."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert done.returncode == 2, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


TOO_LARGE = "File too large"


def test_a_checkpoint_that_is_too_large(flags: list[str], tmp_path: Path) -> None:
    said = limited(1 << 20, "train", *flags, "--save_interval=4", f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    run = tmp_path / "baseline"
    assert said == f"error: {run}/step-4: {TOO_LARGE}"
    assert not list(run.glob("step-*")) + list(run.glob(".step-*"))
    # It is written in the background, which ends after the step in which it fails.
    assert 4 <= (run / "metrics.jsonl").read_text().count("\n") <= 8


@pytest.mark.parametrize("kind", ["gpt2", "nanogpt"])
def test_an_export_that_is_too_large(kind: str, finished: Path, tmp_path: Path) -> None:
    """safetensors' errors are Rust's, and torch's tell no reason."""
    said = limited(1 << 20, "train.export", finished, tmp_path / "out", "--format", kind, cwd=tmp_path)
    assert said.startswith(f"error: {tmp_path}/out: {TOO_LARGE}" if kind == "gpt2" else "error: the file system: ")
    assert kind == "gpt2" or "is the disk full?" in said
    assert list(tmp_path.iterdir()) == []


def test_a_preparation_and_a_comparison_that_are_too_large(tmp_path: Path) -> None:
    texts = write_lines(tmp_path / "a.jsonl", [f"document {i} " * 99 for i in range(200)])
    words = ["--dataset=json", f"--data_files={texts}", f"--out_dir={tmp_path}/out", "--val_fraction=0.1"]
    assert TOO_LARGE in limited(1 << 14, "train.preprocess_data", *words, cwd=tmp_path)
    runs = [write_run(tmp_path / name) for name in "ab"]
    said = limited(1 << 10, "train.compare", *runs, "--out", tmp_path / "report", cwd=tmp_path)
    assert said == f"error: --out {tmp_path}/report cannot be written: {TOO_LARGE}"
    assert not list((tmp_path / "report").iterdir())


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ESTALE])
def test_a_disk_that_fails(number: int, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    texts = write_lines(tmp_path / "work" / "a.jsonl", [f"document {i} " * 9 for i in range(200)])
    words = ["--dataset=json", f"--data_files={texts}", f"--out_dir={tmp_path}/work/out", "--val_fraction=0.1"]
    code, said = fork_prepare(words, tmp_path / "work", change=3, error=number)
    assert (code, "Traceback" in said) == (2, False), said
    assert os.strerror(number) in said.splitlines()[-1]
