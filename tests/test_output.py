"""Commands whose output cannot be written: the reader has gone, a full device, an encoding without the characters."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, records
from tests.finished_runs import write_run
from tests.test_kernels import gpu_trace, write_trace
from train.utils.errors import file_error

READER_GONE = 141


def gone() -> int:
    """The writing end of a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def start(words: list[str], cwd: Path, stdout: int, stderr: int = subprocess.PIPE, **environment: str):
    """`python -m WORDS` with this file as its stdout, which is closed here afterwards."""
    try:
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=cwd,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            timeout=300,
        )
    finally:
        if stdout >= 0:
            os.close(stdout)


@pytest.fixture(scope="module")
def commands(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    runs = [str(write_run(tmp_path_factory.mktemp("runs") / name)) for name in ("a", "b")]
    profiled = tmp_path_factory.mktemp("profiled")
    write_trace(profiled, gpu_trace())
    return {
        "plan": ["train.plan", "--model=tiny", "--sequences_per_step=4"],
        "generate": ["train.generate", f"--checkpoint={finished}", "--prompt", *"abcdef", "--max_new_tokens=1"],
        "compare": ["train.compare", *runs],
        "kernels": ["train.kernels", str(profiled)],
        "config": ["train.config.packaged", "deepspeed"],
        "help": ["train.cli", "--help"],
    }


@pytest.mark.parametrize("name", ["plan", "generate", "compare", "kernels", "config", "help"])
def test_a_command_whose_reader_has_gone(name: str, commands: dict[str, list[str]], tmp_path: Path) -> None:
    done = start(commands[name], tmp_path, gone())
    assert (done.returncode, done.stderr) == (READER_GONE, b"")


@pytest.mark.parametrize("name", ["generate", "help"])
def test_a_command_on_a_full_device(name: str, commands: dict[str, list[str]], tmp_path: Path) -> None:
    done = start(commands[name], tmp_path, os.open("/dev/full", os.O_WRONLY))
    assert done.returncode == 2
    assert done.stderr == b"error: stdout cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    "failing", ["gone", *(pytest.param(name, marks=pytest.mark.faults) for name in ("full", "closed"))]
)
def test_a_run_outlives_its_output(failing: str, flags: list[str], tmp_path: Path) -> None:
    words = ["train", *flags, f"--checkpoint_path={tmp_path}", "--max_new_tokens=0"]
    if failing == "closed":
        shell = f'exec "{sys.executable}" -m "$@" >&- 2>&-'
        code = subprocess.run(["sh", "-c", shell, "sh", *words], cwd=ROOT, timeout=300).returncode
    elif failing == "full":
        code = start(words, tmp_path, os.open("/dev/full", os.O_WRONLY), os.open("/dev/full", os.O_WRONLY)).returncode
    else:
        done = start(words, tmp_path, gone())
        code = done.returncode
        assert done.stderr.count(b"stdout cannot be written (Broken pipe): the run continues without it") == 1
        assert b"Traceback" not in done.stderr
    assert code == 0
    assert len(records(tmp_path / "baseline")) == 8
    assert (tmp_path / "baseline" / "metrics.json").exists()


@pytest.mark.faults
def test_stderr_alone_has_gone(flags: list[str], tmp_path: Path) -> None:
    words = ["train", *flags, f"--checkpoint_path={tmp_path}", "--max_new_tokens=0"]
    writing = gone()
    done = start(words, tmp_path, subprocess.PIPE, writing)
    os.close(writing)
    assert done.returncode == 0
    assert done.stdout.count(b"stderr cannot be written (Broken pipe): the run continues without it") == 1


def test_an_ascii_stdout_gets_escapes(finished: Path, tmp_path: Path) -> None:
    words = ["train.generate", f"--checkpoint={finished}", "--prompt", "caf\u00e9 \u20ac", "--max_new_tokens=1"]
    done = start(words, tmp_path, subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"caf\\xe9 \\u20ac")
    done = start([*words, "--json"], tmp_path, subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["prompt"] == "caf\u00e9 \u20ac"


def test_the_errors_of_a_file_system_are_found_in_what_libraries_make_of_them(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    def sentence(name: str) -> str | None:
        tensor = torch.zeros(4096)
        try:
            if name == "torch":
                with Path("/dev/full").open("wb") as file:
                    torch.save(tensor, file)
            elif name == "torch, its own file":
                torch.save(tensor, "/dev/full")
            elif name == "safetensors":
                save_file({"a": tensor}, tmp_path / ("n" * 300))
            elif name == "wrapped":
                try:
                    raise OSError(errno.EIO, "Input/output error", "disk")
                except OSError as error:
                    raise ValueError("a library's own") from error
            elif name == "unrelated":
                try:
                    raise FileNotFoundError(errno.ENOENT, "No such file or directory", "optional")
                except FileNotFoundError:
                    raise ValueError("a mistake of ours")  # noqa: B904
            else:
                (tmp_path / ("n" * 300)).write_text("")
        except Exception as error:
            return file_error(error)
        raise AssertionError("nothing failed")

    assert sentence("torch") == "the file system: No space left on device"
    assert "could not be written (" in (sentence("torch, its own file") or "")
    assert sentence("safetensors") == "the file system: File name too long"
    assert sentence("wrapped") == "disk: Input/output error"
    assert sentence("unrelated") is None
    assert sentence("") == f"{tmp_path / ('n' * 300)}: File name too long"
