"""The part of `report.html` that says what takes the memory, of runs with a `profile/memory.json` (`--profile`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.compare_runs import NUMBER, Run, check_fields, check_text, parse, read, unit_of
from train.errors import UserError
from train.report_parts import card, legend, swatches, text
from train.report_svg import WIDTH, group_chart

MEMORY_FILE = Path("profile") / "memory.json"
MEMORY_SCHEMA = 1
CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "logits", "workspace")
BAR = 18

Memory = dict[str, Any]
"""The content of `memory.json`: bytes by category at the peak and in each phase of a step."""


def read_memory(folder: Path) -> Memory | None:
    """The run's `profile/memory.json`; None where there is no such file."""
    path = folder / MEMORY_FILE
    if not path.is_file():
        return None
    content = parse(read(path), path)
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f"{path} is JSON, but not what python -m train --profile writes")
    if content["schema"] != MEMORY_SCHEMA:
        raise UserError(
            f"{path} has schema {content['schema']!r}; this version of compare reads schema {MEMORY_SCHEMA}"
        )
    bytes_ = dict.fromkeys(CATEGORIES, NUMBER)
    for key, table, fields in (
        ("peak_bytes", [content], {"peak_bytes": NUMBER}),
        ("at_peak", [content.get("at_peak")], bytes_),
        ("over_step", content.get("over_step"), {"phase": str, **bytes_}),
    ):
        check_fields(path, key, table, fields, "train --profile")
    check_text(content, path)
    return content


def memory_part(runs: Sequence[Run], memories: Sequence[Memory | None]) -> str:
    """The whole section, of what `read_memory` gave for each run; empty where none has it."""
    found = [
        (index, run.label, memory) for index, (run, memory) in enumerate(zip(runs, memories, strict=True)) if memory
    ]
    if not found:
        return ""
    largest = max(memory["peak_bytes"] for *_, memory in found)
    cards = [peak_card(found, largest), *(step_card(label, memory, largest) for _, label, memory in found)]
    return f'<h2>Memory</h2><div class="charts">{"".join(cards)}</div>'


def in_unit(value: float, largest: float) -> str:
    divisor, unit, decimals = unit_of("bytes", largest)
    return f"{value / divisor:,.{decimals}f} {unit}"


def peak_card(found: Sequence[tuple[int, str, Memory]], largest: float) -> str:
    groups = []
    for name in CATEGORIES:
        values = [memory["at_peak"][name] for *_, memory in found]
        groups.append((name, " · ".join(in_unit(value, largest) for value in values), values))
    peaks = ", ".join(f"{label} {in_unit(memory['peak_bytes'], largest)}" for _, label, memory in found)
    labels = [(index, label) for index, label, _ in found]
    drawing = group_chart([index for index, _ in labels], groups)
    return card("What takes the memory", f"tensors at the peak of a profiled step: {peaks}", drawing, legend(labels))


def step_card(label: str, memory: Memory, largest: float) -> str:
    """A bar for each phase of a step, in the colours of its categories; all runs have one scale."""
    scale = max([largest, *(sum(phase[name] for name in CATEGORIES) for phase in memory["over_step"])]) or 1
    parts = []
    for phase in memory["over_step"]:
        left, shapes = 0.0, []
        for colour, name in enumerate(CATEGORIES):
            wide = max(0.0, phase[name] / scale * WIDTH)
            said = f"{name}: {in_unit(phase[name], largest)}"
            shapes.append(
                f'<rect class="bar run{colour}" x="{left:.2f}" width="{wide:.2f}" height="{BAR}">'
                f"<title>{text(said)}</title></rect>"
            )
            left += wide
        total = in_unit(sum(phase[name] for name in CATEGORIES), largest)
        words = f'<div class="words"><span>{text(phase["phase"])}</span><strong>{text(total)}</strong></div>'
        parts.append(f'{words}<svg viewBox="0 0 {WIDTH} {BAR}">{"".join(shapes)}</svg>')
    key = swatches([(f"run{colour}", name) for colour, name in enumerate(CATEGORIES)])
    return card(f"Memory over a step: {label}", "tensors, by what they are for", "".join(parts), key)
