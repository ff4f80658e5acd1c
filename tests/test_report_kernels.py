# ruff: noqa: RUF001 (the multiplication sign is what the page writes)
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.finished_runs import write_run
from tests.html_page import Page
from tests.test_kernels import gpu_trace, write_trace
from train.checkpoints.run_folder import read_run
from train.compare import __main__ as compare
from train.compare.figures import UNKNOWN
from train.compare.report.kernels import decades, read_kernels
from train.utils.errors import UserError


def piece(phase: str, stage: int | None, micro_batch: int | None, start: float, end: float) -> dict[str, Any]:
    return {"phase": phase, "stage": stage, "micro_batch": micro_batch, "start": start, "end": end}


PIPELINE: dict[str, Any] = {
    "schedule": "1f1b", "stages": 2, "micro_batches": 8, "idle_share": 1 / 3, "theory": 0.3, "one_clock": False,
    "rows": [
        {"rank": 0, "pieces": [piece("data", None, None, 0.0, 0.01), piece("forward", 0, 7, 0.01, 0.03)]},
        {"rank": 1, "pieces": [piece("forward", 1, 0, 0.03, 0.0301), piece("backward", 2, 0, 0.04, 0.08)]},
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "draw", lambda runs: {})


def kernels(product: float, gaps: float = 0.01, peak: float | None = None, **changed: Any) -> dict[str, Any]:
    """What `train.kernels` writes of a run with one matrix product and a gap, in seconds of a step."""
    mm = {"module": "transformer.h.*.mlp", "phase": "forward", "category": "matrix products", "operator": "aten::mm"}
    gap = {"module": "", "phase": "optimizer", "category": "idle and launch gaps", "operator": "between operators"}
    rows = [{**mm, "seconds": product, "launches": 24}, {**gap, "seconds": gaps, "launches": 0}]
    rows = [{**row, "kernel": ""} for row in rows]
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
    facts = {"run_type": "a", "tokens_per_step": 1000, "block_size": 250}
    return {"schema": 1, "runs": [{"facts": facts} | run | changed], "comparison": None}


def finished(folder: Path) -> Path:
    return write_run(folder, run_type="a")


def profiled(folder: Path, content: dict[str, Any]) -> Path:
    finished(folder)
    (folder / "profile").mkdir()
    (folder / "profile" / "kernels.json").write_text(json.dumps(content))
    return folder


def report(folders: list[Path], out: Path) -> Page:
    compare.main([*map(str, folders), "--out", str(out)])
    return Page((out / "report.html").read_text())


def test_no_section_where_no_run_was_profiled(tmp_path: Path) -> None:
    folders = [finished(tmp_path / "a"), write_run(tmp_path / "b")]
    assert "Kernels" not in report(folders, tmp_path / "out").texts["h2"]
    assert read_kernels(read_run(folders[0], "a")) is None


def test_which_operator_made_the_difference(tmp_path: Path) -> None:
    folders = [
        profiled(tmp_path / "a", kernels(0.2)),
        finished(tmp_path / "b"),
        profiled(tmp_path / "c", kernels(0.05, gaps=0.012)),
    ]
    page = report(folders, tmp_path / "out")
    assert (
        "A profiled step of c takes 62.00 ms, of a 210: 3.39× as fast. Saved, and the share of the gain: "
        "transformer.h.*.mlp, forward: matrix products +150 ms (101%); optimizer: idle and launch gaps -2.00 ms (-1%)."
    ) in page.texts["p"]
    [sentence] = [found for found in page.texts["p"] if found.startswith("A profiled step")]
    assert f"\n## Kernels\n\n{sentence}\n" in (tmp_path / "out" / "report.md").read_text()
    assert "Not profiled: b." in page.text("small")
    cells = page.texts["td"]
    places, operators = (index - 2 for index, found in enumerate(cells) if found == "+150")
    assert cells[places : places + 6] == ["200", "50.00", "+150", "101.4%", "24 → 24", "aten::mm"]
    assert cells[places + 6 : places + 12] == ["10.00", "12.00", "-2.00", "-1.4%", "0 → 0", "between operators"]
    assert cells[operators : operators + 6] == ["200", "50.00", "+150", "10.00", "12.00", "-2.00"]
    assert "transformer.h.*.mlp, forward: matrix products" in page.texts["th"]
    assert "between operators in optimizer" in page.texts["th"]
    assert {"matrix products", "idle and launch gaps", "200 · 50.00 ms", "10.00 · 12.00 ms"} <= {
        *page.texts["span"], *page.texts["strong"],
    }  # fmt: skip
    assert "What made the difference, in ms a step" in page.texts["h3"]


def test_other_kernels_of_the_same_work_are_in_one_row(tmp_path: Path) -> None:
    contents = []
    for operator, seconds in (("aten::bmm", 0.3), ("aten::_scaled_dot_product_flash_attention", 0.1)):
        content = kernels(0.2)
        row = {"module": "transformer.h.*.attn", "phase": "forward", "category": "attention", "operator": operator}
        content["runs"][0]["rows"].append({**row, "kernel": "", "seconds": seconds, "launches": 2})
        contents.append(content)
    folders = [profiled(tmp_path / name, content) for name, content in zip("ab", contents, strict=True)]
    page = report(folders, tmp_path / "out")
    cells = page.texts["td"]
    start = cells.index("300")
    words = "aten::bmm → aten::_scaled_dot_product_flash_attention"
    assert cells[start : start + 6] == ["300", "100", "+200", UNKNOWN, "2 → 2", words]


def test_traces_alone_are_enough_and_newer_ones_count(tmp_path: Path) -> None:
    folders = [finished(tmp_path / "a"), write_run(tmp_path / "b")]
    content = gpu_trace()
    content["gpt2flash"] |= {"run_type": "a", "tokens_per_step": 1000, "block_size": 250}
    trace = write_trace(folders[0], content)
    page = report(folders, tmp_path / "out")
    made = folders[0] / "profile" / "kernels.json"
    assert "transformer.h.*.attn, forward: attention" in page.texts["th"]
    first = made.read_bytes()
    assert json.loads(first)["runs"][0]["label"] == "a"
    made.write_text(json.dumps(kernels(0.2)))
    assert read_kernels(read_run(folders[0], "a")) == kernels(0.2)["runs"][0], "newer than the trace: taken as it is"
    os.utime(trace, ns=(2**62, 2**62))
    read_kernels(read_run(folders[0], "a"))
    assert made.read_bytes() == first, "older than the trace: made anew"


def test_a_damaged_trace_is_named_before_anything_is_written(tmp_path: Path) -> None:
    folders = [finished(tmp_path / "a"), write_run(tmp_path / "b")]
    trace = write_trace(folders[1], gpu_trace())
    trace.write_bytes(trace.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"rank-0.json.gz: is cut short"):
        compare.main([*map(str, folders), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_pipeline_at_work(tmp_path: Path) -> None:
    content = kernels(0.1, pipeline=PIPELINE)
    folders = [profiled(tmp_path / "a", content), profiled(tmp_path / "b", kernels(0.1, pipeline=None))]
    page = report(folders, tmp_path / "out")
    assert "The pipeline of a: 33.3% idle" in page.texts["h3"]
    assert "The pipeline of b" not in page.text("h3")
    assert "30.0% in theory with all stages alike; rows of several machines" in page.text("small")
    assert {"stage 0", "stages 1, 2", "7"} <= set(page.texts["text"])
    assert "forward 7: 20.00 ms from 10.00 ms" in page.texts["title"]
    assert page.count("rect", class_="bar run1 way-back") == 1
    unlike = kernels(0.1, pipeline={**PIPELINE, "theory": None, "one_clock": True})
    (folders[0] / "profile" / "kernels.json").write_text(json.dumps(unlike))
    page = report(folders, tmp_path / "out")
    assert "in theory" not in page.text("small")
    assert "several machines" not in page.text("small")


def test_the_roofline(tmp_path: Path) -> None:
    known = [profiled(tmp_path / name, kernels(seconds, peak=1e12)) for name, seconds in (("a", 0.2), ("b", 0.05))]
    page = report(known, tmp_path / "out")
    assert page.count("path", class_="roof") == 1
    assert "aten::mm in transformer.h.*.mlp, forward: 40.0 GFLOP/s, 83.3% of a step" in page.texts["title"]
    unknown = [profiled(tmp_path / "c", kernels(0.2)), finished(tmp_path / "d")]
    page = report(unknown, tmp_path / "out")
    assert page.count("path", class_="roof") == 0
    assert "the device's peak is not known" in page.text("small")
    assert "What takes longest, in ms a step" in page.texts["h3"]


def test_a_run_without_points_and_rows(tmp_path: Path) -> None:
    empty = kernels(0.1, rows=[], categories=[])
    empty["runs"][0]["roofline"]["points"] = []
    page = report([profiled(tmp_path / "a", empty), profiled(tmp_path / "b", empty)], tmp_path / "out")
    assert "nothing was measured" in page.text("text")


def test_names_from_a_trace_are_text(tmp_path: Path) -> None:
    hostile = "</td><script>alert(1)</script>"
    row = {"module": hostile, "phase": hostile, "category": hostile, "operator": hostile, "kernel": hostile}
    row |= {"seconds": 0.1, "launches": 1}
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
        (json.dumps(kernels(0.1, facts={})), '"facts" has None for run_type'),
        (
            json.dumps(kernels(0.1, facts={"run_type": "a", "tokens_per_step": 9, "block_size": 250})),
            "is of another run: its tokens_per_step is 9, and 1000 in the run's metrics.json",
        ),
        (json.dumps(kernels(0.1, categories=None)), '"categories" has None for category'),
        (json.dumps(kernels(0.1, pipeline=[])), '"pipeline" has None for stages'),
        (json.dumps(kernels(0.1, pipeline={**PIPELINE, "rows": 3})), '"pipeline.rows" is 3, not a list'),
        (json.dumps(kernels(0.1, pipeline={**PIPELINE, "one_clock": 1})), '"pipeline" has 1 for one_clock'),
        (
            json.dumps(kernels(0.1, pipeline={**PIPELINE, "rows": [{"rank": 0, "pieces": [{"phase": "data"}]}]})),
            '"pipeline.rows.pieces" has None for start',
        ),
    ],
)
def test_a_foreign_or_broken_file_is_named_before_anything_is_written(content: str, said: str, tmp_path: Path) -> None:
    folders = [profiled(tmp_path / "a", kernels(0.1)), finished(tmp_path / "b")]
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
