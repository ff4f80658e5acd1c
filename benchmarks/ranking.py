"""What a training step spends its time on: the operators of one side, ranked by their own time.

    python -m benchmarks.ranking optimized --batch 1

Compiled kernels are named after the operators fused in them; matrix products with the vocabulary stand by themselves.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import sides
from benchmarks.rounds import machine
from benchmarks.sides import VOCABULARY, Case
from train.utils.command import run_command
from train.utils.tables import markdown_table
from train.utils.third_party_warnings import silence_third_party_warnings

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::addmm_",
    "aten::bmm",
    "aten::linear",
    "mkl::_mkl_linear",
    "mkldnn::_linear_pointwise",
)


def label(event: Any) -> str:
    """An operator's name without its namespace; a product with the vocabulary says so."""
    name = event.key.removeprefix("aten::")
    if event.key not in PRODUCTS:
        return name
    sizes = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
    return f"{name}, vocabulary" if any(size >= VOCABULARY for size in sizes) else f"{name}, blocks"


def ranking(events: Iterable[Any], attribute: str, steps: int, most: int) -> list[list[str]]:
    """Rows of milliseconds a step, share and calls a step, the dearest first, and all that is left in the last."""
    microseconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        microseconds[label(event)] += getattr(event, attribute)
        calls[label(event)] += event.count
    total = sum(microseconds.values())
    ranked = sorted(microseconds, key=microseconds.__getitem__, reverse=True)
    rows = [(name, microseconds[name], calls[name]) for name in ranked[:most]]
    left = ranked[most:]
    rows.append((f"{len(left)} others", sum(microseconds[name] for name in left), sum(calls[name] for name in left)))
    rows.append(("all", total, sum(calls.values())))
    return [
        [name, f"{taken / steps / 1e3:,.1f}", f"{taken / total:.1%}", f"{count / steps:,.0f}"]
        for name, taken, count in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", metavar="SIDE", help=", ".join(sides.SIDES))
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--most", type=int, default=14, help="operators in the table")
    sides.add_case_arguments(parser)
    args = parser.parse_args()
    silence_third_party_warnings()
    torch.set_num_threads(args.threads)
    torch._inductor.config.cpp.enable_kernel_profile = True
    name = sides.named(args.side, args.dtype)
    case = Case(args.size, args.block, args.batch, args.device, args.nanogpt)
    side = sides.build(name, case)
    sides.warm_up(side, case)
    on_gpu = args.device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(args.steps):
            side.step(*case.tokens())
    rows = ranking(
        profiler.key_averages(group_by_input_shape=True),
        "self_device_time_total" if on_gpu else "self_cpu_time_total",
        args.steps,
        args.most,
    )
    print(f"{name}, {args.size}, {args.batch} x {args.block} tokens; {machine(args.device)}\n")
    print(markdown_table(["operator", "ms a step", "share", "calls a step"], rows))


if __name__ == "__main__":
    run_command(main)
