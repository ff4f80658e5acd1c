"""Peak memory of a training step by block size and batch, each side in a process of its own.

    python -m benchmarks.memory --blocks 512 1024 2048 4096 8192 --batches 1 4

On a GPU, the peak of allocated memory; on a CPU, the peak of resident memory, of which Python and its libraries take
about 0.4 GB. A step that needs more than there is has the cell "more than ...".
"""

import sys
from itertools import product

import psutil
import torch

from benchmarks import sides
from benchmarks.rounds import machine
from benchmarks.sides import Case, side_process
from train.metrics.peak_memory import peak_memory
from train.utils.command import run_command
from train.utils.tables import markdown_table

GIB = 2**30
# In the errors of torch, C++ and Python when memory is exhausted, or has ended the process.
OUT_OF_MEMORY = ("can't allocate memory", "OutOfMemoryError", "bad_alloc", "MemoryError", "Cannot allocate memory",
                 "BrokenProcessPool")  # fmt: skip


def step_alone(name: str, case: Case) -> int:
    """Peak bytes of this process, which builds one side and takes a step with the optimizer's state in place."""
    side = sides.build(name, case)
    for parameter in side.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    side.optimizer.step()
    side.optimizer.zero_grad()
    side.step(*case.tokens())
    return peak_memory(case.device)["peak_memory_bytes"]


def peak(name: str, case: Case, threads: int, limit: int) -> int | None:
    """Peak bytes of a side in a new process; None if it needs more than `limit`, or than the GPU has."""
    with side_process(threads, limit if case.device == "cpu" else None) as process:
        try:
            return process.submit(step_alone, name, case).result()
        except Exception as error:  # each kind of memory has its own
            # The cause is the traceback of the process, where the first error may not be the last.
            if any(message in f"{error!r} {error.__cause__}" for message in OUT_OF_MEMORY):
                return None
            raise


def cell(found: int | None, base: int | None, limit: int) -> str:
    """A peak in GiB, with its ratio to the first side's."""
    if found is None:
        return f"more than {limit / GIB:.0f}"
    return f"{found / GIB:.2f}" + (f" ({found / base:.2f})" if base else "")


def main() -> None:
    parser = sides.make_side_parser(
        __doc__, sides=["baseline", "optimized", "selective", "checkpointed"], blocks=[512, 1024, 2048, 4096, 8192],
        batches=[1, 4],
    )  # fmt: skip
    available = 0.9 * psutil.virtual_memory().available / GIB
    parser.add_argument("--limit", type=float, default=available, metavar="GIB", help="memory limit on a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [sides.resolve_name(side, args.dtype) for side in args.sides]
    limit = int(args.limit * GIB)
    shapes = product(args.batches, args.blocks)
    cases = [Case(args.size, block, batch, args.device, args.nanogpt) for batch, block in shapes]
    print(f"{args.size}; {machine(args.device)}\nGiB, and the ratio to {names[0]}\n", flush=True)
    rows = []
    for case in cases:
        found = [peak(name, case, args.threads, limit) for name in names]
        rows.append([str(case.batch), str(case.block), *(cell(each, found[0], limit) for each in found)])
        print(" ".join(rows[-1]), file=sys.stderr)
    print(markdown_table(["batch", "block", *names], rows))


if __name__ == "__main__":
    run_command(main)
