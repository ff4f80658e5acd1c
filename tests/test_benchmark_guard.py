"""The benchmark of guards and digests: both are measured, and are a part of the step."""

from pathlib import Path

from tests.forks import run_module


def test_the_table_of_a_run(tmp_path: Path) -> None:
    done = run_module(
        "benchmarks.guard", ["--size", "tiny", "--block", "16", "--batch", "1", "--rounds", "2"], tmp_path, check=True
    )
    head, table = done.stdout.split("\n\n")
    assert "tiny, 1 x 16 tokens" in head
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["guard", "digests"]
    assert all(0 < float(row[2].removesuffix("%")) < 100 for row in rows)
