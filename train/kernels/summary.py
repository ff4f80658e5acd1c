"""Schema of `kernels.json`: where the time of a profiled step goes in one run, and what changes between two.

Imports no torch: `train.compare` reads the file without it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from train.kernels.traces import ProfileFacts
from train.utils.errors import UserError
from train.utils.files import from_json, json_safe, read_json, write_json

SCHEMA = 2
TRAINING_PHASES = ("forward", "backward", "recompute", "optimizer")
LONGEST_NAME = 60


@dataclass(frozen=True)
class RowNames:
    """What a row is about. A name is empty where there is none, or where rows were summed over it."""

    module: str
    """Full name in the model; "*" stands for every layer."""
    phase: str
    category: str
    operator: str
    kernel: str
    """Empty on a CPU."""

    @property
    def module_and_phase(self) -> str:
        return ", ".join(filter(None, (self.module, self.phase)))

    @property
    def scope(self) -> str:
        """Module, phase and category."""
        return ": ".join(filter(None, (self.module_and_phase, self.category)))

    @property
    def work(self) -> str:
        """The operator and its kernel, of which the name may have hundreds of characters."""
        kernel = self.kernel if len(self.kernel) <= LONGEST_NAME else self.kernel[: LONGEST_NAME - 1] + "…"
        return f"{self.operator} ({kernel})" if self.operator and kernel else self.operator or kernel or "unknown"

    @property
    def work_in_module(self) -> str:
        return self.work + (f" in {self.module_and_phase}" if self.module_and_phase else "")


NAMES = tuple(field.name for field in fields(RowNames))
COSTS = ("seconds", "busy_seconds", "launches", "flops", "bytes")


@dataclass(frozen=True)
class Row(RowNames):
    """Costs per step and process of an operator (and, on a GPU, a kernel) in one module and phase."""

    seconds: float
    """Wall time; the rows of a run add up to its step."""
    busy_seconds: float
    """Time in which its kernels run; those of several rows may overlap."""
    launches: float
    flops: float
    bytes: float
    flops_per_second: float | None
    """Over those launches whose FLOPs are known."""
    bytes_per_second: float | None

    @property
    def intensity(self) -> float | None:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.flops > 0 and self.bytes > 0 else None


@dataclass(frozen=True)
class Span:
    """What one process of a pipeline does for a while, in seconds since the step began in any process.

    `stage` and `micro_batch` (from 0, in the order of the schedule) are None outside of the stages' work.
    """

    phase: str
    stage: int | None
    micro_batch: int | None
    start: float
    end: float


@dataclass(frozen=True)
class ProcessTimeline:
    rank: int
    spans: list[Span]


@dataclass(frozen=True)
class PipelineTimeline:
    """The last recorded step of a pipeline, and how idle its stages were."""

    schedule: str | None
    stages: int
    """Processes of the pipeline; under DualPipeV each has two of the model's stages."""
    micro_batches: int
    idle_share: float
    """Of the time from the first forward to the last backward, over all recorded steps and processes."""
    theory: float | None
    """(p - 1) / (m + p - 1) of 1F1B with p stages and m micro-batches, all alike (Huang et al., GPipe, 2019, section
    2.3); None for other schedules."""
    steps: list[float]
    """Idle share of each recorded step."""
    one_clock: bool
    """Whether all processes ran on one machine; otherwise their timelines may be shifted against one another."""
    processes: list[ProcessTimeline]
    """In the order of the pipeline, of the first data-parallel replica."""


@dataclass(frozen=True)
class RunSummary:
    """Where the time of a run's profiled steps goes: means per step and process."""

    label: str
    path: str
    processes: int
    facts: ProfileFacts
    step_seconds: float
    step_seconds_min: float
    step_seconds_max: float
    attributed_share: float
    unattributed_seconds: float
    """Seconds of the mean step outside of every annotation."""
    rows: list[Row]
    categories: list[Row]
    phases: list[Row]
    modules: list[Row]
    layers: list[Row]
    """By module, here with the number of its layer, and phase."""
    pipeline: PipelineTimeline | None

    @property
    def roofline_points(self) -> list[Row]:
        """The rows of training whose FLOPs and bytes are both known."""
        rows = [row for row in self.rows if row.phase in TRAINING_PHASES]
        return [row for row in rows if row.intensity and row.flops_per_second and row.flops_per_second > 0]


@dataclass(frozen=True)
class Change(RowNames):
    """One group of rows in each of several runs, of which the first is the baseline.

    `saved_seconds` (first run minus other run) and `share_of_gain` (of what the step saves; negative where a row loses
    time; None where both steps take as long) have an entry for every run but the first.
    """

    seconds: list[float | None]
    """None in a run that has no such row."""
    saved_seconds: list[float]
    share_of_gain: list[float | None]
    launches: list[float]
    flops_per_second: list[float | None]
    bytes_per_second: list[float | None]
    largest: list[list[str]]
    """Up to three operators (and kernels) of each run that take most of it."""


@dataclass(frozen=True)
class Comparison:
    """What the second run saves. Every list begins with what changes most, and its `saved_seconds` add up to the
    step's."""

    labels: list[str]
    step_seconds: list[float]
    saved_seconds: float
    speedup: float
    categories: list[Change]
    phases: list[Change]
    rows: list[Change]
    """By module, phase and category."""
    operators: list[Change]
    """By module, phase, category and operator."""
    layers: list[Change]


@dataclass(frozen=True)
class KernelsFile:
    schema: int
    runs: list[RunSummary]
    comparison: Comparison | None


def group(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], Row]:
    """Sum the rows that agree in `names`, longest first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    sums = {key: add_up(members, dict(zip(names, key, strict=True))) for key, members in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1].seconds))


def add_up(rows: Sequence[Row], names: dict[str, str]) -> Row:
    """Sum rows into one that has these names."""

    def rate(name: str) -> float | None:
        known = [(getattr(row, name), getattr(row, f"{name}_per_second")) for row in rows]
        seconds = math.fsum(amount / per_second for amount, per_second in known if per_second)
        return math.fsum(amount for amount, per_second in known if per_second) / seconds if seconds else None

    values: dict[str, Any] = dict.fromkeys(NAMES, "") | names
    values |= {cost: math.fsum(getattr(row, cost) for row in rows) for cost in COSTS}
    return Row(**values, flops_per_second=rate("flops"), bytes_per_second=rate("bytes"))


def write_kernels(file: Path, runs: list[RunSummary], comparison: Comparison | None = None) -> None:
    write_json(file, json_safe(asdict(KernelsFile(SCHEMA, runs, comparison))))


def read_kernels(file: Path) -> RunSummary:
    """Read a file of one run."""
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("runs"), list) or not content["runs"]:
        raise UserError(f"{file} is JSON, but not what python -m train.kernels writes")
    if content.get("schema") != SCHEMA or len(content["runs"]) != 1:
        raise UserError(
            f"{file} has schema {content.get('schema')!r} and {len(content['runs'])} runs; this version reads schema "
            f"{SCHEMA} of one run: python -m train.kernels {file.parent} --out {file.parent}"
        )
    summary = from_json(KernelsFile, content, file, "python -m train.kernels").runs[0]
    if not summary.step_seconds > 0:
        raise UserError(f"{file}: its steps take {summary.step_seconds:g} seconds: the file is incomplete")
    return summary
