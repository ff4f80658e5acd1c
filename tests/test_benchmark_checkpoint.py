"""The benchmark of checkpoints: its sides write the same bytes, and leave nothing behind."""

from pathlib import Path

import pytest

from benchmarks import checkpoint


def test_the_table_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", f"checkpoint --size tiny --rounds 1 --folder {tmp_path}".split())
    checkpoint.main()
    head, table = capsys.readouterr().out.split("\n\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert "tiny: 0.09 GB of weights and moments" in head
    assert [row[0] for row in rows] == [
        "while training waits",
        "in the background",
        "safetensors' `save_file`",
        "`dd`",
    ]
    assert rows[0][1] == rows[0][4], "training waits until it is complete"
    assert not list(tmp_path.iterdir())
