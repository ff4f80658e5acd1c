"""The memory that a preparation takes does not depend on how much text there is."""

import re
import string
import sys
from pathlib import Path

import pytest

from tests.conftest import command
from tests.preparations import pieces_of_the_standard_library, write_parquet

GIGABYTE_KB = 1_000_000_000 // 1024
# The peak of this process alone: Linux counts VmHWM anew for each program, unlike ru_maxrss.
MEASURED = """
import sys
from pathlib import Path
from train.preprocess_data.__main__ import main
main(sys.argv[1:])
print(Path("/proc/self/status").read_text())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet of 20 and of 200 MB of text. Each copy of the library has letters shifted, and so words of its own."""
    folder = tmp_path_factory.mktemp("text")
    pieces = pieces_of_the_standard_library()
    letters = string.ascii_lowercase
    for shift in range(18):
        cipher = str.maketrans(letters, letters[shift:] + letters[:shift])
        write_parquet(folder / f"{shift:02}.parquet", [piece.translate(cipher) for piece in pieces])
    return folder


def peak_kb(folder: Path, out: Path, *words: str) -> int:
    flags = ["--dataset=parquet", "--num_proc=2", f"--out_dir={out}", *words]
    done = command(sys.executable, "-c", MEASURED, *flags, cwd=folder, timeout=1200)
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", done.stdout, re.MULTILINE)
    assert peak, done.stdout
    return int(peak[1])


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("split", [["--split=hash"], ["--split=nanogpt", "--order=nanogpt"]], ids=["hash", "nanogpt"])
@pytest.mark.parametrize("tokenizer", ["tiktoken", "gigatoken"])
def test_memory_is_bounded(folder: Path, tmp_path: Path, tokenizer: str, split: list[str]) -> None:
    words = [f"--tokenizer={tokenizer}", *split]
    small = peak_kb(folder, tmp_path / "small", "--data_files", "00.parquet", "01.parquet", *words)
    large = peak_kb(folder, tmp_path / "large", "--data_files", "*.parquet", *words)
    print(f"{tokenizer} {split}: {small / 1e3:.0f} MB for 22 MB of text, {large / 1e3:.0f} MB for 200 MB")
    assert large < GIGABYTE_KB
    assert large < 1.25 * small
