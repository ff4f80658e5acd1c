"""Sides that alternate: what each costs round by round, so that a machine whose speed drifts treats them alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch

from train.metrics.hardware import hardware, versions
from train.utils.devices import device_name


class Cost(Protocol):
    """Seconds on the clock, and of the CPU in this process."""

    @property
    def wall(self) -> float: ...

    @property
    def cpu(self) -> float: ...


class Round(NamedTuple):
    wall: float
    cpu: float


def measure(side: Callable[[], object]) -> Round:
    """One call of `side`, with all that it leaves to a GPU."""
    _wait()
    cpu, began = time.process_time(), time.perf_counter()
    side()
    _wait()
    return Round(time.perf_counter() - began, time.process_time() - cpu)


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Round]]:
    """The cost of each side in each round."""
    return take_turns({name: partial(measure, side) for name, side in sides.items()}, rounds)


def take_turns(measured: Mapping[str, Callable[[], Round]], rounds: int) -> dict[str, list[Round]]:
    """The same of sides that measure their rounds themselves, for example in other processes."""
    taken: dict[str, list[Round]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, side in measured.items():
            taken[name].append(side())
    return taken


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and range: "1.20 (1.10 to 1.40)"."""
    middle, least, most = (f"{each:,.{digits}f}" for each in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def speed_up(base: Sequence[Cost], own: Sequence[Cost]) -> list[str]:
    """How many times as fast as `base`: round by round, in the quickest rounds, and in the fewest CPU seconds.

    Other work on the machine disturbs the last two less.
    """
    ratios = [theirs.wall / ours.wall for theirs, ours in zip(base, own, strict=True)]
    quickest = min(each.wall for each in base) / min(each.wall for each in own)
    cpu = min(each.cpu for each in base) / min(each.cpu for each in own)
    return [spread(ratios), f"{quickest:.2f}", f"{cpu:.2f}"]


def machine(device: str) -> str:
    """Where and with what is measured, in a line."""
    found, packages = hardware(), versions()
    cores = f"{found['torch_threads']} threads of {found['cpu_usable_cores']} cores, {found['cpu_capability']}"
    where = f"{found['cpu']}, {cores}" if device == "cpu" else device_name(device)
    named = ("torch", "transformers", "flash_attn", "flash_attn_4")
    return f"{where}; {', '.join(f'{name} {packages[name]}' for name in named if name in packages)}"


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
