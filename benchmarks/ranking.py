"""Where the time of a training step goes: the operators of one side, ranked by their own time.

    python -m benchmarks.ranking optimized --batch 1

Compiled kernels are named after the operators fused in them; matmuls with the vocabulary have rows of their own.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import profile

from benchmarks import sides
from benchmarks.rounds import machine
from benchmarks.sides import VOCABULARY, Case
from train.kernels import op_costs
from train.utils.command import run_command
from train.utils.devices import profiler_activities
from train.utils.tables import markdown_table
from train.utils.third_party_warnings import silence_third_party_warnings

MATMULS = {*op_costs.MATMULS, "aten::linear", "mkl::_mkl_linear", "mkldnn::_linear_pointwise"}


def label(event: Any) -> str:
    """An operator's name without its namespace, and for a matmul whether it is with the vocabulary."""
    name = event.key.removeprefix("aten::")
    if event.key not in MATMULS:
        return name
    sizes = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
    return f"{name}, vocabulary" if any(size >= VOCABULARY for size in sizes) else f"{name}, blocks"


def ranking(events: Iterable[Any], attribute: str, steps: int, top: int) -> list[list[str]]:
    """Rows of milliseconds per step, share and calls per step: the `top` operators, all others, and their sum."""
    microseconds, calls = Counter[str](), Counter[str]()
    for event in events:
        microseconds[label(event)] += getattr(event, attribute)
        calls[label(event)] += event.count
    names = [name for name, _ in microseconds.most_common()]
    groups = {name: [name] for name in names[:top]} | {f"{len(names[top:])} others": names[top:], "all": names}
    rows = []
    for group, members in groups.items():
        taken, count = sum(microseconds[name] for name in members), sum(calls[name] for name in members)
        share = taken / microseconds.total()
        rows.append([group, f"{taken / steps / 1e3:,.1f}", f"{share:.1%}", f"{count / steps:,.0f}"])
    return rows


def main() -> None:
    parser = sides.make_side_parser(__doc__, block=1024, batch=1, steps=3)
    parser.add_argument("side", metavar="SIDE", help=", ".join(sides.SIDES))
    parser.add_argument("--most", type=int, default=14, help="number of operators in the table")
    args = parser.parse_args()
    silence_third_party_warnings()
    torch.set_num_threads(args.threads)
    torch._inductor.config.cpp.enable_kernel_profile = True
    name = sides.resolve_name(args.side, args.dtype)
    case = Case(args.size, args.block, args.batch, args.device, args.nanogpt)
    side = sides.build(name, case)
    sides.warm_up(side, case)
    with profile(activities=profiler_activities(torch.device(args.device)), record_shapes=True) as profiler:
        for _ in range(args.steps):
            side.step(*case.tokens())
    events = profiler.key_averages(group_by_input_shape=True)
    attribute = "self_cpu_time_total" if args.device == "cpu" else "self_device_time_total"
    print(f"{name}, {args.size}, {args.batch} x {args.block} tokens; {machine(args.device)}\n")
    header = ["operator", "ms per step", "share", "calls per step"]
    print(markdown_table(header, ranking(events, attribute, args.steps, args.most)))


if __name__ == "__main__":
    run_command(main)
