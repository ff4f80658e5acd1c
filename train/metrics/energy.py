"""The energy of a run's training steps, where the device counts it: a GPU's board with all programs that run on it.

Its driver counts through NVML, on Volta and later; needs nvidia-ml-py.
"""

from collections.abc import Callable
from typing import Any

import torch

from train.utils.devices import nvml_uuid

GPUS = "the boards of the GPUs that train, without CPUs and network"

Reader = Callable[[], float]  # joules since some time in the past; they only grow


class EnergyMeter:
    """Adds up the energy that the device of this process uses in the steps that count."""

    def __init__(self, read: Reader | None) -> None:
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

    def metrics(
        self, device: torch.device, add_up: Callable[[torch.Tensor], torch.Tensor], tokens_per_step: int
    ) -> dict[str, Any]:
        """The entries of `metrics.json`, which `add_up` sums over all processes; null where one of them has none."""
        mine = torch.tensor([self.joules, self.read is None], dtype=torch.float64, device=device)
        joules, unknown = add_up(mine).tolist()
        if unknown or not self.steps:
            return dict.fromkeys(("energy_joules", "joules_per_token", "energy_covers"))
        per_token = joules / (self.steps * tokens_per_step)
        return {"energy_joules": joules, "joules_per_token": per_token, "energy_covers": GPUS}


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
