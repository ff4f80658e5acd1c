"""Compute a step of a run again and look at each of its values: `python -m train.replay RUN --step N`."""

import argparse
from pathlib import Path

from train.config.arguments import ArgumentParser, number
from train.utils import processes
from train.utils.command import run_command
from train.utils.errors import UserError

DESCRIPTION = """\
Compute a step of a run again, in one process, and show where the first value that is not finite appears, or else the
largest values: in which module and operator, in the forward or the backward pass, in which micro-batch and which text.

The run's last intact checkpoint before the step is loaded, and the steps in between are computed as in the run, with
the same tokens in the same order and the recorded learning rates. In fp32 the loss equals the recorded one; in bf16,
and on another kind of device, it does up to rounding.
"""
EXAMPLES = """examples:
  the step before which a run stopped because its loss was not finite
    python -m train.replay checkpoint/optimized
  any step that has a checkpoint before it
    python -m train.replay checkpoint/optimized --step 1200
"""


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="python -m train.replay", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder with checkpoints")
    parser.add_argument(
        "--step",
        type=number(int, at_least=1),
        help="the step to compute, from 1 (default: the step after the last recorded one)",
    )
    parser.add_argument(
        "--train_data_path", type=Path, metavar="FILE", help="the run's token file, if it is elsewhere now"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    if processes.world_size() > 1:
        raise UserError(
            "python -m train.replay: runs in a single process, however many the run used; start it without a launcher"
        )
    if not arguments.run.is_dir():
        raise UserError(f"{arguments.run} is not a folder: give the run folder that training wrote")
    from train.utils.third_party_warnings import silence_third_party_warnings

    silence_third_party_warnings()
    from tqdm import tqdm

    from train.replay.rebuild import Replay
    from train.replay.report import report
    from train.replay.search import ValueSearch

    replay = Replay(arguments.run, arguments.step, arguments.train_data_path)
    for note in replay.notes():
        print(note)
    first = replay.checkpoint.step + 1
    for step in tqdm(range(first, replay.step), desc="steps before", unit="step", disable=first == replay.step):
        replay.compute(step)
    with ValueSearch(replay.engine.module) as search:
        result = replay.compute(replay.step)
    print(f"step {replay.step:,} of {arguments.run}, computed from {replay.checkpoint.folder.name}")
    recorded = replay.records.get(replay.step, {}).get("loss")
    was = "not recorded, or not a number" if recorded is None else f"recorded {recorded:.9g}"
    print(f"loss {result.loss:.9g}, {was}; gradient norm {result.grad_norm:.6g}")
    for line in report(replay, search):
        print(line)


if __name__ == "__main__":
    run_command(main)
