"""Energy of the steps that count, and NVML by a module of its shape."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch

from train.metrics.energy import GPUS, EnergyMeter, energy_reader

CPU = torch.device("cpu")
UNKNOWN = {"energy_joules": None, "joules_per_token": None, "energy_covers": None}


def metered(read: Callable[[], float] | None, *counts: bool) -> EnergyMeter:
    meter = EnergyMeter(read)
    for each in counts:
        meter.start()
        meter.stop(each)
    return meter


def test_only_steps_that_count_are_in_the_sum() -> None:
    past = iter([0.0, 5.0, 8.0, 100.0, 102.0])
    meter = metered(lambda: next(past), False, True, True)
    assert (meter.joules, meter.steps) == (5.0, 2)
    assert meter.metrics(CPU, lambda mine: 2 * mine, tokens_per_step=10) == {
        "energy_joules": 10.0,
        "joules_per_token": 0.5,
        "energy_covers": GPUS,
    }


def test_unknown_to_one_process_is_unknown() -> None:
    assert metered(None, True).metrics(CPU, lambda mine: mine, 10) == UNKNOWN
    other = torch.tensor([3.0, True], dtype=torch.float64)
    assert metered(lambda: 1.0, True).metrics(CPU, lambda mine: mine + other, 10) == UNKNOWN
    assert metered(lambda: 1.0, False).metrics(CPU, lambda mine: mine, 10) == UNKNOWN, "no step"
    assert energy_reader(CPU) is None


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """No NVML is at hand: its functions as they are documented."""

    class NVMLError(Exception):
        pass

    millijoules = iter([1_000, 1_000, 3_500])
    nvml = ModuleType("pynvml")
    vars(nvml).update(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-aa-bb": "handle"}[uuid],
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(millijoules),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="aa-bb"))
    read = energy_reader(torch.device("cuda", 1))
    assert read is not None
    before = read()
    assert read() - before == pytest.approx(2.5)

    def refuses(handle: str) -> int:
        raise NVMLError("not supported")

    vars(nvml)["nvmlDeviceGetTotalEnergyConsumption"] = refuses
    assert energy_reader(torch.device("cuda", 1)) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_reader(torch.device("cuda", 1)) is None
