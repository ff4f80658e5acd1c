import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import finished_runs
from train.metrics import summary as metrics
from train.metrics.energy import GPUS, EnergyMeter
from train.metrics.hardware import hardware, torch_build, versions
from train.metrics.table import METRICS, Metric
from train.utils.files import json_safe, parse_json

MODEL = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}


def record(step: int, seconds: float, loss: float | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 1000 * step, "loss": loss, "step_time_seconds": seconds, **more}


def summary(records: list[dict[str, Any]], **changed: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"block_size": 1024, "model": MODEL, "world_size": 2, "tokens_per_epoch": 50_000}
    facts["config"] = {"seed": 1, "scale": math.inf}
    return finished_runs.summary(records, **{**facts, **changed})


def test_throughput_leaves_the_first_step_out() -> None:
    uneven = [record(1, 9.0, 1.0), record(2, 1.0, 1.0), record(3, 3.0, 1.0)]
    assert summary(uneven)["tokens_per_second"] == 500.0  # 2,000 tokens in 4 seconds, not 3,000 in 13
    assert summary([record(1, 2.0, 1.0)])["tokens_per_second"] == 500.0
    records = [record(1, 9.0, 1.0), record(2, 2.0, 1.0)]
    assert summary(records)["time_per_epoch_seconds"] == 100.0
    assert summary([])["time_per_epoch_seconds"] is None
    assert summary(records, tokens_per_epoch=None)["time_per_epoch_seconds"] is None


def test_step_time_percentiles() -> None:
    def of(times: list[float]) -> Any:
        return summary([record(step, seconds, 1.0) for step, seconds in enumerate(times, 1)])["step_time_seconds"]

    assert of([99.0, *[float(t) for t in range(11)]]) == {"median": 5.0, "p10": 1.0, "p90": 9.0}
    assert of([2.0]) == {"median": 2.0, "p10": 2.0, "p90": 2.0}
    assert of([]) == {"median": None, "p10": None, "p90": None}


def test_steps_under_the_profiler_are_in_the_training_time_alone() -> None:
    plain = [record(1, 9.0, 1.0, data_seconds=5.0), record(2, 1.0, 1.0, data_seconds=0.25)]
    plain += [record(3, 3.0, 1.0, data_seconds=0.75)]
    slow = record(4, 96.0, 1.0, data_seconds=90.0, profiled=True)
    found = summary([*plain, slow])
    for key in ("tokens_per_second", "step_time_seconds", "data_share", "time_per_epoch_seconds", "flops_per_second"):
        assert found[key] == summary(plain)[key], key
    assert found["training_time_seconds"] == 9 + 1 + 3 + 96
    assert found["steps"] == 4


def test_energy_is_for_each_token_of_its_steps() -> None:
    meter = EnergyMeter(lambda: 0.0)
    meter.joules, meter.steps = 600.0, 3
    device, alone = torch.device("cpu"), torch.clone
    found = summary([record(1, 1.0, 1.0)], measured=meter.metrics(device, alone, 1000))
    assert (found["energy_joules"], found["joules_per_token"], found["energy_covers"]) == (600.0, 0.2, GPUS)
    unknown = summary([record(1, 1.0, 1.0)], measured=EnergyMeter(None).metrics(device, alone, 1000))
    assert unknown["energy_joules"] is unknown["joules_per_token"] is unknown["energy_covers"] is None


def test_data_share() -> None:
    uneven = [(9.0, 5.0), (1.0, 0.25), (3.0, 0.75)]  # 1 of 4 seconds; the first step is left out
    assert summary([record(1, time, 1.0, data_seconds=wait) for time, wait in uneven])["data_share"] == 0.25
    assert summary([record(1, 2.0, 1.0, data_seconds=0.5)])["data_share"] == 0.25
    assert summary([])["data_share"] is None
    waits = [record(step, 2.0, 1.0, data_seconds=0.5) for step in range(1, 4)]
    assert summary(waits)["data_share"] == 0.25
    assert summary([record(1, 2.0, 1.0), *waits[1:]])["data_share"] == 0.25
    assert summary([waits[0], record(2, 2.0, 1.0)])["data_share"] is None, "not measured is not zero"


def test_latency_percentiles_by_hand() -> None:
    assert metrics.percentiles([float(value) for value in range(101)], p50=50, p95=95) == {"p50": 50.0, "p95": 95.0}
    assert metrics.percentiles([0.25], p50=50, p95=95) == {"p50": 0.25, "p95": 0.25}


def test_perplexity_and_what_json_cannot_hold() -> None:
    assert metrics.perplexity(math.log(50257)) == pytest.approx(50257)
    assert metrics.perplexity(1000.0) == math.inf
    assert math.isnan(metrics.perplexity(math.nan))
    value = {"a": [1.0, math.nan, (math.inf, {"b": -math.inf})], "c": "x", "d": True, "e": 3}
    assert json_safe(value) == {"a": [1.0, None, [None, {"b": None}]], "c": "x", "d": True, "e": 3}


def test_a_number_that_no_float_holds_is_read_as_null() -> None:
    assert parse_json("[1e999, -1e999, NaN, Infinity, 1e99]", Path("metrics.json")) == [None, None, None, None, 1e99]


def test_summary_by_hand() -> None:
    records = [record(step, 10.0 if step == 1 else 0.5, float(step)) for step in range(1, 21)]
    records[9]["val_loss"] = 7.0
    records[19]["val_loss"] = 2.0
    got = summary(records, device_peak_flops=1e12)
    assert got["steps"] == 20
    assert got["tokens"] == 20_000
    assert got["tokens_per_second"] == 2000.0
    assert got["time_per_epoch_seconds"] == 25.0
    assert got["training_time_seconds"] == 19.5  # 10 + 19 · 0.5
    assert got["step_time_seconds"] == {"median": 0.5, "p10": 0.5, "p90": 0.5}
    assert got["train_loss"] == 15.5  # mean of 11 … 20
    assert got["val_loss"] == 2.0
    assert got["perplexity"] == math.exp(2.0)
    assert got["inference_latency_seconds"] == 0.05
    assert got["flops_per_second"] == 854_438_400 * 2000
    assert got["mfu"] == pytest.approx(854_438_400 * 2000 / 2e12)
    assert got["hfu"] == got["mfu"] + 2 * 12 * 768 * 1024 * 2000 / 2e12, "sdpa computes the scores a second time"
    assert sum(got["flops_per_token_by_part"].values()) == got["hardware_flops_per_token"]
    assert got["config"] == {"seed": 1, "scale": None}
    json.dumps(got, allow_nan=False)


def test_summary_of_a_run_that_diverged_does_not_report_its_better_past() -> None:
    records = [record(1, 1.0, 3.0, val_loss=3.0), record(2, 1.0, None, val_loss=None)]
    got = summary(records)
    assert got["train_loss"] is None
    assert got["val_loss"] is None
    assert got["perplexity"] is None
    overflow = summary([record(1, 1.0, math.nan, val_loss=1000.0)])
    assert overflow["val_loss"] == 1000.0
    assert overflow["perplexity"] is None
    json.dumps([got, overflow], allow_nan=False)


def test_a_step_metric_of_the_table_is_summarized(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = Metric("grad_norm", "Gradient norm", "number", over_steps="mean")
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, norm))
    records = [record(step, 1.0, 1.0, grad_norm=float(step)) for step in range(1, 13)]
    assert summary(records)["grad_norm"] == 7.5  # mean of 3 … 12
    assert summary([record(1, 1.0, 1.0)])["grad_norm"] is None


def test_summary_of_no_steps_is_complete() -> None:
    got = summary([])
    assert (got["steps"], got["tokens"], got["training_time_seconds"]) == (0, 0, 0.0)
    assert got["tokens_per_second"] is got["train_loss"] is got["val_loss"] is got["mfu"] is None


def test_hardware_and_versions_are_plain_facts() -> None:
    facts = hardware()
    assert facts["cpu_logical_cores"] >= facts["cpu_usable_cores"] >= 1
    assert facts["ram_bytes"] > 100_000_000
    assert facts["torch_threads"] == torch.get_num_threads()
    assert len(facts["gpus"]) == facts["gpu_count"]
    found = versions()
    assert {"python", "transformers", "accelerate"} <= found.keys()
    json.dumps([facts, found], allow_nan=False)


@pytest.mark.torch_version
def test_versions_record_the_build_of_torch() -> None:
    build = os.environ.get("TORCH_BUILD")  # of a stand-in: `tests.torch_builds`
    assert build in (None, torch.__version__)
    assert versions()["torch"] == torch_build(torch.__version__, torch.version.cuda)
    assert torch_build("2.13.0+cpu", None) == "2.13.0+cpu"
    assert torch_build("2.13.0+cu130", "13.0") == "2.13.0+cu130"
    assert torch_build("2.13.0", "13.0") == "2.13.0+cu130"
    assert torch_build("2.13.0", None) == "2.13.0"


def test_a_new_metric_does_not_make_earlier_runs_unreadable() -> None:
    assert not Metric("new", "New", "seconds", -1).required
