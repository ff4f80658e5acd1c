import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "train" / "evaluate_metrics" / "perplexity"


def start(code: str, home: Path, cwd: Path) -> "subprocess.Popen[str]":
    """A Python process with its own Hugging Face home, so that nothing is left in anybody's, and no network."""
    cwd.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1, encoding="utf-8"
    )


def test_metric_equals_hand_computation_and_leaves_nothing_in_the_working_directory(tmp_path: Path) -> None:
    code = f"""
import evaluate
from train.evaluate_metrics import load_perplexity_metric

metric = load_perplexity_metric()
for _ in range(2):  # the second round knows nothing of the first
    metric.add_batch(nll=[8.0], tokens=[4])
    metric.add(nll=1.0, tokens=2)
    print(metric.compute())
print(metric.compute(nll=[2000.0], tokens=[1])["perplexity"])
print(metric.compute(nll=[1.0, float("nan")], tokens=[1, 1])["val_loss"])
try:
    metric.compute(nll=[0.0], tokens=[0])
except ValueError as error:
    print(error)
print(isinstance(metric, evaluate.Metric), isinstance(evaluate.load({str(SCRIPT)!r}), evaluate.Metric))
"""
    process = start(code, tmp_path / "home", tmp_path / "cwd")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err == ""
    by_hand = f"{{'val_loss': 1.5, 'perplexity': {math.exp(1.5)}}}"  # 9 nats over 6 tokens, not (2 + 0.5) / 2
    assert out.splitlines() == [
        by_hand,
        by_hand,
        "inf",
        "nan",
        "perplexity of no tokens: add at least one batch with tokens before compute",
        "True True",
    ]
    assert list((tmp_path / "cwd").iterdir()) == []


def test_two_processes_give_the_corpus_mean(tmp_path: Path) -> None:
    code = """
import sys
from train.evaluate_metrics import load_perplexity_metric

rank = {rank}
metric = load_perplexity_metric(num_process=2, process_id=rank, experiment_id="two", cache_dir={cache!r})
for nll, tokens in [[(10.0, 4), (6.0, 2)], [(1.0, 2)]][rank]:
    metric.add_batch(nll=[nll], tokens=[tokens])
print(metric.compute())
"""
    cache = str(tmp_path / "shared")
    processes = [
        start(code.format(rank=rank, cache=cache), tmp_path / "home", tmp_path / f"cwd{rank}") for rank in range(2)
    ]
    results = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0].strip() == f"{{'val_loss': 2.125, 'perplexity': {math.exp(2.125)}}}"  # 17 nats, 8 tokens
    assert results[1][0].strip() == "None"
    assert list(Path(cache).rglob("*.arrow")) == []
    assert all(list((tmp_path / f"cwd{rank}").iterdir()) == [] for rank in range(2))


def test_the_script_travels_alone() -> None:
    """`evaluate` copies it away from its package and reads its imports line by line."""
    imports = [
        line for line in (SCRIPT / "perplexity.py").read_text().splitlines() if line.startswith(("import ", "from "))
    ]
    assert imports == ["import math", "import datasets", "import evaluate"]


def test_the_script_ships_in_the_wheel() -> None:
    setuptools = pytest.importorskip("setuptools")
    packages = setuptools.find_packages(str(REPOSITORY), include=["train", "train.*"])
    assert "train.evaluate_metrics.perplexity" in packages
