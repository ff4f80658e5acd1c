import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SCRIPTS = REPOSITORY / "train" / "evaluate_metrics"
METRICS = ("perplexity", "bits_per_byte", "token_accuracy")


def start(code: str, home: Path, cwd: Path) -> "subprocess.Popen[str]":
    """A Python process with its own Hugging Face home, so that nothing is left in anybody's, and no network."""
    cwd.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=cwd, env=environment, text=True, stdout=-1, stderr=-1, encoding="utf-8"
    )


def test_metrics_equal_hand_computation_and_leave_nothing_in_the_working_directory(tmp_path: Path) -> None:
    code = f"""
import evaluate
import torch
from train.evaluate_metrics import load_metric

def refused(metric, **nothing):
    try:
        metric.compute(**nothing)
    except ValueError as error:
        print(error)

metric = load_metric("perplexity")
for _ in range(2):  # the second round knows nothing of the first
    metric.add_batch(nll=[8.0], tokens=[4])
    metric.add(nll=1.0, tokens=2)
    print(metric.compute())
print(metric.compute(nll=[2000.0], tokens=[1])["perplexity"])
print(metric.compute(nll=[1.0, float("nan")], tokens=[1, 1])["val_loss"])
refused(metric, nll=[0.0], tokens=[0])

metric = load_metric("bits_per_byte")
metric.add_batch(nll=[8.0], bytes=[20])
metric.add(nll=1.0, bytes=6)
print(metric.compute())
refused(metric, nll=[0.0], bytes=[0])

metric = load_metric("token_accuracy")
metric.add_batch(predictions=torch.tensor([5, 6, 7, 8]), references=torch.tensor([5, 9, 7, -100]))
metric.add_batch(predictions=[1], references=[2])
print(metric.compute())
refused(metric, predictions=[-100], references=[-100])

for name in {METRICS!r}:
    print(isinstance(evaluate.load(f"{SCRIPTS}/{{name}}"), evaluate.Metric))
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
        "cannot compute the perplexity of zero tokens: add at least one batch with tokens before compute",
        f"{{'bits_per_byte': {9 / (math.log(2) * 26)}}}",
        "cannot compute bits per byte of zero bytes: add at least one batch with bytes before compute",
        f"{{'token_accuracy': {2 / 4}}}",  # of 4 labels; the fifth is -100
        "cannot compute accuracy over zero tokens: add at least one label other than -100 before compute",
        *["True"] * 3,
    ]
    assert list((tmp_path / "cwd").iterdir()) == []


def test_two_processes_give_the_corpus_mean(tmp_path: Path) -> None:
    code = """
import sys
from train.evaluate_metrics import load_metric

BATCHES = {{
    "perplexity": [[dict(nll=[10.0], tokens=[4]), dict(nll=[6.0], tokens=[2])], [dict(nll=[1.0], tokens=[2])]],
    "bits_per_byte": [[dict(nll=[10.0], bytes=[9]), dict(nll=[6.0], bytes=[5])], [dict(nll=[1.0], bytes=[6])]],
    "token_accuracy": [
        [dict(predictions=[1, 2], references=[1, -100]), dict(predictions=[3], references=[4])],
        [dict(predictions=[5, 6, 7], references=[5, 6, 8])],
    ],
}}
for name, batches in BATCHES.items():
    metric = load_metric(name, num_process=2, process_id={rank}, experiment_id="two", cache_dir={cache!r})
    for batch in batches[{rank}]:
        metric.add_batch(**batch)
    print(metric.compute())
"""
    cache = str(tmp_path / "shared")
    processes = [
        start(code.format(rank=rank, cache=cache), tmp_path / "home", tmp_path / f"cwd{rank}") for rank in range(2)
    ]
    results = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0].splitlines() == [
        f"{{'val_loss': 2.125, 'perplexity': {math.exp(2.125)}}}",  # 17 nats, 8 tokens
        f"{{'bits_per_byte': {17 / (math.log(2) * 20)}}}",
        f"{{'token_accuracy': {3 / 5}}}",
    ]
    assert results[1][0].splitlines() == ["None"] * 3
    assert list(Path(cache).rglob("*.arrow")) == []
    assert all(list((tmp_path / f"cwd{rank}").iterdir()) == [] for rank in range(2))


@pytest.mark.parametrize("name", METRICS)
def test_the_scripts_travel_alone(name: str) -> None:
    """`evaluate` copies each away from its package and reads its imports line by line."""
    lines = (SCRIPTS / name / f"{name}.py").read_text().splitlines()
    imports = {line for line in lines if line.startswith(("import ", "from "))}
    assert imports <= {"import math", "import datasets", "import evaluate", "import numpy as np"}


@pytest.mark.parametrize("name", METRICS)
def test_the_scripts_ship_in_the_wheel(name: str) -> None:
    setuptools = pytest.importorskip("setuptools")
    packages = setuptools.find_packages(str(REPOSITORY), include=["train", "train.*"])
    assert f"train.evaluate_metrics.{name}" in packages
