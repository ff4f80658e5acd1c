# ruff: noqa: RUF001 (the multiplication sign is what the page writes)
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.finished_runs import write_run
from tests.html_page import Page
from tests.test_kernels import FACTS, gpu_trace, write_trace
from train.compare import __main__ as compare
from train.compare.figures import UNKNOWN
from train.compare.report.kernels import decades
from train.kernels.comparison import read_profile
from train.kernels.summary import SCHEMA, PipelineTimeline, ProcessTimeline, Row, Span
from train.utils.errors import UserError

METRICS = {"run_type": "a", "tokens_per_step": 1000, "block_size": 250}
RUN_FACTS = {key: value for key, value in (FACTS | METRICS).items() if key not in ("schema", "rank")}
PIPELINE = asdict(
    PipelineTimeline(
        schedule="1f1b",
        stages=2,
        micro_batches=8,
        idle_share=1 / 3,
        theory=0.3,
        steps=[1 / 3],
        one_clock=False,
        processes=[
            ProcessTimeline(0, [Span("data", None, None, 0.0, 0.01), Span("forward", 0, 7, 0.01, 0.03)]),
            ProcessTimeline(1, [Span("forward", 1, 0, 0.03, 0.0301), Span("backward", 2, 0, 0.04, 0.08)]),
        ],
    )
)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "draw", lambda runs: [])


def row(module: str, phase: str, category: str, operator: str, seconds: float, launches: float = 0) -> dict[str, Any]:
    names = (module, phase, category, operator, "")
    return asdict(Row(*names, seconds, seconds, launches, 0, 0, flops_per_second=None, bytes_per_second=None))


ROW = row("transformer.h.*.mlp", "forward", "matmul", "aten::mm", 0.1)


def kernels(matmul: float, gaps: float = 0.01, peak: float | None = None, **changed: Any) -> dict[str, Any]:
    """What `train.kernels` writes of a run with one matmul and a gap, in seconds of a step."""
    mm = row("transformer.h.*.mlp", "forward", "matmul", "aten::mm", matmul, launches=24)
    mm |= {"flops": 2e9, "bytes": 5e7, "flops_per_second": 2e9 / matmul, "bytes_per_second": 5e7 / matmul}
    gap = row("", "optimizer", "idle and launch gaps", "between operators", gaps)
    of_peak = {"peak_flops": peak, "peak_bytes_per_second": peak and peak / 100}
    run = {
        "label": "a",
        "path": "a",
        "processes": 1,
        "facts": {**RUN_FACTS, **of_peak},
        "step_seconds": matmul + gaps,
        "step_seconds_min": matmul,
        "step_seconds_max": 1.0,
        "attributed_share": 1.0,
        "unattributed_seconds": 0.0,
        "rows": [mm, gap],
        **{part: [] for part in ("categories", "phases", "modules", "layers")},
        "pipeline": None,
    }
    return {"schema": SCHEMA, "runs": [run | changed], "comparison": None}


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
    assert read_profile(folders[0], METRICS) is None


def test_which_operator_made_the_difference(tmp_path: Path) -> None:
    folders = [
        profiled(tmp_path / "a", kernels(0.2)),
        finished(tmp_path / "b"),
        profiled(tmp_path / "c", kernels(0.05, gaps=0.012)),
    ]
    page = report(folders, tmp_path / "out")
    assert (
        "A profiled step takes 62.00 ms in c and 210 ms in a: 3.39× as fast. Time saved, with its share of the gain: "
        "transformer.h.*.mlp, forward: matmul +150 ms (101%); optimizer: idle and launch gaps -2.00 ms (-1%). "
        "The largest change is aten::mm in transformer.h.*.mlp, forward: 200 ms, then 50.00 ms."
    ) in page.texts["p"]
    [sentence] = [found for found in page.texts["p"] if found.startswith("A profiled step")]
    assert f"\n## Kernels\n\n{sentence}\n" in (tmp_path / "out" / "report.md").read_text()
    assert "Not profiled: b." in page.text("small")
    cells = page.texts["td"]
    places, operators = (index - 2 for index, found in enumerate(cells) if found == "+150")
    assert cells[places : places + 6] == ["200", "50.00", "+150", "101.4%", "24 → 24", "aten::mm"]
    assert cells[places + 6 : places + 12] == ["10.00", "12.00", "-2.00", "-1.4%", "0 → 0", "between operators"]
    assert cells[operators : operators + 6] == ["200", "50.00", "+150", "10.00", "12.00", "-2.00"]
    assert "transformer.h.*.mlp, forward: matmul" in page.texts["th"]
    assert "between operators in optimizer" in page.texts["th"]
    assert {"matmul", "idle and launch gaps", "200 · 50.00 ms", "10.00 · 12.00 ms"} <= {
        *page.texts["text"],
    }  # fmt: skip
    assert "What made the difference, in ms per step" in page.texts["h3"]


def test_other_kernels_of_the_same_work_are_in_one_row(tmp_path: Path) -> None:
    contents = []
    for operator, seconds in (("aten::bmm", 0.3), ("aten::_scaled_dot_product_flash_attention", 0.1)):
        content = kernels(0.2)
        content["runs"][0]["rows"].append(row("transformer.h.*.attn", "forward", "attention", operator, seconds, 2))
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
    content["gpt2flash"] |= METRICS
    trace = write_trace(folders[0], content)
    page = report(folders, tmp_path / "out")
    made = folders[0] / "profile" / "kernels.json"
    assert "transformer.h.*.attn, forward: attention" in page.texts["th"]
    first = made.read_bytes()
    assert json.loads(first)["runs"][0]["label"] == "a"
    made.write_text(json.dumps(kernels(0.2)))
    found = read_profile(folders[0], METRICS)
    assert found is not None
    assert asdict(found) == kernels(0.2)["runs"][0], "newer than the trace: taken as it is"
    os.utime(trace, ns=(2**62, 2**62))
    read_profile(folders[0], METRICS)
    assert made.read_bytes() == first, "older than the trace: made anew"


def test_a_damaged_trace_is_named_before_anything_is_written(tmp_path: Path) -> None:
    folders = [finished(tmp_path / "a"), write_run(tmp_path / "b")]
    trace = write_trace(folders[1], gpu_trace())
    trace.write_bytes(trace.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"rank-0.json.gz: is not a complete trace"):
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
    [second_chunk] = page.drawn("path", "opacity: 0.6")
    assert "fill: var(--run1)" in (second_chunk["style"] or "")
    unlike = kernels(0.1, pipeline={**PIPELINE, "theory": None, "one_clock": True})
    (folders[0] / "profile" / "kernels.json").write_text(json.dumps(unlike))
    page = report(folders, tmp_path / "out")
    assert "in theory" not in page.text("small")
    assert "several machines" not in page.text("small")


def test_the_roofline(tmp_path: Path) -> None:
    known = [profiled(tmp_path / name, kernels(seconds, peak=1e12)) for name, seconds in (("a", 0.2), ("b", 0.05))]
    page = report(known, tmp_path / "out")
    assert len(page.drawn("path", "stroke: var(--ink)")) == 1
    assert "aten::mm in transformer.h.*.mlp, forward: 40.0 GFLOP/s, 83.3% of a step" in page.texts["title"]
    unknown = [profiled(tmp_path / "c", kernels(0.2)), finished(tmp_path / "d")]
    page = report(unknown, tmp_path / "out")
    assert not page.drawn("path", "stroke: var(--ink)")
    assert "the device's peak is not known" in page.text("small")
    assert "What takes longest, in ms per step" in page.texts["h3"]


def test_a_run_without_points_and_rows(tmp_path: Path) -> None:
    empty = kernels(0.1, rows=[])
    page = report([profiled(tmp_path / "a", empty), profiled(tmp_path / "b", empty)], tmp_path / "out")
    assert "nothing was measured" in page.text("text")


def test_names_from_a_trace_are_text(tmp_path: Path) -> None:
    hostile = "</td><script>alert(1)</script>"
    content = kernels(0.1, rows=[{**row(*[hostile] * 4, 0.1, 1), "kernel": hostile}])
    page = report([profiled(tmp_path / "a", content), profiled(tmp_path / "b", kernels(0.1))], tmp_path / "out")
    assert page.count("script") == 1
    assert f"{hostile} ({hostile}) in {hostile}, {hostile}" in page.texts["th"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is JSON, but not what python -m train.kernels writes"),
        ('{"schema": 1, "runs": []}', "is JSON, but not what python -m train.kernels writes"),
        ('{"schema": 1, "runs": [{}]}', "has schema 1 and 1 runs; this version reads schema 2 of one run"),
        ('{"schema": 2, "runs": [{}, {}]}', "has schema 2 and 2 runs"),
        ('{"schema": 2, "runs": [{}]}', '"runs.0.label" is missing: it is not what python -m train.kernels writes'),
        ('{"schema": 2, "runs"', "broken JSON"),
        ("", "broken JSON"),
        (json.dumps(kernels(0.1, step_seconds=0)), "its steps take 0 seconds"),
        (json.dumps(kernels(0.1, rows=[{"seconds": "long"}])), '"runs.0.rows.0.module" is missing'),
        (
            json.dumps(kernels(0.1, rows=[{**ROW, "seconds": "long"}])),
            "\"runs.0.rows.0.seconds\" is 'long', not a valid number",
        ),
        (json.dumps(kernels(0.1, facts={})), '"runs.0.facts.run_type" is missing'),
        (
            json.dumps(kernels(0.1, facts={**RUN_FACTS, "tokens_per_step": 9})),
            "belongs to a different run: its tokens_per_step is 9, but 1000 in the run's metrics.json",
        ),
        (json.dumps(kernels(0.1, categories=None)), '"runs.0.categories" is None, not a valid array'),
        (json.dumps(kernels(0.1, pipeline=[])), '"runs.0.pipeline" is [], not an object'),
        (
            json.dumps(kernels(0.1, pipeline={**PIPELINE, "processes": 3})),
            '"runs.0.pipeline.processes" is 3, not a valid array',
        ),
        (
            json.dumps(kernels(0.1, pipeline={**PIPELINE, "one_clock": 1})),
            '"runs.0.pipeline.one_clock" is 1, not a valid boo',
        ),
        (
            json.dumps(kernels(0.1, pipeline={**PIPELINE, "processes": [{"rank": 0, "spans": [{"phase": "data"}]}]})),
            '"runs.0.pipeline.processes.0.spans.0.stage" is missing',
        ),
    ],
)
def test_a_foreign_or_broken_file_is_named_before_anything_is_written(
    content: str, message: str, tmp_path: Path
) -> None:
    folders = [profiled(tmp_path / "a", kernels(0.1)), finished(tmp_path / "b")]
    path = folders[0] / "profile" / "kernels.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        compare.main([*map(str, folders), "--out", str(tmp_path / "out")])
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_decades() -> None:
    assert decades([2.0, 300.0]) == (0, 3)
    assert decades([5.0]) == (0, 1)
    assert decades([10.0]) == (1, 2)
