"""Compare sides that alternate, round by round, so that a machine whose speed drifts treats all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from train.metrics.hardware import hardware, versions
from train.utils.devices import device_name

SPEED_UP_HEADERS = ("speed-up", "by the fastest round", "by CPU seconds")


@dataclass(frozen=True)
class Round:
    """Seconds on the clock, and CPU seconds."""

    wall: float
    cpu: float


Name = TypeVar("Name")
Measured = TypeVar("Measured")


def measure(side: Callable[[], object]) -> Round:
    """One call of `side`, including what it leaves to the accelerator."""
    _synchronize()
    cpu, started = time.process_time(), time.perf_counter()
    side()
    _synchronize()
    return Round(time.perf_counter() - started, time.process_time() - cpu)


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Round]]:
    """The cost of each side in each round."""
    return take_turns({name: partial(measure, side) for name, side in sides.items()}, rounds)


def take_turns(sides: Mapping[Name, Callable[[], Measured]], rounds: int) -> dict[Name, list[Measured]]:
    """The same for sides that measure their rounds themselves, for example in other processes."""
    taken: dict[Name, list[Measured]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure_round in sides.items():
            taken[name].append(measure_round())
    return taken


def spread(values: Sequence[float], digits: int = 2, unit: str = "f") -> str:
    """Median and range: "1.20 (1.10 to 1.40)". `unit` is "%" for a share."""
    figures = (statistics.median(values), min(values), max(values))
    return "{} ({} to {})".format(*(f"{each:,.{digits}{unit}}" for each in figures))


def speed_up(base: Sequence[Round], own: Sequence[Round]) -> list[str]:
    """How many times as fast as `base`: round by round, by the fastest rounds and by the fewest CPU seconds.

    The last two depend less on other work of the machine. `SPEED_UP_HEADERS` are their headers in a table.
    """
    ratios = [theirs.wall / ours.wall for theirs, ours in zip(base, own, strict=True)]
    fastest = min(each.wall for each in base) / min(each.wall for each in own)
    cpu = min(each.cpu for each in base) / min(each.cpu for each in own)
    return [spread(ratios), f"{fastest:.2f}", f"{cpu:.2f}"]


def machine(device: str) -> str:
    """The hardware and the versions of a measurement, in one line."""
    found, packages = hardware(), versions()
    cores = f"{found['torch_threads']} threads of {found['cpu_usable_cores']} cores, {found['cpu_capability']}"
    where = f"{found['cpu']}, {cores}" if device == "cpu" else device_name(device)
    named = ("torch", "transformers", "flash_attn", "flash_attn_4")
    return f"{where}; {', '.join(f'{name} {packages[name]}' for name in named if name in packages)}"


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
