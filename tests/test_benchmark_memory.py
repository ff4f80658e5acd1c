"""The benchmark of memory: a process a side, and a step that does not fit is told from one that fails."""

import pytest

from benchmarks import memory
from benchmarks.memory import GIB, cell, peak, step_alone
from benchmarks.sides import Case
from train.utils.errors import UserError

CASE = Case("tiny", block=16, batch=1, device="cpu", nanogpt=None)


def test_a_cell_is_gib_and_the_share_of_the_first_side() -> None:
    assert cell(3 * GIB, 6 * GIB, 8 * GIB) == "3.00 (0.50)"
    assert cell(3 * GIB, None, 8 * GIB) == "3.00"
    assert cell(None, 6 * GIB, 8 * GIB) == "more than 8"


def test_a_side_takes_its_step() -> None:
    # 7.4M parameters of 4 bytes each: weight, gradient and two moments.
    assert step_alone("uncompiled:float32", CASE) > 4 * 4 * 7_200_000


@pytest.mark.slow
def test_each_side_is_measured_alone_and_within_the_limit() -> None:
    case = Case("tiny", block=1024, batch=2, device="cpu", nanogpt=None)
    full, chunked = (peak(f"{name}:float32", case, threads=1, limit=16 * GIB) for name in ("baseline", "uncompiled"))
    assert full is not None
    assert chunked is not None
    assert full - chunked > 2048 * 50257 * 4, "the logits"
    assert peak("baseline:float32", case, threads=1, limit=GIB) is None
    with pytest.raises(UserError, match="with --nanogpt"):
        peak("nanogpt:float32", case, threads=1, limit=16 * GIB)


@pytest.mark.slow
def test_the_table_of_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    argv = "memory --size tiny --blocks 16 32 --batches 1 --threads 1 --sides uncompiled"
    monkeypatch.setattr("sys.argv", argv.split())
    memory.main()
    rows = capsys.readouterr().out.split("\n\n")[1].splitlines()[2:]
    assert [[cell.strip() for cell in row.split("|")[1:3]] for row in rows] == [["1", "16"], ["1", "32"]]
