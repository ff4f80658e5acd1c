"""What the training steps of a run cost in energy, where the device counts it: GPUs through NVML.

A GPU's driver counts the energy of the whole board (NVML, Volta and later; needs nvidia-ml-py), with all programs that
run on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from train.utils.devices import nvml_uuid

GPUS = "the boards of the GPUs that train, without CPUs and network"

Reader = Callable[[], float]
"""Joules since some time in the past; they only grow."""


@dataclass(frozen=True)
class Energy:
    """Joules of the devices of all processes in a number of steps."""

    joules: float
    steps: int


class EnergyMeter:
    """Adds up the energy that the device of this process uses in the steps that count."""

    def __init__(self, read: Reader | None) -> None:
        """`read`: None where the device does not count its energy."""
        self.read = read
        self.joules = 0.0
        self.steps = 0

    def start(self) -> None:
        if self.read is not None:
            self.at_start = self.read()

    def stop(self, counts: bool) -> None:
        """At the end of a step, which is left out unless it `counts`."""
        if self.read is not None and counts:
            self.joules += self.read() - self.at_start
        self.steps += counts

    def total(self, device: torch.device, add_up: Callable[[torch.Tensor], torch.Tensor]) -> Energy | None:
        """The energy of all processes; `add_up` sums a tensor over them. None if it is unknown to one of them."""
        mine = torch.tensor([self.joules, self.read is None], dtype=torch.float64, device=device)
        joules, unknown = add_up(mine).tolist()
        return None if unknown or not self.steps else Energy(joules, self.steps)


def energy_reader(device: torch.device) -> Reader | None:
    """The counter of a GPU's board; None without NVML, or where the device does not count its energy."""
    uuid = nvml_uuid(device)
    if uuid is None:
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


def energy_metrics(energy: Energy | None, tokens_per_step: int) -> dict[str, Any]:
    """The entries of `metrics.json`; null where the energy is unknown."""
    return {
        "energy_joules": energy and energy.joules,
        "joules_per_token": energy and energy.joules / (energy.steps * tokens_per_step),
        "energy_covers": energy and GPUS,
    }
