import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.finished_runs import write_run
from tests.html_page import Page
from train.compare import __main__ as compare
from train.metrics.memory_profile import CATEGORIES, read_memory
from train.utils.errors import UserError

MIB = 2**20


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "draw", lambda runs: [])


def bytes_of(*mebibytes: int) -> dict[str, int]:
    return dict(zip(CATEGORIES, (MIB * number for number in mebibytes), strict=True))


def memory(logits: int = 40, **changed: Any) -> dict[str, Any]:
    """What `--profile` writes of a run whose step has two phases."""
    phases = [
        {"phase": "forward", "event": 1, **bytes_of(10, 0, 20, 5, logits, 0)},
        {"phase": "optimizer", "event": 2, **bytes_of(*[1] * 6)},
    ]
    found = {"schema": 1, "peak_bytes": MIB * (35 + logits), "at_peak": bytes_of(10, 0, 20, 5, logits, 0)}
    return {**found, "over_step": phases, **changed}


def profiled(folder: Path, content: Any) -> Path:
    write_run(folder)
    (folder / "profile").mkdir()
    (folder / "profile" / "memory.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_categories_at_the_peak_and_over_a_step(tmp_path: Path) -> None:
    folders = [profiled(tmp_path / "a", memory()), write_run(tmp_path / "b"), profiled(tmp_path / "c", memory(0))]
    compare.main([*map(str, folders), "--out", str(tmp_path / "out")])
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "Memory" in page.texts["h2"]
    assert "tensors at the peak of a profiled step: a 75.0 MiB, c 35.0 MiB" in page.texts["small"]
    figures = [text for text in page.texts["text"] if "·" in text]
    assert figures == [
        "10.0 MiB · 10.0 MiB", "0.0 MiB · 0.0 MiB", "20.0 MiB · 20.0 MiB", "5.0 MiB · 5.0 MiB", "40.0 MiB · 0.0 MiB",
        "0.0 MiB · 0.0 MiB",
    ]  # fmt: skip
    assert {"Memory over a step: a", "Memory over a step: c"} <= set(page.texts["h3"])
    assert "Memory over a step: b" not in page.texts["h3"]
    assert "logits: 40.0 MiB at most" in page.texts["title"]
    assert "MiB of tensors, by what they are for" in page.texts["small"]
    assert {"forward", "optimizer"} <= set(page.texts["text"])
    # Halves of 410 units from 56 on; 75 MiB are 198 units: logits reach from 35 to 75 of them, then from 4 to 5.
    areas = [found["d"] or "" for found in page.drawn("path", "fill: var(--run4)")]
    [logits] = [path for path in areas if "56 10 L" in path]
    corners = {tuple(map(float, corner.split())) for corner in re.split("[MLz]", logits) if corner.strip()}
    assert corners == {(56, 10), (261, 10), (261, 194.8), (466, 194.8), (466, 197.4), (261, 197.4), (261, 115.6),
                       (56, 115.6)}  # fmt: skip


def test_a_step_without_points(tmp_path: Path) -> None:
    folders = [profiled(tmp_path / "a", memory(over_step=[])), write_run(tmp_path / "b")]
    compare.main([*map(str, folders), "--out", str(tmp_path / "out")])
    assert "nothing was measured" in Page((tmp_path / "out" / "report.html").read_text()).text("text")


def test_no_section_where_nothing_was_tracked(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    assert read_memory(folders[0]) is None
    compare.main([*map(str, folders), "--out", str(tmp_path / "out")])
    assert "Memory" not in Page((tmp_path / "out" / "report.html").read_text()).texts["h2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "broken JSON"),
        ('{"schema": 1', "broken JSON"),
        ("[]", "its content is [], not an object: it is not what python -m train --profile writes"),
        (memory(schema=2), "has schema 2; this version reads schema 1"),
        (memory(peak_bytes="much"), "\"peak_bytes\" is 'much', not a valid integer"),
        (memory(at_peak=None), '"at_peak" is None, not an object'),
        (memory(over_step={}), '"over_step" is {}, not a valid array'),
        (memory(over_step=[{"phase": "forward"}]), '"over_step.0.parameters" is missing'),
        (memory(over_step=[{"phase": "\ud800", "event": 1, **bytes_of(*[1] * 6)}]), "contains a lone surrogate"),
    ],
)
def test_a_foreign_or_broken_file_is_named_before_anything_is_written(
    content: Any, message: str, tmp_path: Path
) -> None:
    folders = [profiled(tmp_path / "a", content), write_run(tmp_path / "b")]
    with pytest.raises(UserError) as caught:
        compare.main([*map(str, folders), "--out", str(tmp_path / "out")])
    assert str(caught.value).startswith(str(folders[0] / "profile" / "memory.json"))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
