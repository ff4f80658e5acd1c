"""A complete training step: ours, stock `GPT2LMHeadModel` and, given a checkout, nanoGPT.

    python -m benchmarks.train_step --batch 4 --nanogpt ~/nanoGPT --memory
    python -m benchmarks.train_step --dtype bfloat16 --sides hf-sdpa:float32 optimized nanogpt-compiled

`benchmarks/sides.py` describes the sides. All must have equal losses in their first steps before anything is timed.
Each is a process of its own, since some keep freed memory and others do not; they alternate within each round, one at
work while the others wait. On a GPU of known peak, MFU is the share of it that the model's FLOPs reach. `--memory`
adds the peak of each side, measured over one step in another process.
"""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import psutil
import torch

from benchmarks import memory, sides
from benchmarks.rounds import SPEED_UP_HEADERS, Round, machine, speed_up, spread, take_turns
from benchmarks.sides import VOCABULARY, Case, first_steps, further_step, side_process
from train.metrics.flops import count_flops, peak_flops, utilization
from train.utils.command import run_command
from train.utils.devices import device_name
from train.utils.tables import markdown_table

DEFAULT_SIDES = ("baseline", "optimized", "hf-eager", "hf-sdpa", "hf-compiled")
NANOGPT_SIDES = ("nanogpt", "nanogpt-compiled")
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


def mfu_of(name: str, case: Case, tokens_per_second: float) -> float | None:
    """MFU of a side; None on a CPU or an unknown GPU."""
    if case.device == "cpu":
        return None
    shape = case.shape
    flops = count_flops(shape["n_layer"], shape["n_embd"], None, VOCABULARY, case.block).model
    peak = peak_flops(device_name(case.device), PRECISIONS[name.partition(":")[2]])
    return utilization(tokens_per_second, flops, peak, devices=1)


def row(name: str, case: Case, base: Sequence[Round], own: Sequence[Round]) -> list[str]:
    """Step time, tokens per second, speed-up over `base`, MFU."""
    walls = [each.wall for each in own]
    rate = case.batch * case.block / statistics.median(walls)
    mfu = mfu_of(name, case, rate)
    return [name, spread(walls, 3), f"{rate:,.0f}", *speed_up(base, own), "" if mfu is None else f"{mfu:.1%}"]


def main() -> None:
    parser = sides.make_side_parser(__doc__, block=1024, batch=1, rounds=7)
    defaults = f"{' '.join(DEFAULT_SIDES)}, with --nanogpt {' '.join(NANOGPT_SIDES)}"
    parser.add_argument("--sides", nargs="+", help=f"each is compared with the first (default: {defaults})")
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = args.sides or [*DEFAULT_SIDES, *(NANOGPT_SIDES if args.nanogpt else ())]
    names = [sides.resolve_name(side, args.dtype) for side in given]
    case = Case(args.size, args.block, args.batch, args.device, args.nanogpt)
    print(f"{args.size}, {args.batch} x {args.block} tokens; {machine(args.device)}", flush=True)
    limit = int(0.9 * psutil.virtual_memory().available)
    peaks = {name: memory.peak(name, case, args.threads, limit) for name in names} if args.memory else {}

    with ExitStack() as stack:
        processes = {name: stack.enter_context(side_process(args.threads)) for name in names}

        def step(name: str) -> Round:
            return processes[name].submit(further_step, name, case).result()

        warmed_up = {name: processes[name].submit(first_steps, name, case).result() for name in names}
        print(sides.check_same(warmed_up), flush=True)
        taken = take_turns({name: partial(step, name) for name in names}, args.rounds)
    header = ["side", "step (s)", "tokens/s", *SPEED_UP_HEADERS, "MFU"]
    rows = [row(name, case, taken[names[0]], taken[name]) for name in names]
    if peaks:
        header.append("memory (GiB)")
        rows = [[*cells, memory.cell(peaks[cells[0]], peaks[names[0]], limit)] for cells in rows]
    print(f"\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    run_command(main)
