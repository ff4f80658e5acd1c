"""The training loss, forward and backward: full logits, compiled or not, in chunks, and `linear_cross_entropy`.

    python -m benchmarks.loss --rows 2048 --width 128 --dtype bfloat16

The sides alternate within each round, so that a machine whose speed drifts treats them alike; the ratio is taken round
by round. Each side runs once before it is timed, and its loss is held against an fp64 reference.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rounds import alternate, machine, speed_up, spread
from modeling_gpt2flash.loss import causal_lm_loss
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="batch x block")
    parser.add_argument("--width", type=int, default=128, help="hidden width: 128 is tiny's, 768 gpt2's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default=device_type())
    args = parser.parse_args()

    sides: dict[str, Side] = {"full logits": full, "full logits, compiled": torch.compile(full, dynamic=False)}
    sides |= {f"ours, {c} rows": ours(c) for c in (256, 512, 1024)}
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
        sides |= {f"torch, 512 rows, {policy}": torchs(512, policy) for policy in ("auto", "accurate", "compact")}

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    rows = torch.randn(args.rows, args.width, device=args.device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(VOCABULARY, args.width, device=args.device)).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (args.rows,), device=args.device)
    reference = F.cross_entropy(rows.detach().double() @ weight.detach().double().T, targets).item()

    def once(side: Side) -> None:
        rows.grad = weight.grad = None
        side(rows, weight, targets).backward()

    errors = {name: side(rows, weight, targets).item() - reference for name, side in sides.items()}
    timed = {name: partial(once, side) for name, side in sides.items()}
    alternate(timed, rounds=1)  # compiles backward passes as well
    taken = alternate(timed, args.rounds)

    print(f"{args.rows} rows, width {args.width}, {args.dtype}; {machine(args.device)}\n")
    cells = [
        [name, spread([each.wall for each in own], 3), *speed_up(taken["full logits"], own), f"{errors[name]:+.1e}"]
        for name, own in taken.items()
    ]
    header = ["loss, forward and backward", "seconds", "speed-up", "of the quickest", "in CPU seconds", "error"]
    print(markdown_table(header, cells))


if __name__ == "__main__":
    main()
