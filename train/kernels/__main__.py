"""Where the time of a step goes, operator by operator, and which of them make one run faster than another.

Reads the traces that `python -m train --profile` left, of every process, and nothing else.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from train.kernels.attribution import CATEGORIES
from train.kernels.breakdown import Account, Key, Row, account, by, by_layer
from train.kernels.pipeline_timeline import timeline
from train.kernels.traces import Recording, read_recording
from train.metrics.summary import json_safe
from train.utils.command import run_command
from train.utils.errors import UserError
from train.utils.files import write_json, write_text
from train.utils.tables import markdown_table

EXAMPLE = """\
examples:
  python -m train.kernels checkpoint/baseline
  python -m train.kernels checkpoint/baseline checkpoint/optimized --out checkpoint/kernels
"""

SCHEMA = 1
"""Version of the layout of `kernels.json`."""

TRAINED = ("forward", "backward", "recompute", "optimizer")
SHOWN = 20  # rows of a printed table
SAME = ("tokens_per_step", "block_size", "model")  # what makes two runs' steps the same work


def describe(recording: Recording, found: Account) -> dict[str, Any]:
    """One run in `kernels.json`. Seconds, launches, FLOPs and bytes are means per step and process.

    - `step_seconds`: `mean`, `min`, `max` of the recorded steps of all processes; `unaccounted_seconds` of the mean
      lie outside of every named region, `accounted_share` is the rest of it.
    - `categories`, `phases`, `modules`: `seconds` of wall time, which add up to the mean step; `busy_seconds`, in
      which kernels may overlap; `launches`. In `modules` a "*" stands for every layer.
    - `rows`: the same by module, phase, category, operator and kernel (empty on a CPU), with `flops`, `bytes`, and the
      rates of those launches whose shapes tell them (null where none do).
    - `layers`: seconds of every single module in every phase.
    - `pipeline`: `kernels_timeline.timeline`, null for a run without stages.
    - `roofline`: of the training phases, a point for every row with both FLOPs and bytes: `intensity` in FLOPs per
      byte, `flops_per_second`; under `peak_flops` and `peak_bytes_per_second` of the device (null where unknown, as on
      a CPU), and under the highest rates of any row, `best_flops_per_second` and `best_bytes_per_second` (a cache's,
      where an operator finds its input there).
    """
    rows = [_row(key, row) for key, row in _collapsed(found).items()]
    trained = [row for row in rows if row["phase"] in TRAINED]
    facts = recording.facts
    return {
        "label": recording.label,
        "path": str(recording.path),
        "processes": len(recording.traces),
        "device": recording.device,
        "facts": {key: value for key, value in facts.items() if key not in ("schema", "rank")},
        "step_seconds": {"mean": found.seconds, "min": min(found.steps), "max": max(found.steps)},
        "unaccounted_seconds": found.unaccounted,
        "accounted_share": 1 - found.unaccounted / found.seconds,
        "categories": _sums(found, "category"),
        "phases": _sums(found, "phase"),
        "modules": _sums(found, "module"),
        "rows": rows,
        "layers": [
            {"module": module, "phase": phase, "seconds": seconds}
            for (module, phase), seconds in by_layer(found.rows).items()
        ],
        "pipeline": timeline(recording),
        "roofline": {
            "peak_flops": facts.get("peak_flops"),
            "peak_bytes_per_second": facts.get("peak_bytes_per_second"),
            "best_flops_per_second": max((row["flops_per_second"] or 0 for row in trained), default=0) or None,
            "best_bytes_per_second": max((row["bytes_per_second"] or 0 for row in trained), default=0) or None,
            "points": [
                {**row, "intensity": row["flops"] / row["bytes"]} for row in trained if row["flops"] and row["bytes"]
            ],
        },
    }


def of_run(folder: Path) -> dict[str, Any]:
    """The content of `kernels.json` for one run by itself, from its traces."""
    recording = read_recording(folder)
    return content([describe(recording, account(recording))], None)


def content(runs: list[dict[str, Any]], comparison: dict[str, Any] | None) -> dict[str, Any]:
    return json_safe({"schema": SCHEMA, "runs": runs, "comparison": comparison})


def compare(recordings: list[Recording], accounts: list[Account]) -> dict[str, Any]:
    """What the second run saves against the first, as `comparison` in `kernels.json`.

    `saved_seconds` of a row are the first run's less the second's, so they add up to the `total`'s; `share_of_gain` is
    a row's part of that sum, negative where it works against it (null where both take the same). A pair is
    (first run, second run). `rows` are aligned by module, phase and category, each with the `operators` (and kernels)
    that take most of it; `operators` by operator as well; `layers` are single modules. All are in order of what they
    change.
    """
    for key in SAME:
        first, second = (recording.facts.get(key) for recording in recordings)
        if first != second:
            raise UserError(
                f"{recordings[0].path} and {recordings[1].path} do not do the same work in a step: {key} is {first} "
                f"and {second}; profile two runs of the same model and batch"
            )
    saved = accounts[0].seconds - accounts[1].seconds
    layers = [by_layer(found.rows) for found in accounts]
    changes = {key: layers[0].get(key, 0.0) - layers[1].get(key, 0.0) for key in {**layers[0], **layers[1]}}
    return {
        "labels": [recording.label for recording in recordings],
        "total": {
            "seconds": [found.seconds for found in accounts],
            "saved_seconds": saved,
            "speedup": accounts[0].seconds / accounts[1].seconds,
        },
        "categories": _aligned(accounts, saved, "category"),
        "phases": _aligned(accounts, saved, "phase"),
        "rows": _aligned(accounts, saved, "module", "phase", "category"),
        "operators": _aligned(accounts, saved, "module", "phase", "category", "operator"),
        "layers": [
            {
                "module": module,
                "phase": phase,
                "seconds": [own.get((module, phase), 0.0) for own in layers],
                "saved_seconds": change,
            }
            for (module, phase), change in sorted(changes.items(), key=lambda item: -abs(item[1]))
        ],
    }


def _collapsed(found: Account) -> dict[Key, Row]:
    return {Key(*names): row for names, row in by(found.rows, *Key._fields).items()}


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if amount and seconds else None


def _row(key: Key, row: Row) -> dict[str, Any]:
    return {
        **key._asdict(),
        "seconds": row.seconds,
        "busy_seconds": row.busy,
        "launches": row.launches,
        "flops": row.flops,
        "bytes": row.bytes,
        "flops_per_second": _rate(row.flops, row.flops_seconds),
        "bytes_per_second": _rate(row.bytes, row.bytes_seconds),
    }


def _sums(found: Account, name: str) -> list[dict[str, Any]]:
    return [
        {
            name: value,
            "seconds": row.seconds,
            "share": row.seconds / found.seconds,
            "busy_seconds": row.busy,
            "launches": row.launches,
        }
        for (value,), row in by(found.rows, name).items()
    ]


def _aligned(accounts: list[Account], saved: float, *names: str) -> list[dict[str, Any]]:
    sides = [by(found.rows, *names) for found in accounts]
    parts = [by(found.rows, *names, "operator", "kernel") for found in accounts]
    lines = []
    for value in {**sides[0], **sides[1]}:
        pair = [side.get(value, Row()) for side in sides]
        change = pair[0].seconds - pair[1].seconds
        line: dict[str, Any] = {
            **dict(zip(names, value, strict=True)),
            "seconds": [row.seconds for row in pair],
            "saved_seconds": change,
            "share_of_gain": change / saved if saved else None,
            "launches": [row.launches for row in pair],
            "flops_per_second": [_rate(row.flops, row.flops_seconds) for row in pair],
            "bytes_per_second": [_rate(row.bytes, row.bytes_seconds) for row in pair],
        }
        if "module" in names and "operator" not in names:
            line["operators"] = [_largest(part, value) for part in parts]
        lines.append(line)
    return sorted(lines, key=lambda line: -abs(line["saved_seconds"]))


def _largest(parts: dict[tuple[str, ...], Row], value: tuple[str, ...]) -> list[str]:
    """Up to three operators (and their kernels) of a row, the longest first, as `by` gives them."""
    own = [names[len(value) :] for names in parts if names[: len(value)] == value]
    return [" / ".join(filter(None, names)) for names in own[:3]]


# The tables


def table(run: dict[str, Any]) -> str:
    """A run in Markdown: its categories, and the rows that take longest."""
    step = run["step_seconds"]
    facts = run["facts"]
    between = sum(sums["seconds"] for sums in run["phases"] if sums["phase"] in ("validation", "checkpoint"))
    lines = [
        f"## {run['label']}: {_ms(step['mean'])} ms a step",
        "",
        f"Steps {facts['first_step']} to {facts['first_step'] + facts['steps'] - 1} of {run['processes']} "
        f"process{'es' * (run['processes'] > 1)} ({_ms(step['min'])} to {_ms(step['max'])} ms) on "
        f"{facts['device_name']}, recorded with the profiler's own cost. {run['accounted_share']:.1%} is accounted "
        f"for; {_ms(run['unaccounted_seconds'])} ms lie outside of the named regions."
        + (f" Validation and checkpoints take {_ms(between)} ms of it." if between else ""),
        *(["", idleness(run["pipeline"])] if run["pipeline"] else []),
        "",
        markdown_table(
            ["category", "ms", "share", "launches"],
            [
                [sums["category"], _ms(sums["seconds"]), f"{sums['share']:.1%}", f"{sums['launches']:,.0f}"]
                for name in CATEGORIES
                for sums in run["categories"]
                if sums["category"] == name
            ],
        ),
        "",
        markdown_table(
            ["module", "phase", "operator", "ms", "share", "launches", "GFLOP/s", "GB/s"],
            [
                [
                    *(row["module"] or "(none)", row["phase"] or "(none)", _named(row)),
                    *(_ms(row["seconds"]), f"{row['seconds'] / step['mean']:.1%}", f"{row['launches']:,.0f}"),
                    *(_giga(row["flops_per_second"]), _giga(row["bytes_per_second"])),
                ]
                for row in run["rows"][:SHOWN]
            ],
        ),
    ]
    return "\n".join(lines)


def idleness(pipeline: dict[str, Any]) -> str:
    """How idle a pipeline's stages were, in a sentence."""
    theory = "" if pipeline["theory"] is None else f"; {pipeline['theory']:.1%} in theory, with all stages alike"
    return (
        f"A pipeline of {pipeline['stages']} processes, {pipeline['micro_batches']} micro-batches a step: of the time "
        f"from the first forward to the last backward they idle {pipeline['idle_share']:.1%}{theory}."
    )


def comparison_table(comparison: dict[str, Any]) -> str:
    """Two runs side by side in Markdown, what changed most first."""
    first, second = comparison["labels"]
    total = comparison["total"]
    before, after = total["seconds"]
    changed = "saves" if total["saved_seconds"] >= 0 else "loses"
    top = comparison["operators"][0]
    lines = [
        f"## {first} and {second}",
        "",
        f"{second} takes {_ms(after)} ms a step, {first} {_ms(before)} ms: it {changed} "
        f"{_ms(abs(total['saved_seconds']))} ms ({total['speedup']:.2f}x as fast). The largest change is "
        f"{_named(top)} in {top['module'] or 'no module'}, {top['phase'] or 'no phase'}: "
        f"{_ms(top['seconds'][0])} ms, then {_ms(top['seconds'][1])} ms.",
        "",
    ]
    for names in (("category",), ("module", "phase", "category")):
        rows = comparison["categories"] if names == ("category",) else comparison["rows"][:SHOWN]
        lines += [
            markdown_table(
                [*names, f"{first}, ms", f"{second}, ms", "saved, ms", "share of gain", "launches", "GFLOP/s", "GB/s"],
                [
                    [
                        *(row[name] or "(none)" for name in names),
                        *(_ms(row["seconds"][0]), _ms(row["seconds"][1]), _ms(row["saved_seconds"])),
                        "-" if row["share_of_gain"] is None else f"{row['share_of_gain']:.1%}",
                        " → ".join(f"{count:,.0f}" for count in row["launches"]),
                        " → ".join(map(_giga, row["flops_per_second"])),
                        " → ".join(map(_giga, row["bytes_per_second"])),
                    ]
                    for row in rows
                ],
            ),
            "",
        ]
    return "\n".join(lines).rstrip()


def _named(row: dict[str, Any]) -> str:
    kernel = row.get("kernel") or ""
    return row["operator"] + (f" ({kernel[:40]})" if kernel else "") or "(unknown)"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"


def _giga(rate: float | None) -> str:
    return "-" if rate is None or not math.isfinite(rate) else f"{rate / 1e9:,.1f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.kernels",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="one or two run folders, or trace files")
    parser.add_argument("--out", type=Path, default=Path("kernels"), help="folder for kernels.json and kernels.md")
    options = parser.parse_args(argv)
    if len(options.runs) > 2:
        raise UserError(f"{len(options.runs)} runs: give one, or two to compare")
    recordings = [read_recording(path) for path in options.runs]
    labels = [recording.label for recording in recordings]
    if len(set(labels)) < len(labels):
        for recording in recordings:
            recording.label = str(recording.path)
    accounts = [account(recording) for recording in recordings]
    comparison = compare(recordings, accounts) if len(recordings) == 2 else None
    runs = [describe(recording, found) for recording, found in zip(recordings, accounts, strict=True)]
    text = "\n\n".join([*([comparison_table(comparison)] if comparison else []), *map(table, runs)])
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "kernels.json", content(runs, comparison))
    write_text(options.out / "kernels.md", f"# Where the time goes\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    run_command(main)
