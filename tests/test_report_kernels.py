# ruff: noqa: RUF001 (the multiplication sign is what the page writes)
import json
from pathlib import Path
from typing import Any

import pytest

from tests.finished_runs import write_run
from tests.html_page import Page
from train import compare
from train.errors import UserError
from train.report_kernels import decades, read_kernels


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "draw", lambda runs: {})


def kernels(product: float, gaps: float = 0.01, peak: float | None = None, **changed: Any) -> dict[str, Any]:
    """What `train.kernels` writes of a run with one matrix product and a gap, in seconds of a step."""
    mm = {"module": "transformer.h.*.mlp", "phase": "forward", "category": "matrix products", "operator": "aten::mm"}
    gap = {"module": "", "phase": "optimizer", "category": "idle and launch gaps", "operator": "between operators"}
    rows = [{**mm, "kernel": "", "seconds": product}, {**gap, "kernel": "", "seconds": gaps}]
    points = [{**rows[0], "intensity": 40.0, "flops_per_second": 2e9 / product}]
    run = {
        "step_seconds": {"mean": product + gaps, "min": product, "max": 1.0},
        "categories": [{"category": row["category"], "seconds": row["seconds"]} for row in rows],
        "rows": rows,
        "roofline": {
            "peak_flops": peak,
            "peak_bytes_per_second": peak and peak / 100,
            "points": [*points, {**points[0], "intensity": None}],
        },
    }
    return {"schema": 1, "runs": [run | changed], "comparison": None}


def profiled(folder: Path, content: dict[str, Any], **changed: Any) -> Path:
    write_run(folder, **changed)
    (folder / "profile").mkdir()
    (folder / "profile" / "kernels.json").write_text(json.dumps(content))
    return folder


def report(folders: list[Path], out: Path) -> Page:
    compare.main([*map(str, folders), "--out", str(out)])
    return Page((out / "report.html").read_text())


def test_no_section_where_no_run_was_profiled(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    assert "Kernels" not in report(folders, tmp_path / "out").texts["h2"]
    assert read_kernels(folders[0]) is None


def test_which_operator_made_the_difference(tmp_path: Path) -> None:
    folders = [
        profiled(tmp_path / "a", kernels(0.2)),
        write_run(tmp_path / "b"),
        profiled(tmp_path / "c", kernels(0.05, gaps=0.012)),
    ]
    page = report(folders, tmp_path / "out")
    assert (
        "A profiled step of c takes 62.00 ms, of a 210: 3.39× as fast. The largest change is aten::mm in "
        "transformer.h.*.mlp, forward: 200 ms, then 50.00."
    ) in page.texts["p"]
    assert "Not profiled: b." in page.text("small")
    cells = page.texts["td"]
    start = cells.index("+150") - 2
    assert cells[start : start + 6] == ["200", "50.00", "+150", "10.00", "12.00", "-2.00"]
    assert "between operators in optimizer" in page.texts["th"]
    assert {"matrix products", "idle and launch gaps", "200 · 50.00 ms", "10.00 · 12.00 ms"} <= {
        *page.texts["span"], *page.texts["strong"],
    }  # fmt: skip
    assert "What changed most, in ms" in page.texts["h3"]


def test_the_roofline(tmp_path: Path) -> None:
    known = [profiled(tmp_path / name, kernels(seconds, peak=1e12)) for name, seconds in (("a", 0.2), ("b", 0.05))]
    page = report(known, tmp_path / "out")
    assert page.count("path", class_="roof") == 1
    assert "aten::mm in transformer.h.*.mlp, forward: 40.0 GFLOP/s, 83.3% of a step" in page.texts["title"]
    unknown = [profiled(tmp_path / "c", kernels(0.2)), write_run(tmp_path / "d")]
    page = report(unknown, tmp_path / "out")
    assert page.count("path", class_="roof") == 0
    assert "the device's peak is not known" in page.text("small")
    assert "What takes longest, in ms" in page.texts["h3"]


def test_a_run_without_points_and_rows(tmp_path: Path) -> None:
    empty = kernels(0.1, rows=[], categories=[])
    empty["runs"][0]["roofline"]["points"] = []
    page = report([profiled(tmp_path / "a", empty), profiled(tmp_path / "b", empty)], tmp_path / "out")
    assert "nothing was measured" in page.text("text")


def test_names_from_a_trace_are_text(tmp_path: Path) -> None:
    hostile = "</td><script>alert(1)</script>"
    row = {"module": hostile, "phase": hostile, "operator": hostile, "kernel": hostile, "seconds": 0.1}
    content = kernels(0.1, rows=[row], categories=[{"category": hostile, "seconds": 0.1}])
    content["runs"][0]["roofline"]["points"] = [{**row, "intensity": 1.0, "flops_per_second": 1.0}]
    page = report([profiled(tmp_path / "a", content), profiled(tmp_path / "b", kernels(0.1))], tmp_path / "out")
    assert page.count("script") == 1
    assert f"{hostile} ({hostile}) in {hostile}, {hostile}" in page.texts["th"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "is JSON, but not what python -m train.kernels writes"),
        ('{"schema": 1, "runs": []}', "is JSON, but not what python -m train.kernels writes"),
        ('{"schema": 2, "runs": [{}]}', "has schema 2 and 1 runs; this version of compare reads schema 1 of one run"),
        ('{"schema": 1, "runs": [{}, {}]}', "has schema 1 and 2 runs"),
        ('{"schema": 1, "runs": [{}]}', '"step_seconds" has None for mean: it is not what train.kernels writes'),
        ('{"schema": 1, "runs"', "broken JSON"),
        ("", "broken JSON"),
        (json.dumps(kernels(0.1, step_seconds={"mean": 0})), "its steps take 0 seconds"),
        (json.dumps(kernels(0.1, rows=[{"seconds": "long"}])), '"rows" has None for module'),
        (json.dumps(kernels(0.1, categories=None)), '"categories" has None for category'),
    ],
)
def test_a_foreign_or_broken_file_is_named_before_anything_is_written(content: str, said: str, tmp_path: Path) -> None:
    folders = [profiled(tmp_path / "a", kernels(0.1)), write_run(tmp_path / "b")]
    path = folders[0] / "profile" / "kernels.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        compare.main([*map(str, folders), "--out", str(tmp_path / "out")])
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_decades() -> None:
    assert decades([2.0, 300.0]) == (0, 3)
    assert decades([5.0]) == (0, 1)
    assert decades([10.0]) == (1, 2)
