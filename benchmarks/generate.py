"""Generation on a CPU: stock GPT-2 with transformers' `generate()`, ours in fp32, and ours in int8.

    python -m benchmarks.generate --threads 2 --batch_sizes 1 8
    python -m benchmarks.generate --sides stock ours compiled --cache static

Greedy, with the same random weights on all sides; no token ends a sequence. Before anything is timed, fp32 sides must
generate the same tokens, and int8 must have the same logits up to `INT8_TOLERANCE`. The sides alternate within each
round.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.arguments import make_parser
from benchmarks.rounds import SPEED_UP_HEADERS, Round, machine, speed_up, spread, take_turns
from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.checkpoints.loading import SIZES
from train.generate.cpu_layers import pack_weights, quantize_int8
from train.generate.decoding import Decoding
from train.generate.latency import timed
from train.utils.command import run_command
from train.utils.tables import markdown_table
from train.utils.third_party_warnings import silence_third_party_warnings

INT8_TOLERANCE = 0.1  # of the logits' norm, for random weights; with trained weights the error is ten times smaller
SIDES = ("stock", "ours", "int8", "compiled")


class Side(NamedTuple):
    model: Any
    decoding: Decoding


@dataclass(frozen=True)
class Generated(Round):
    """The cost of one `generate()`, and the seconds to its first token."""

    first_token: float


def make_sides(names: list[str], size: str, rows: int, new_tokens: int, static: bool) -> dict[str, Side]:
    """The models that generate `rows` sequences, all with the weights of one seed."""
    n_layer, n_head, n_embd, deviation = SIZES[size]
    shape: dict[str, Any] = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "initializer_range": deviation}
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    ours = GPT2FlashForCausalLM._from_config(GPT2FlashConfig(**shape), attn_implementation="sdpa").eval()
    ours.load_state_dict(stock.state_dict())
    greedy = partial(Decoding, new_tokens, temperature=0)
    chosen = greedy(static_cache=static)
    make = {
        "stock": lambda: Side(stock, greedy(growing_cache=False)),
        "ours": lambda: Side(pack_weights(ours, rows), chosen),
        "int8": lambda: Side(quantize_int8(ours), chosen),
        "compiled": lambda: Side(ours, greedy(static_cache=True, compiled=True)),
    }
    return {name: make[name]() for name in names}


def check_same(sides: dict[str, Side], ids: Tensor) -> None:
    """Exit with a message unless every side computes what the first one does."""
    first, *others = sides
    settings = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        expected = sides[first].model(ids).logits
        tokens = sides[first].model.generate(ids, **settings, **sides[first].decoding.arguments())
        for name in others:
            model, decoding = sides[name]
            error = ((model(ids).logits - expected).norm() / expected.norm()).item()
            if name == "int8" and error > INT8_TOLERANCE:
                raise SystemExit(f"int8's logits are {error:.1%} off, more than {INT8_TOLERANCE:.0%}")
            if name != "int8" and not torch.equal(model.generate(ids, **settings, **decoding.arguments()), tokens):
                raise SystemExit(f"{name} does not generate the tokens of {first}")
            print(f"{name}: {'the same tokens, ' if name != 'int8' else ''}logits off by {error:.1e} of their norm")


def run(side: Side, ids: Tensor) -> Generated:
    cpu = time.process_time()
    timer = timed(side.model, ids, side.decoding)
    wall = timer.times[-1] - timer.times[0]
    return Generated(wall, time.process_time() - cpu, timer.first_token_seconds)


def table_row(
    name: str, batch_size: int, new_tokens: int, base: Sequence[Generated], own: Sequence[Generated]
) -> list[str]:
    """Medians and ranges over the rounds, and the speed-up over `base`."""
    speeds = [batch_size * new_tokens / each.wall for each in own]
    first_token = 1e3 * statistics.median(each.first_token for each in own)
    return [name, str(batch_size), f"{first_token:.0f}", spread(speeds, 1), *speed_up(base, own)]


def main() -> None:
    parser = make_parser(__doc__, size="gpt2", batch_sizes=[1, 8], prompt_tokens=32, new_tokens=48, rounds=7,
                         threads=torch.get_num_threads())  # fmt: skip
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES[:3], help="all are compared with the first")
    parser.add_argument("--cache", choices=["dynamic", "static"], default="dynamic", help="cache of ours and of int8")
    args = parser.parse_args()
    silence_third_party_warnings()
    torch.set_num_threads(args.threads)
    print(f"{args.size}, a prompt of {args.prompt_tokens} tokens, {args.new_tokens} new; {machine('cpu')}")
    rows = []
    for batch_size in args.batch_sizes:
        print(f"\nbatch {batch_size}")
        sides = make_sides(args.sides, args.size, batch_size, args.new_tokens, args.cache == "static")
        ids = torch.randint(50257, (batch_size, args.prompt_tokens), generator=torch.Generator().manual_seed(1))
        check_same(sides, ids)
        runs = {name: partial(run, side, ids) for name, side in sides.items()}
        take_turns(runs, rounds=1)
        taken = take_turns(runs, args.rounds)
        base = taken[args.sides[0]]
        rows += [table_row(name, batch_size, args.new_tokens, base, own) for name, own in taken.items()]
    header = ["side", "batch", "first token (ms)", "tokens/s (min to max)", *SPEED_UP_HEADERS]
    print(f"\n{markdown_table(header, rows)}")


if __name__ == "__main__":
    run_command(main)
