"""The parity test: every layout trains the same steps, compared with stock GPT-2 in float64.

Each run is the real command in processes of its own (fp32, gloo, on the CPU); what is compared are the files that it
writes. `train.parity.reference` is the reference implementation, `train.parity.differences` defines what is compared.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from train.config.arguments import ArgumentParser
from train.parity.cases import LAYOUTS, Case, launch
from train.parity.differences import differences
from train.parity.reference import STEPS, Reference, train_reference, write_problem
from train.parity.results import Result, as_json, report, table, verdict
from train.utils.command import run_command
from train.utils.errors import FAILED, UserError
from train.utils.files import write_json, write_text
from train.utils.third_party_warnings import silence_third_party_warnings


def run_cases(cases: Sequence[Case]) -> list[Result]:
    """Run every case and compare it; the files of a run are deleted before the next one starts."""
    results = []
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        problem = Path(folder) / "problem"
        write_problem(problem)
        references = {limit: train_reference(problem, limit) for limit in {case.max_grad_norm for case in cases}}
        with tqdm(cases, desc="parity", unit="run", smoothing=0) as bar:
            for case in bar:
                bar.set_postfix_str(case.label)
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    results.append(_run_case(case, problem, Path(out), references[case.max_grad_norm]))
                if reason := results[-1].reason:
                    bar.write(f"RED  {case.label}: {reason}")
    return results


def _run_case(case: Case, problem: Path, out: Path, reference: Reference) -> Result:
    start = time.perf_counter()
    error = launch(case.argv(problem, out), out / "log")
    seconds = time.perf_counter() - start
    if error is not None:
        return Result(case, seconds, error=error)
    try:
        return Result(case, seconds, differences(out / case.layout.run_type, reference))
    except (OSError, SafetensorError, UserError, ValueError) as unreadable:
        return Result(case, seconds, error=f"its files cannot be compared: {unreadable}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    names = list(LAYOUTS)
    parser = ArgumentParser(
        prog="python -m train.parity",
        description=f"Train {STEPS} steps on every layout, with and without activation checkpointing and clipping, "
        "and compare each run with stock GPT-2 in float64. Exit code 1 when a run differs or fails.",
        epilog="example:\n  python -m train.parity --out parity\n\nOn two cores it takes half an hour to an hour.",
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=names,
        default=names,
        metavar="LAYOUT",
        help=f"layouts to run, out of {', '.join(names)}",
    )
    parser.add_argument(
        "--accumulation",
        nargs="+",
        type=int,
        choices=(1, 2, 4, 8),  # each divides the global batch on four processes
        default=[1, 2, 8],
        metavar="MICRO_BATCHES",
        help="numbers of micro-batches per step, out of 1, 2, 4, 8 (default: 1 2 8)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write parity.json and parity.md here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    layouts = [name for name in LAYOUTS if name in arguments.layouts]
    if arguments.out is not None:  # fail now rather than after the runs
        if arguments.out.exists() and not arguments.out.is_dir():
            raise UserError(f"--out {arguments.out} is a file: give a folder")
        arguments.out.mkdir(parents=True, exist_ok=True)
    silence_third_party_warnings()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run and its folder are removed
    accumulations = sorted(set(arguments.accumulation))
    results = run_cases([Case(*case) for case in product(layouts, accumulations, (False, True), (False, True))])
    if arguments.out is not None:
        write_json(arguments.out / "parity.json", as_json(results))
        write_text(arguments.out / "parity.md", report(results))
    print(f"{table(results)}\n\n{verdict(results)}")
    if any(result.reason for result in results):
        sys.exit(FAILED)


if __name__ == "__main__":
    run_command(main)
