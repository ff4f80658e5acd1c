# ruff: noqa: RUF001 (the multiplication sign is what the tables write)
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from tests.finished_runs import write_run
from train.checkpoints import run_folder as compare_runs
from train.compare import __main__ as compare
from train.compare import run_charts
from train.utils.errors import UserError
from train.utils.units import short_count, unit_of

REPOSITORY = Path(__file__).parent.parent
PNGS = ["peak_memory.png", "throughput.png", "time_per_epoch.png", "training_loss.png", "validation_loss.png"]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """The second at half the step time and a quarter of the memory."""
    return [
        write_run(tmp_path / "baseline"),
        write_run(tmp_path / "optimized", step_time=0.5, peak=2**28, val_loss=2.004),
    ]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words alone: drawing takes most of a comparison's second."""
    monkeypatch.setattr(compare, "draw", lambda runs: [])


def run(folders: list[Path], out: Path) -> dict[str, Any]:
    compare.main([*map(str, folders), "--out", str(out)])
    # parse_constant is called for NaN and Infinity only, which strict JSON does not have
    return json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)


def test_changes_by_hand(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "comparison"
    data = run(two, out)
    changed = data["changes"]["optimized"]
    assert changed["tokens_per_second"] == {"percent": 100.0, "ratio": 2.0}
    assert changed["step_time_seconds.median"] == {"percent": -50.0, "ratio": 0.5}
    assert changed["time_per_epoch_seconds"] == {"percent": -50.0, "ratio": 0.5}
    assert changed["peak_memory_bytes"] == {"percent": -75.0, "ratio": 0.25}
    assert changed["val_loss"]["percent"] == pytest.approx(0.2)
    assert changed["perplexity"]["percent"] == pytest.approx(100 * (math.exp(0.004) - 1))
    assert changed["mfu"] is None
    assert data["comparable"] is True
    assert data["differences"] == []
    sentence = "optimized trains 2.00× as fast as baseline in 0.25× of the memory, validation loss +0.004."
    assert data["verdict"] == sentence
    printed = capsys.readouterr().out
    assert printed.startswith(sentence)
    rows = {
        row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in lines_of_table(printed)
    }
    assert rows[""] == ["baseline", "optimized", "change"]
    assert rows["Training throughput (tokens/s)"] == ["1,000", "2,000", "+100.0 % (2.00×)"]
    assert rows["Training throughput over intervals (tokens/s)"] == [
        "1,000 (1,000 … 1,000)",
        "2,000 (2,000 … 2,000)",
        "+100.0 % (2.00×)",
    ]
    assert rows["Step time, median (s)"] == ["1.000", "0.500", "-50.0 %"]
    assert rows["Time per epoch (s)"] == ["100.00", "50.00", "-50.0 %"]
    assert rows["Peak memory (GiB)"] == ["1.00", "0.25", "-75.0 % (0.25×)"]
    assert rows["Validation loss"] == ["2.0000", "2.0040", "+0.2 %"]
    assert rows["Inference throughput (tokens/s)"] == ["100.0", "100.0", "+0.0 % (1.00×)"]
    assert rows["MFU (%)"] == ["—", "—", "—"]
    assert rows["Optimizer steps"] == ["40", "40", "same"]
    assert rows["Attention kernel"] == ["sdpa", "sdpa", ""]


def lines_of_table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_table_is_aligned(two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(two, tmp_path / "out")
    table = lines_of_table(capsys.readouterr().out)
    assert len({len(line) for line in table}) == 1
    bars = {tuple(index for index, letter in enumerate(line) if letter == "|") for line in table}
    assert len(bars) == 1


def test_report_and_pictures(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(two, out)
    files = [*PNGS, "comparison.json", "report.html", "report.md"]
    assert sorted(path.name for path in out.iterdir()) == sorted(files)
    text = (out / "report.md").read_text()
    assert text.splitlines()[2] == (
        "**optimized trains 2.00× as fast as baseline in 0.25× of the memory, validation loss +0.004.**"
    )
    assert "The configurations agree." in text
    assert "````text\nupon a time\n```\ncode\n````" in text
    assert "Some CPU" in text
    assert "2.13.0" in text
    for name in PNGS:
        assert f"]({name})" in text
        pixels = matplotlib.image.imread(io.BytesIO((out / name).read_bytes()), format="png")
        assert pixels.shape[0] > 200
        assert pixels.shape[1] == 960
        assert (pixels[..., :3].min(axis=2) < 0.9).mean() > 0.02, f"{name} is blank"


def test_a_second_comparison_replaces_the_first(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(two, out)
    data = run(two[::-1], out)
    assert data["first"] == "optimized"
    assert len(list(out.iterdir())) == 8


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("changed", "key", "values"),
    [
        ({"tokens_per_step": 2000}, "tokens_per_step", ("1000", "2000")),
        ({"steps": 30}, "steps", ("40", "30")),
        ({"block_size": 125}, "block_size", ("250", "125")),
        ({"config": {"seed": 2}}, "seed", ("1", "2")),
        ({"config": {}}, "seed", ("1", "—")),
        (
            {"model": {"n_layer": 3, "n_head": 2, "n_embd": 8, "n_positions": 250, "vocab_size": 101}},
            "model.n_layer",
            ("2", "3"),
        ),
        (
            {"data": {"train": {"path": "train.bin", "tokens": 100_000, "sha256": "c" * 64}, "val": {}}},
            "train_data",
            ("train.bin (100,000 tokens, sha256 aaaaaaaaaaaa)", "train.bin (100,000 tokens, sha256 cccccccccccc)"),
        ),
        (
            {"data": {"train": {}, "val": {"path": "val.bin", "tokens": 999, "sha256": None}}},
            "val_data",
            ("val.bin (1,000 tokens)", "val.bin (999 tokens)"),
        ),
    ],
)
def test_different_work_is_said_on_top(
    changed: dict[str, Any],
    key: str,
    values: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = [write_run(tmp_path / "baseline"), write_run(tmp_path / "optimized", **changed)]
    data = run(folders, tmp_path / "out")
    warning = f"NOT COMPARABLE: {key}: baseline {values[0]}, optimized {values[1]}"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("NOT COMPARABLE: ")
    assert warning in printed
    assert printed.index(warning) < printed.index(next(line for line in printed if line.startswith("|")))
    text = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert text[2].startswith("> **NOT COMPARABLE: ")
    assert f"> **{warning}**  " in text
    assert data["comparable"] is False
    assert data["verdict"].startswith("Not comparable (")
    assert key in [difference["key"] for difference in data["differences"] if difference["kind"] == "comparability"]


@pytest.mark.usefixtures("no_pictures")
def test_the_same_data_under_another_path_is_the_same_data(tmp_path: Path) -> None:
    moved = {
        "train": {"path": "elsewhere/train.bin", "tokens": 100_000, "sha256": "a" * 64},
        "val": {"path": "elsewhere/val.bin", "tokens": 1000, "sha256": "b" * 64},
    }
    data = run([write_run(tmp_path / "a"), write_run(tmp_path / "b", data=moved)], tmp_path / "out")
    assert data["comparable"] is True


@pytest.mark.usefixtures("no_pictures")
def test_other_validation_data_gives_no_difference_in_loss(tmp_path: Path) -> None:
    other = {"train": {"path": "t", "tokens": 1, "sha256": "a" * 64}, "val": {"path": "v", "sha256": "d" * 64}}
    data = run([write_run(tmp_path / "a"), write_run(tmp_path / "b", data=other)], tmp_path / "out")
    assert "validation losses are of different data" in data["verdict"]


@pytest.mark.usefixtures("no_pictures")
def test_another_machine_is_said_but_the_work_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = {"peak_memory_bytes": 2**30, "peak_memory_kind": "cuda_allocated", "peak_memory_reserved_bytes": 2**31}
    gpu = {"cpu": "Some CPU", "gpus": [{"name": "NVIDIA H200"}]}
    elsewhere = {"hardware": gpu, "versions": {"torch": "2.14.0"}, "world_size": 4, "measured": memory}
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **elsewhere)]
    data = run(folders, tmp_path / "out")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Different environment: world_size: a 1, b 4"
    assert "Different environment: versions.torch: a 2.13.0, b 2.14.0" in printed
    assert 'Different environment: hardware.gpus: a [], b [{"name": "NVIDIA H200"}]' in printed
    assert data["comparable"] is True
    assert data["changes"]["b"]["peak_memory_bytes"] is None  # a process's memory is not a GPU's
    assert "memory not comparable" in data["verdict"]


@pytest.mark.usefixtures("no_pictures")
def test_configuration_differences_side_by_side(tmp_path: Path) -> None:
    settings = {"seed": 1, "learning_rate": 3e-3, "deepspeed_config": "ds|config.json"}
    data = run([write_run(tmp_path / "a"), write_run(tmp_path / "b", config=settings)], tmp_path / "out")
    assert data["comparable"] is True
    assert data["configuration_differences"] == {
        "learning_rate": {"a": 0.001, "b": 0.003},
        "deepspeed_config": {"a": None, "b": "ds|config.json"},
    }
    assert "ds\\|config.json" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_three_runs_and_equal_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        write_run(tmp_path / "baseline"),
        write_run(tmp_path / "a" / "optimized", step_time=0.5),
        write_run(tmp_path / "b" / "optimized", step_time=0.25),
    ]
    data = run(folders, tmp_path / "out")
    assert [entry["label"] for entry in data["runs"]] == ["baseline", "a/optimized", "b/optimized"]
    assert data["changes"]["a/optimized"]["tokens_per_second"]["ratio"] == 2.0
    assert data["changes"]["b/optimized"]["tokens_per_second"]["ratio"] == 4.0
    assert "a/optimized trains 2.00× as fast as baseline" in data["verdict"]
    assert "; b/optimized trains 4.00× as fast as baseline" in data["verdict"]
    header = lines_of_table(capsys.readouterr().out)[0]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        "baseline",
        "a/optimized",
        "change",
        "b/optimized",
        "change",
    ]


def test_a_run_that_diverged_or_was_never_validated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = write_run(tmp_path / "bad", val_loss=math.nan)
    summary = json.loads((bad / "metrics.json").read_text())
    (bad / "metrics.json").write_text(json.dumps({**summary, "train_loss": math.nan}))  # NaN, as json.dumps writes it
    lines = (bad / "metrics.jsonl").read_text().splitlines()
    last = {**json.loads(lines[-1]), "loss": math.nan}
    (bad / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    data = run([write_run(tmp_path / "good"), bad], tmp_path / "out")
    assert data["warnings"] == [
        "Diverged: bad: the training loss of its last steps is not a number",
        "No validation loss: bad",
    ]
    assert "validation loss unknown" in data["verdict"]
    assert "Diverged: bad" in capsys.readouterr().out


def test_runs_of_one_step_and_of_none_are_drawn(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", steps=2)
    none = write_run(tmp_path / "none", steps=2)
    summary = json.loads((none / "metrics.json").read_text())
    nothing = dict.fromkeys(["tokens_per_second", "time_per_epoch_seconds", "val_loss", "train_loss"])
    (none / "metrics.json").write_text(json.dumps({**summary, **nothing, "steps": 0}))
    (none / "metrics.jsonl").write_text("")
    data = run([none, one], tmp_path / "out")
    assert "Short run: none: 0 steps say little about speed" in data["warnings"]
    assert "training speed unknown" in data["verdict"]


def test_repeated_steps_of_a_resumed_run_count_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with (folder / "metrics.jsonl").open("a") as file:
        again = {"step": 40, "tokens": 40_000, "loss": 1.5, "tokens_per_second": 1.0, "step_time_seconds": 1.0}
        file.write(json.dumps(again) + "\n")
    steps = compare_runs.read_run(folder, "a").steps
    assert [record["step"] for record in steps] == list(range(1, 41))
    assert steps[-1]["loss"] == 1.5


def test_lines_that_cannot_be_read_are_gaps_under_a_warning(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second")
    steps = second / "metrics.jsonl"
    lines = steps.read_bytes().splitlines()
    damaged = [*lines[:4], lines[4][:30], *lines[5:7], b"caf\xe9", *lines[8:-2]]  # steps 5, 8, 39 and 40 are lost
    steps.write_bytes(b"\n".join([*damaged, b"\0" * 100 + b"\n"]))
    data = run([first, second], tmp_path / "out")
    (warning,) = [line for line in data["warnings"] if "missing" in line]
    where = "second: 4 of 40 steps (5, 8, 39 to 40) have no record in"
    assert warning.startswith(f"Records missing: {where} {steps} (line 5, column ")
    found = compare_runs.read_run(second, "second").steps
    assert found[4] == {"step": 5}
    assert [record["step"] for record in found] == list(range(1, 41))


def refusal(folders: list[Path], out: Path) -> str:
    with pytest.raises(UserError) as caught:
        compare.main([*map(str, folders), "--out", str(out)])
    assert not out.exists(), "something was written"
    return str(caught.value)


def test_refused_too_few_twice_missing(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = two[0]
    assert refusal([], out).startswith("compare needs two run folders or more, not 0: python -m train.compare ")
    assert refusal([first], out).startswith("compare needs two run folders or more, not 1: ")
    assert refusal([first, first / "..", first], out).startswith(f"{first} is given twice")
    assert refusal([first, tmp_path / "x" / ".." / "baseline"], out).endswith("cannot be compared with itself")
    assert refusal([first, tmp_path / "missing"], out).startswith(f"{tmp_path / 'missing'} is not a folder: ")
    assert refusal([first, first / "metrics.json"], out).startswith(f"{first / 'metrics.json'} is not a folder")


def test_refused_unfinished_and_no_run(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = two
    (second / "metrics.json").unlink()
    assert refusal(two, out) == (
        f"{second} has no metrics.json: the run is unfinished (metrics.jsonl has 40 steps); let it end, or resume it"
    )
    (second / "metrics.jsonl").unlink()
    assert refusal(two, out) == f"{second} has neither metrics.json nor metrics.jsonl: it is not a run folder"
    assert refusal([first, tmp_path], out).endswith(f"did you mean {first}?")
    (first / "metrics.jsonl").unlink()
    assert refusal(two, out).startswith(f"{first} has metrics.json but no metrics.jsonl")


def test_refused_broken_and_foreign_files(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary, steps = two[1] / "metrics.json", two[1] / "metrics.jsonl"
    whole = steps.read_text()
    lines = whole.splitlines()

    def of_other_runs(fault: str) -> str:
        return (
            f"{steps} has 0 steps ({fault}) and metrics.json sums up 40: they are from different runs, or incomplete; "
            "train it again"
        )

    steps.write_text("[1]")
    assert refusal(two, out) == of_other_runs('line 1: not a step of a run (an object with a "step")')
    steps.write_text('{"step": 1, "tokens": 2}\n')
    assert refusal(two, out) == of_other_runs('line 1: "loss" is missing')
    steps.write_text('\n{"step": 1, "tokens": 2, "loss": "low", "tokens_per_second": 1, "step_time_seconds": 1}\n')
    assert refusal(two, out) == of_other_runs("line 2: \"loss\" is 'low', not a number")
    steps.write_bytes(b"\xff\xfe")
    assert refusal(two, out) == of_other_runs("line 1: byte 0 is not UTF-8")
    steps.write_text("\n".join([*lines, lines[-1].replace('"step": 40', '"step": 41')]))
    assert refusal(two, out).startswith(
        f"{steps} has 41 steps and metrics.json sums up 40: they are from different runs"
    )
    steps.write_text(whole)

    good = json.loads(summary.read_text())
    summary.write_text('{\n  "schema": 1,\n  oops\n}')
    assert refusal(two, out).startswith(f"{summary}, line 3, column 3: broken JSON (")
    for foreign in ("[1, 2]", '{"name": "a package"}', "3"):
        summary.write_text(foreign)
        assert refusal(two, out).startswith(f"{summary} is JSON, but not the summary of a run")
    summary.write_text(json.dumps({**good, "schema": 2}))
    assert refusal(two, out) == f"{summary} has schema 2; this version reads schema 1"
    summary.write_text(json.dumps({key: value for key, value in good.items() if key not in ("mfu", "model")}))
    assert refusal(two, out) == f"{summary} lacks mfu, model: it is not a complete summary of a run"
    summary.write_text(json.dumps({**good, "val_loss": "low"}))
    assert refusal(two, out) == f"{summary}: \"val_loss\" is 'low', not a number or null"
    summary.write_text(json.dumps({**good, "step_time_seconds": {"median": "low"}}))
    assert refusal(two, out) == f"{summary}: \"step_time_seconds.median\" is 'low', not a number or null"
    summary.write_text(json.dumps({**good, "sample": {"text": "half \ud800"}}))
    assert refusal(two, out) == f"{summary} contains a lone surrogate (U+D800)"


def test_refused_out(two: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file: give a folder"):
        compare.main([*map(str, two), "--out", str(file)])
    with pytest.raises(UserError, match="cannot be written"):
        compare.main([*map(str, two), "--out", str(file / "below")])
    assert file.read_text() == "mine"


def test_command_line(two: list[Path], tmp_path: Path) -> None:
    def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "train.compare", *arguments], cwd=REPOSITORY, capture_output=True, encoding="utf-8"
        )

    done = command(*map(str, two), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("optimized trains 2.00× as fast")
    refused = command(str(two[0]))
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: compare needs two run folders or more, not 1")
    assert "Traceback" not in refused.stderr
    assert "python -m train.compare checkpoint/baseline checkpoint/optimized" in command("--help").stdout


def test_compare_needs_no_torch() -> None:
    code = "import sys, train.compare.__main__; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_trailing_mean_by_hand() -> None:
    got = run_charts.trailing_mean(np.array([1.0, 3.0, math.nan, 5.0, math.nan, math.nan]), 2)
    assert got[:5].tolist() == [1.0, 2.0, 3.0, 5.0, 5.0]
    assert math.isnan(got[5])
    assert short_count(1500) == "1.5K"
    assert short_count(2e9) == "2B"


@pytest.mark.parametrize(
    ("kind", "largest", "unit"),
    [
        ("seconds", 0.5, "ms"),
        ("seconds", 299, "s"),
        ("seconds", 600, "min"),
        ("seconds", 20_000, "h"),
        ("bytes", 2**30 - 1, "MiB"),
        ("bytes", 2**30, "GiB"),
        ("flops", 5e11, "GFLOP/s"),
        ("flops", 5e13, "TFLOP/s"),
        ("fraction", 0.4, "%"),
    ],
)
def test_units(kind: str, largest: float, unit: str) -> None:
    assert unit_of(kind, largest)[1] == unit
