"""What the training steps of a run cost in energy, where the device says: GPUs through NVML, CPUs through RAPL.

A GPU's driver counts the energy of the whole board (NVML, Volta and later; needs nvidia-ml-py). A CPU's packages and
their memory are counted by RAPL, which Linux shows under /sys/class/powercap (Intel and AMD; readable by root alone on
most machines). Neither knows of programs: what else runs on the device is counted too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from train.utils.devices import nvml_uuid

POWERCAP = Path("/sys/class/powercap")
GPUS = "the boards of the GPUs that train, without CPUs and network"
CPUS = "the CPU packages of the machines and the memory that they count, with all that runs on them"

Reader = Callable[[], float]
"""Joules since some time in the past; they only grow."""


class EnergyMeter:
    """Sums up what the device of this process takes in the steps that count."""

    def __init__(self, read: Reader | None) -> None:
        """`read`: None where the device does not say."""
        self.read = read
        self.joules = 0.0
        self.steps = 0

    def start(self) -> None:
        if self.read is not None:
            self.began = self.read()

    def stop(self, counts: bool) -> None:
        """At the end of a step; what `counts` not is forgotten."""
        if self.read is not None and counts:
            self.joules += self.read() - self.began
        self.steps += counts

    def total(self, device: torch.device, add_up: Callable[[torch.Tensor], torch.Tensor]) -> "Energy | None":
        """What all processes have taken; `add_up` sums a tensor over them. None where one of them does not know."""
        mine = torch.tensor([self.joules, self.read is None], dtype=torch.float64, device=device)
        joules, unknown = add_up(mine).tolist()
        if unknown or not self.steps:
            return None
        return Energy(joules, self.steps, CPUS if device.type == "cpu" else GPUS)


@dataclass(frozen=True)
class Energy:
    """Joules of all processes in so many steps; `covers` says of which devices."""

    joules: float
    steps: int
    covers: str


def energy_reader(device: torch.device, local_main: bool) -> Reader | None:
    """What this process has to read: its GPU, or as the first process of a machine without GPUs its CPUs.

    The other processes of such a machine read nothing, which is 0 joules. None where the device does not say.
    """
    if device.type != "cpu":
        return nvml_reader(device)
    return rapl_reader(POWERCAP) if local_main else lambda: 0.0


def nvml_reader(device: torch.device) -> Reader | None:
    if (uuid := nvml_uuid(device)) is None:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # it counts millijoules


def rapl_reader(folder: Path) -> Reader | None:
    """All packages and their memory in a powercap folder; None where there are none, or they may not be read.

    All zones are links in the one folder. "intel-rapl:0" (package-0) counts cores and graphics, which have zones of
    their own, but not memory ("intel-rapl:0:2", dram). A zone psys counts the whole platform, packages included.
    """
    zones = []
    for zone in sorted(folder.glob("intel-rapl:*")):
        name = _line(zone / "name")
        if name is None or not (name.startswith("package") or name == "dram"):
            continue
        if _line(zone / "energy_uj") is None:
            return None
        zones.append(Zone(zone))
    return (lambda: sum(zone.joules() for zone in zones)) if zones else None


class Zone:
    """A RAPL zone whose counter begins anew after `max_energy_range_uj`: an hour or less, so read it more often."""

    def __init__(self, folder: Path) -> None:
        self.counter = folder / "energy_uj"
        self.range = int((folder / "max_energy_range_uj").read_text())
        self.last = int(self.counter.read_text())
        self.total = 0

    def joules(self) -> float:
        """Since this object was made."""
        now = int(self.counter.read_text())
        self.total += now - self.last if now >= self.last else now - self.last + self.range
        self.last = now
        return self.total / 1e6


def _line(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:
        return None
