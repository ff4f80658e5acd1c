"""The chart of a pipeline's step, of runs whose `profile/kernels.json` has a pipeline."""

from train.compare.charts import ON_BAR, RIGHT, TOP, WAITING, WIDTH, Chart, canvas, color_of, write
from train.kernels.summary import PipelineTimeline

COLORS: dict[str, int | str] = {"forward": 0, "backward": 1, "optimizer": 2, "data": 4, "communication": WAITING}
LEFT, ROW, GAP, AXIS = 96, 30, 6, 40
NARROWEST_NUMBER = 14  # units of a span that has its micro-batch's number in it


def pipeline_chart(label: str, pipeline: PipelineTimeline) -> Chart:
    """A row for each process of the pipeline, and the measured idle share next to the theoretical one."""
    theory = "" if pipeline.theory is None else f", {pipeline.theory:.1%} in theory with all stages alike"
    note = (
        f"a profiled step; {pipeline.stages} processes, {pipeline.micro_batches} micro-batches, numbered; idle: "
        f"neither forward nor backward between the first and the last of them{theory}"
    )
    if not pipeline.one_clock:
        note += "; rows of several machines, whose clocks may differ"
    spans = [span for process in pipeline.processes for span in process.spans]
    longest = max((span.end for span in spans), default=0.0) or 1.0
    units_per_second = (WIDTH - LEFT - RIGHT) / longest
    height = len(pipeline.processes) * (ROW + GAP)
    figure, axes = canvas(TOP + height + AXIS, LEFT, AXIS, x_title="ms of the step")
    axes.set(xlim=(0, 1e3 * longest), ylim=(height, 0))
    axes.grid(visible=False, axis="y")
    names: list[str] = []
    tooltips: dict[str, str] = {}
    for number, process in enumerate(pipeline.processes):
        top = number * (ROW + GAP)
        stages = sorted({span.stage for span in process.spans if span.stage is not None})
        plural = "s" * (len(stages) > 1)
        names.append(f"stage{plural} {', '.join(map(str, stages))}" if stages else f"process {process.rank}")
        for span in process.spans:
            seconds = span.end - span.start
            what = span.phase if span.micro_batch is None else f"{span.phase} {span.micro_batch}"
            gid = f"span-{len(tooltips)}"
            tooltips[gid] = f"{what}: {1e3 * seconds:,.2f} ms from {1e3 * span.start:,.2f} ms"
            second_chunk = bool(stages) and span.stage not in (None, stages[0])
            wide = max(0.4 / units_per_second, seconds)
            axes.barh(top, 1e3 * wide, ROW, left=1e3 * span.start, align="edge", gid=gid,
                      color=color_of(COLORS.get(span.phase, 5)), alpha=0.6 if second_chunk else None)  # fmt: skip
            if span.micro_batch is not None and seconds * units_per_second >= NARROWEST_NUMBER:
                middle = 1e3 * (span.start + seconds / 2)
                write(axes, middle, top + ROW / 2, f"{span.micro_batch}", ON_BAR, ha="center", va="center", size=8)
    axes.set_yticks([number * (ROW + GAP) + ROW / 2 for number in range(len(names))], names)
    keys = [(color, phase) for phase, color in COLORS.items() if phase in {span.phase for span in spans}]
    return Chart(f"The pipeline of {label}: {pipeline.idle_share:.1%} idle", note, figure, keys, "bar", tooltips)
