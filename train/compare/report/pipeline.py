"""The part of `report.html` that shows a pipeline at work, of runs whose `profile/kernels.json` has a pipeline."""

from collections.abc import Sequence

from train.compare.report.parts import card, swatches, text
from train.compare.report.svg import RIGHT, WIDTH, picture, ticks
from train.kernels.summary import PipelineTimeline, ProcessTimeline
from train.metrics.units import short_count

COLOURS = {"forward": "run0", "backward": "run1", "optimizer": "run2", "data": "run4", "communication": "waiting"}
LEFT, ROW, GAP, AXIS = 96, 30, 6, 40
NARROWEST_NUMBER = 14  # of a piece that has its micro-batch's number in it


def pipeline_card(label: str, pipeline: PipelineTimeline) -> str:
    """A row for each process of the pipeline, and the measured idle share beside the theoretical one."""
    title = f"The pipeline of {label}: {pipeline.idle_share:.1%} idle"
    theory = "" if pipeline.theory is None else f", {pipeline.theory:.1%} in theory with all stages alike"
    note = (
        f"a profiled step; {pipeline.stages} processes, {pipeline.micro_batches} micro-batches, numbered; idle: "
        f"neither forward nor backward between the first and the last of them{theory}"
    )
    if not pipeline.one_clock:
        note += "; rows of several machines, whose clocks may differ"
    phases = {span.phase for process in pipeline.processes for span in process.spans}
    key = swatches([(colour, phase) for phase, colour in COLOURS.items() if phase in phases])
    return card(title, note, drawing(title, pipeline.processes), key)


def drawing(name: str, rows: Sequence[ProcessTimeline]) -> str:
    longest = max((span.end for row in rows for span in row.spans), default=0.0) or 1.0
    width = WIDTH - LEFT - RIGHT
    bottom = len(rows) * (ROW + GAP)
    parts = []
    for value in ticks(0, longest * 1e3):
        x = LEFT + value / (longest * 1e3) * width
        parts.append(f'<path class="grid" d="M{x:.1f} 0V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{short_count(value)}</text>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{bottom + AXIS - 6}" text-anchor="middle">ms of the step</text>')
    for number, row in enumerate(rows):
        top = number * (ROW + GAP)
        stages = sorted({span.stage for span in row.spans if span.stage is not None})
        words = f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}" if stages else f"process {row.rank}"
        parts.append(f'<text x="{LEFT - 7}" y="{top + ROW / 2 + 4}" text-anchor="end">{text(words)}</text>')
        for span in row.spans:
            x, wide = LEFT + span.start / longest * width, (span.end - span.start) / longest * width
            colour = COLOURS.get(span.phase, "run5")
            second = " way-back" * bool(stages and span.stage not in (None, stages[0]))
            what = span.phase if span.micro_batch is None else f"{span.phase} {span.micro_batch}"
            said = f"{what}: {1e3 * (span.end - span.start):,.2f} ms from {1e3 * span.start:,.2f} ms"
            parts.append(
                f'<rect class="bar {colour}{second}" x="{x:.2f}" y="{top}" width="{max(0.4, wide):.2f}" '
                f'height="{ROW}"><title>{text(said)}</title></rect>'
            )
            if span.micro_batch is not None and wide >= NARROWEST_NUMBER:
                place = f'x="{x + wide / 2:.1f}" y="{top + ROW / 2 + 4}" text-anchor="middle"'
                parts.append(f'<text class="on-bar" {place}>{span.micro_batch}</text>')
    return picture(name, bottom + AXIS, parts)
