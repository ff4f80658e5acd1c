# ruff: noqa: RUF001 (the multiplication sign is what the page writes)
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.finished_runs import write_run
from tests.html_page import Page
from tests.test_kernels import FACTS
from tests.test_report_kernels import PIPELINE, kernels
from tests.test_report_memory import memory
from train.checkpoints.run_folder import read_runs
from train.compare import __main__ as compare
from train.compare import charts
from train.compare import figures as compare_figures

HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;\"'\x00\x1b[31m\u2028"
BROWSERS = [found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PNGs are not in the page."""
    monkeypatch.setattr(compare, "pngs", lambda charts: {})


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "baseline", wobble=0.02),
        write_run(tmp_path / "optimized", step_time=0.5, peak=2**28, val_loss=2.004, wobble=0.3),
        write_run(tmp_path / "other", step_time=0.25, config={"seed": 2, "learning_rate": 1e-3, "zero": 3}),
    ]


def report(folders: list[Path], out: Path, *flags: str) -> str:
    compare.main([*map(str, folders), "--out", str(out), *flags])
    return (out / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone(three: list[Path], tmp_path: Path) -> None:
    source = report(three, tmp_path / "out")
    page = Page(source)
    assert source.startswith("<!doctype html>")
    assert "://" not in source, "an address"
    assert not re.search(r"url\(|@import|@font-face", page.text("style"))
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "image", "base", "form", "a"}
        assert not {name for name in attributes if name.startswith("on") or name in {"src", "href"}}
        assert (attributes.get("xlink:href") or "#").startswith("#"), "a marker of the page itself"
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    assert [found for tag, found in page.elements if tag == "script"] == [
        {"type": "application/json", "id": "comparison"}
    ]
    assert "prefers-color-scheme: dark" in page.text("style")
    assert page.count("meta", name="viewport") == 1


def test_it_says_what_the_markdown_and_the_json_say(three: list[Path], tmp_path: Path) -> None:
    page = Page(report(three, tmp_path / "out"))
    data = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert json.loads(page.text("script")) == data
    assert page.texts["p"][:2] == [data["warnings"][0], data["verdict"]]
    for line in data["warnings"]:
        assert line in page.text("main")
    cells = set(page.texts["td"]) | set(page.texts["th"])
    exact = {float(found["value"] or "") for tag, found in page.elements if tag == "data" and not is_text(found)}
    for row in compare_figures.figure_rows(read_runs(three)):
        assert {row.title, *row.cells, *filter(None, row.changes)} <= cells
        assert {value for value in row.values if isinstance(value, float)} <= exact
    for spread in (spread for of_run in data["intervals"].values() for spread in of_run.values()):
        assert spread["median"] in exact
    for part in ("config", "model", "data", "hardware", "versions"):
        for entry in data["runs"]:
            for key, value in compare_figures.flatten(entry["summary"][part]).items():
                assert key in cells
                assert str(value) in cells or value is None


def is_text(attributes: dict[str, str | None]) -> bool:
    try:
        float(attributes["value"] or "")
    except ValueError:
        return True
    return False


def test_differences_are_marked(three: list[Path], tmp_path: Path) -> None:
    source = report(three, tmp_path / "out")
    marked = re.findall(r'<tr class="differs"><th>([^<]*)</th>', source)
    # Each stands among what differs and again in the whole table.
    assert sorted(marked) == sorted(["seed", "seed", "zero", "zero"])
    assert source.count('<tr class=""><th>learning_rate</th>') == 1
    assert Page(source).texts["summary"] == [
        "All 3 settings", "All the same: 5 entries", "All the same: 6 entries", "All the same: 2 entries",
        "All the same: 1 entries",
    ]  # fmt: skip


def test_the_tiles_answer_for_every_run(three: list[Path], tmp_path: Path) -> None:
    page = Page(report(three, tmp_path / "out"))
    assert page.texts["strong"][:8] == ["1.42×", "0.25×", "+0.004", "Yes", "4.12×", "1.00×", "+0.000", "No"]
    assert "other seed" in page.texts["small"]
    assert page.count("strong", class_="good") == 2 + 1
    assert page.count("strong", class_="bad") == 1


def test_curves_and_rows(three: list[Path], tmp_path: Path) -> None:
    page = Page(report(three, tmp_path / "out"))
    assert [title for title in page.texts["h3"] if " against " not in title][:7] == [
        "Training loss over tokens", "Training loss over time", "Validation loss", "Throughput",
        "Throughput over intervals", "Peak memory", "Time per epoch",
    ]  # fmt: skip
    pictures = [found["aria-label"] for tag, found in page.elements if tag == "svg" and "aria-label" in found]
    assert pictures == [title for title in page.texts["h3"] if " against " not in title][:7]
    for run in range(3):
        assert len(page.drawn("path", f"stroke: var(--run{run})")) == 4 + 4 + 1, "a curve, its key; the median"
        assert len(page.drawn("path", f"fill: var(--run{run})")) == 2, "bars"
        dots = page.drawn("use", f"fill: var(--run{run})")
        assert len(dots) == 2 + 10, "validations and intervals"
        assert sum("fill-opacity: 0.55" in (found["style"] or "") for found in dots) == 10, "intervals"
    assert "nan" not in " ".join(found.get("d") or "" for _, found in page.elements)


def test_everything_from_a_run_folder_is_text(tmp_path: Path) -> None:
    hostile: dict[str, Any] = {
        "config": {HOSTILE: HOSTILE, "list": [HOSTILE], "deep": {HOSTILE: 1}},
        "sample": {"prompt": HOSTILE, "text": HOSTILE},
        "attn_reason": HOSTILE,
        "attn_implementation": HOSTILE,
        "precision": HOSTILE,
        "hardware": {"cpu": HOSTILE},
        "versions": {"torch": HOSTILE},
        "data": {"train": {"path": HOSTILE}, "val": {"path": HOSTILE}},
        "run_type": HOSTILE,
        "measured": {"peak_memory_bytes": 1, "peak_memory_kind": HOSTILE, "peak_memory_reserved_bytes": None},
    }
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "<img src=x onerror=alert(3)>\"&'", **hostile)]
    source = report(folders, tmp_path / "out")
    page = Page(source)
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    assert page.text("pre").endswith(HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd"))
    assert json.loads(page.text("script")) == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "\x00" not in source
    assert "\x1b" not in source


def test_two_runs_have_no_headings_between_the_tiles_and_a_gate_is_shown(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="1"):
        compare.main([*map(str, three[:2]), "--out", str(tmp_path), "--gate", "val_loss<=+1,tokens_per_second>=9x"])
    page = Page((tmp_path / "report.html").read_text())
    assert "optimized against baseline" not in page.texts["h3"]
    assert page.count("li", class_="good") == 1
    assert page.count("li", class_="bad") == 1
    assert "gate MISSED: tokens_per_second>=9x" in page.text("li")


def test_runs_of_nothing_and_of_what_is_no_number(tmp_path: Path) -> None:
    none = write_run(tmp_path / "none", steps=2)
    summary = json.loads((none / "metrics.json").read_text())
    nothing = dict.fromkeys(["tokens_per_second", "time_per_epoch_seconds", "val_loss", "train_loss", "sample"])
    (none / "metrics.json").write_text(json.dumps({**summary, **nothing, "steps": 0}))
    (none / "metrics.jsonl").write_text("")
    diverged = write_run(tmp_path / "diverged", steps=2)
    record = {"step": 1, "tokens": None, "loss": None, "tokens_per_second": None, "step_time_seconds": None}
    (diverged / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (diverged / "metrics.json").write_text(json.dumps({**summary, "steps": 1}))
    page = Page(report([none, diverged], tmp_path / "out"))
    assert "nothing was measured" in page.text("text")
    assert "not measured" in page.text("text")
    assert "No sample was generated." in page.text("p")
    one = write_run(tmp_path / "one", steps=2)
    assert "too short to be split into intervals" in Page(report([one, none], tmp_path / "out")).text("small")


def test_long_curves_are_small_and_keep_their_peaks() -> None:
    y = np.random.default_rng(0).normal(size=100_000)
    y[77_777] = 99.0
    y[20_000:21_000] = math.nan
    figure, axes = charts.canvas(250)
    axes.plot(y, color=charts.color_of(0))
    axes.set_ylim(0, 99)
    source = charts.Chart("A chart", "", figure, ()).svg()
    [curve] = [found["d"] or "" for found in Page(source).drawn("path", "stroke: var(--run0)")]
    assert len(curve) < 50_000
    assert min(float(place) for place in re.findall(r"[ML] \S+ (\S+)", curve)) == charts.TOP
    assert curve.count("M") == 2, "a gap"


def test_a_figure_has_the_colors_and_fonts_of_the_page() -> None:
    figure, axes = charts.canvas(100, left=0, bottom=0, right=0)
    axes.axis("off")
    axes.set(xlim=(0, 480), ylim=(90, 0))
    axes.plot([0, 120, 240, 360, 480], [0, 45, math.nan, 0, 90], color=charts.color_of(1), linewidth=2, clip_on=False)
    axes.plot([240], [45], "s", color=charts.color_of(2), markersize=10, markeredgewidth=0, gid="mark", clip_on=False)
    charts.write(axes, 240, 45, "$x$ <&> \x00", ha="center", va="baseline")
    chart = charts.Chart(
        'A "chart"', "a note, not in the page", figure, ((1, "a"), (2, "b")), tooltips={"mark": "<tip>"}
    )
    chart.png()
    source = chart.svg()
    assert source.startswith('<svg viewBox="0 0 480 100" role="img" aria-label="A &quot;chart&quot;">')
    page = Page(source)
    [curve] = page.drawn("path", "stroke: var(--run1)")
    assert curve["d"] == "M 0 10 L 120 55 M 360 10 L 480 100"
    assert "<g><title>&lt;tip&gt;</title>" in source
    [mark] = page.drawn("use", "fill: var(--run2)")
    assert (mark["x"], mark["y"]) == ("240", "55")
    assert page.texts["text"] == ["$x$ <&> \ufffd"]
    assert page.drawn("text", "text-anchor: middle; fill: var(--quiet)")
    assert "font" not in source
    assert not re.search("#[0-9a-f]{6}[^0-9a-f]", source), "a color of its own"


@pytest.mark.skipif(not BROWSERS, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_lays_it_out_within_the_screen(three: list[Path], tmp_path: Path, width: int) -> None:
    for folder in three:
        facts = {**FACTS, "run_type": folder.name, "tokens_per_step": 1000, "block_size": 250}
        (folder / "profile").mkdir()
        (folder / "profile" / "kernels.json").write_text(json.dumps(kernels(0.1, facts=facts, pipeline=PIPELINE)))
        (folder / "profile" / "memory.json").write_text(json.dumps(memory()))
    source = report(three, tmp_path / "out")
    assert {"Kernels", "Memory"} <= set(Page(source).texts["h2"])
    # The page forbids scripts and frames; the copy that measures itself allows its own. A window of Chromium has at
    # least 500 pixels, so the phone is a frame in it.
    root = "document.documentElement"
    measure = f"<script>parent.postMessage({root}.scrollWidth - {root}.clientWidth, '*')</script></body>"
    copy = source.replace("default-src 'none';", "script-src 'unsafe-inline';").replace("</body>", measure)
    (tmp_path / "page.html").write_text(copy)
    (tmp_path / "frame.html").write_text(
        "<title></title><script>onmessage = (event) => { document.title = event.data }</script>"
        f'<iframe src="page.html" style="border: 0; width: {width}px; height: 800px"></iframe>'
    )
    with tempfile.TemporaryDirectory() as home:  # it puts a socket there, whose path may not be as long as pytest's
        words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}/browser", "--dump-dom"]
        done = subprocess.run(
            [BROWSERS[0], *words, "--virtual-time-budget=2000", (tmp_path / "frame.html").as_uri()],
            env={**os.environ, "HOME": home, "TMPDIR": home},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert "<title>0</title>" in done.stdout, done.stderr
