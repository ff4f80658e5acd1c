"""The part of `report.html` that shows a pipeline at work, of runs whose `profile/kernels.json` has a pipeline."""

from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from train.checkpoints.run_folder import NUMBER, check_fields
from train.compare.plots import short_count
from train.compare.report.parts import card, swatches, text
from train.compare.report.svg import RIGHT, WIDTH, picture, ticks

OPTIONAL = (int, float, NoneType)
FIELDS: dict[str, dict[str, Any]] = {
    "pipeline": {"stages": int, "micro_batches": int, "idle_share": NUMBER, "theory": OPTIONAL, "one_clock": bool},
    "pipeline.rows": {"rank": int, "pieces": list},
    "pipeline.pieces": {
        "phase": str, "stage": (int, NoneType), "micro_batch": (int, NoneType), "start": NUMBER, "end": NUMBER,
    },
}  # fmt: skip

COLOURS = {"forward": "run0", "backward": "run1", "optimizer": "run2", "data": "run4", "communication": "waiting"}
LEFT, ROW, GAP, AXIS = 96, 30, 6, 40
NARROWEST_NUMBER = 14  # of a piece that has its micro-batch's number in it


def check_pipeline(path: Path, pipeline: Any) -> None:
    """A `UserError` where a run's "pipeline" is not what `train.kernels` writes; None is right, for a run without."""
    if pipeline is None:
        return
    check_fields(path, "pipeline", [pipeline], FIELDS["pipeline"], "train.kernels")
    rows = pipeline.get("rows")
    check_fields(path, "pipeline.rows", rows, FIELDS["pipeline.rows"], "train.kernels")
    for row in rows:
        check_fields(path, "pipeline.rows.pieces", row["pieces"], FIELDS["pipeline.pieces"], "train.kernels")


def pipeline_card(label: str, pipeline: dict[str, Any]) -> str:
    """A row for each process of the pipeline, and the idle share that was measured beside the one in theory."""
    title = f"The pipeline of {label}: {pipeline['idle_share']:.1%} idle"
    theory = "" if pipeline["theory"] is None else f", {pipeline['theory']:.1%} in theory with all stages alike"
    note = (
        f"a profiled step; {pipeline['stages']} processes, {pipeline['micro_batches']} micro-batches, numbered; idle: "
        f"neither forward nor backward between the first and the last of them{theory}"
    )
    if not pipeline["one_clock"]:
        note += "; rows of several machines, whose clocks may differ"
    phases = {piece["phase"] for row in pipeline["rows"] for piece in row["pieces"]}
    key = swatches([(colour, phase) for phase, colour in COLOURS.items() if phase in phases])
    return card(title, note, drawing(title, pipeline["rows"]), key)


def drawing(name: str, rows: Sequence[dict[str, Any]]) -> str:
    longest = max((piece["end"] for row in rows for piece in row["pieces"]), default=0.0) or 1.0
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
        stages = sorted({piece["stage"] for piece in row["pieces"] if piece["stage"] is not None})
        words = f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}" if stages else f"process {row['rank']}"
        parts.append(f'<text x="{LEFT - 7}" y="{top + ROW / 2 + 4}" text-anchor="end">{text(words)}</text>')
        for piece in row["pieces"]:
            x, wide = LEFT + piece["start"] / longest * width, (piece["end"] - piece["start"]) / longest * width
            colour = COLOURS.get(piece["phase"], "run5")
            second = " way-back" * bool(stages and piece["stage"] not in (None, stages[0]))
            what = piece["phase"] if piece["micro_batch"] is None else f"{piece['phase']} {piece['micro_batch']}"
            said = f"{what}: {1e3 * (piece['end'] - piece['start']):,.2f} ms from {1e3 * piece['start']:,.2f} ms"
            parts.append(
                f'<rect class="bar {colour}{second}" x="{x:.2f}" y="{top}" width="{max(0.4, wide):.2f}" '
                f'height="{ROW}"><title>{text(said)}</title></rect>'
            )
            if piece["micro_batch"] is not None and wide >= NARROWEST_NUMBER:
                place = f'x="{x + wide / 2:.1f}" y="{top + ROW / 2 + 4}" text-anchor="middle"'
                parts.append(f'<text class="on-bar" {place}>{piece["micro_batch"]}</text>')
    return picture(name, bottom + AXIS, parts)
