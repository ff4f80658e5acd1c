"""Energy: RAPL's files in a folder like the kernel's, read by the real reader; NVML by a module of its shape."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from train.metrics.energy import CPUS, Energy, EnergyMeter, energy_reader, rapl_reader

CPU = torch.device("cpu")
RANGE = 1_000_000  # microjoules at which these counters begin anew


def zone(folder: Path, name: str, label: str, microjoules: int) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{label}\n")
    (path / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path / "energy_uj"


def test_packages_and_their_memory_are_added_up_and_nothing_twice(tmp_path: Path) -> None:
    package, memory = zone(tmp_path, "intel-rapl:0", "package-0", 100), zone(tmp_path, "intel-rapl:0:2", "dram", 7)
    for name, label in (("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys"), ("intel-rapl-mmio:0", "package-0")):
        zone(tmp_path, name, label, 0).write_text("999999\n")
    read = rapl_reader(tmp_path)
    assert read is not None
    assert read() == 0
    package.write_text("500100\n")
    memory.write_text("1007\n")
    assert read() == pytest.approx(0.501)


def test_a_counter_that_begins_anew(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 300)
    read = rapl_reader(tmp_path)
    assert read is not None
    for value in (200, RANGE - 1, 10):
        counter.write_text(str(value))
        last = read()
    assert last == pytest.approx((300 + 200 + (RANGE - 1 - 200) + 1 + 10) / 1e6)


def test_no_reader_where_nothing_can_be_read(tmp_path: Path) -> None:
    assert rapl_reader(tmp_path / "missing") is None
    zone(tmp_path / "odd", "intel-rapl:0", "psys", 0)
    assert rapl_reader(tmp_path / "odd") is None
    zone(tmp_path / "hidden", "intel-rapl:0", "package-0", 0)
    counter = zone(tmp_path / "hidden", "intel-rapl:1", "package-1", 0)
    counter.unlink()
    counter.mkdir()  # unreadable to root as well
    assert rapl_reader(tmp_path / "hidden") is None


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
    assert meter.total(CPU, lambda mine: 2 * mine) == Energy(10.0, 2, CPUS)


def test_unknown_to_one_process_is_unknown() -> None:
    assert metered(None, True).total(CPU, lambda mine: mine) is None
    other = torch.tensor([3.0, True], dtype=torch.float64)
    assert metered(lambda: 1.0, True).total(CPU, lambda mine: mine + other) is None
    assert metered(lambda: 1.0, False).total(CPU, lambda mine: mine) is None, "no step"
    silent = energy_reader(CPU, local_main=False)
    assert silent is not None
    assert silent() == 0


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
    read = energy_reader(torch.device("cuda", 1), local_main=False)
    assert read is not None
    before = read()
    assert read() - before == pytest.approx(2.5)

    def refuses(handle: str) -> int:
        raise NVMLError("not supported")

    vars(nvml)["nvmlDeviceGetTotalEnergyConsumption"] = refuses
    assert energy_reader(torch.device("cuda", 1), local_main=True) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_reader(torch.device("cuda", 1), local_main=True) is None
