"""The training loss, forward and backward: full logits, compiled or not, in chunks, and `linear_cross_entropy`.

    python -m benchmarks.loss --rows 2048 --width 128 --dtype bfloat16

The sides alternate within each round. Each side runs once before it is timed, and its loss is compared with an fp64
reference. The rows are batch x block; the width 128 is tiny's, 768 gpt2's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arguments import make_parser
from benchmarks.rounds import SPEED_UP_HEADERS, alternate, machine, speed_up, spread
from modeling_gpt2flash.loss import causal_lm_loss
from train.utils.command import run_command
from train.utils.devices import device_type
from train.utils.tables import markdown_table

VOCABULARY = 50257
Side = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows, weight).float(), targets)


def ours(chunk: int) -> Side:
    return lambda rows, weight, targets: causal_lm_loss(
        rows[None], weight, None, shift_labels=targets[None], chunk_size=chunk
    )


def torchs(chunk: int, policy: Any) -> Side:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, acc_policy=policy)
    return lambda rows, weight, targets: F.linear_cross_entropy(rows, weight, targets, options=options)


def main() -> None:
    parser = make_parser(__doc__, rows=2048, width=128, rounds=5, device=device_type())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()

    sides: dict[str, Side] = {"full logits": full, "full logits, compiled": torch.compile(full, dynamic=False)}
    sides |= {f"ours, {chunk} rows": ours(chunk) for chunk in (256, 512, 1024)}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
        sides |= {f"torch, 512 rows, {policy}": torchs(512, policy) for policy in ("auto", "accurate", "compact")}

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    rows = torch.randn(args.rows, args.width, device=args.device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(VOCABULARY, args.width, device=args.device)).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (args.rows,), device=args.device)
    reference = F.cross_entropy(rows.detach().double() @ weight.detach().double().T, targets).item()

    def step(side: Side) -> None:
        rows.grad = weight.grad = None
        side(rows, weight, targets).backward()

    errors = {name: side(rows, weight, targets).item() - reference for name, side in sides.items()}
    timed = {name: partial(step, side) for name, side in sides.items()}
    alternate(timed, rounds=1)  # compiles the backward passes as well
    taken = alternate(timed, args.rounds)

    print(f"{args.rows} rows, width {args.width}, {args.dtype}; {machine(args.device)}\n")
    cells = [
        [name, spread([each.wall for each in own], 3), *speed_up(taken["full logits"], own), f"{errors[name]:+.1e}"]
        for name, own in taken.items()
    ]
    print(markdown_table(["loss, forward and backward", "seconds", *SPEED_UP_HEADERS, "error"], cells))


if __name__ == "__main__":
    run_command(main)
