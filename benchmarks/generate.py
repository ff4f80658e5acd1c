"""Writing text on a CPU: stock GPT-2 under transformers' `generate()`, ours in fp32, and ours in int8.

    python -m benchmarks.generate --threads 2 --batch_sizes 1 8
    python -m benchmarks.generate --sides stock ours compiled --cache static

Greedy, the same random weights on all sides, no token stops a text. Before anything is timed, fp32 sides have to write
the same tokens and int8 has to have the same logits to `INT8_TOLERANCE`. The sides alternate within each round; the
speed-up is taken round by round, and beside it that of the quickest rounds and that in CPU seconds, which other work
on the machine disturbs less.
"""

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.rounds import machine, speed_up, spread
from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from train.checkpoints.loading import SIZES
from train.generate.cpu_layers import pack_weights, quantize_int8
from train.generate.decoding import Decoding
from train.generate.latency import timed
from train.utils.third_party_warnings import silence_third_party_warnings

INT8_TOLERANCE = 0.1  # of the logits' norm, for random weights; trained ones are an order better


class Side(NamedTuple):
    model: Any
    decoding: Decoding


class Round(NamedTuple):
    """Seconds of one text: on the clock, of the CPU, and to its first token."""

    wall: float
    cpu: float
    first_token: float


def make_sides(names: list[str], size: str, rows: int, new_tokens: int, static: bool) -> dict[str, Side]:
    """The models that write `rows` sequences, all with the weights of one seed."""
    n_layer, n_head, n_embd, deviation = SIZES[size]
    shape: dict[str, Any] = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "initializer_range": deviation}
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    ours = GPT2FlashForCausalLM._from_config(GPT2FlashConfig(**shape), attn_implementation="sdpa").eval()
    ours.load_state_dict(stock.state_dict())
    plain = Decoding(new_tokens, temperature=0, growing_cache=False)
    chosen = Decoding(new_tokens, temperature=0, static_cache=static)
    compiled = Decoding(new_tokens, temperature=0, static_cache=True, compiled=True)
    make = {
        "stock": lambda: Side(stock, plain),
        "ours": lambda: Side(pack_weights(ours, rows), chosen),
        "int8": lambda: Side(quantize_int8(ours), chosen),
        "compiled": lambda: Side(ours, compiled),
    }
    return {name: make[name]() for name in names}


def check_same(sides: dict[str, Side], ids: Tensor) -> None:
    """End with a message unless every side computes what the first one does."""
    first, *others = sides
    mask = torch.ones_like(ids)
    settings = {"attention_mask": mask, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        expected = sides[first].model(ids).logits
        tokens = sides[first].model.generate(ids, **settings, **sides[first].decoding.arguments())
        for name in others:
            model, decoding = sides[name]
            error = ((model(ids).logits - expected).norm() / expected.norm()).item()
            if name == "int8" and error > INT8_TOLERANCE:
                raise SystemExit(f"int8's logits are {error:.1%} off, more than {INT8_TOLERANCE:.0%}")
            if name != "int8" and not torch.equal(model.generate(ids, **settings, **decoding.arguments()), tokens):
                raise SystemExit(f"{name} does not write what {first} does")
            print(f"{name}: {'the same tokens, ' if name != 'int8' else ''}logits off by {error:.1e} of their norm")


def run(side: Side, ids: Tensor) -> Round:
    cpu = time.process_time()
    timer = timed(side.model, ids, side.decoding)
    return Round(timer.times[-1] - timer.times[0], time.process_time() - cpu, timer.first_token_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["stock", "ours", "int8", "compiled"]
    parser.add_argument("--sides", nargs="+", choices=names, default=names[:3], help="all are compared with the first")
    parser.add_argument("--size", choices=list(SIZES), default="gpt2")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", choices=["dynamic", "static"], default="dynamic", help="of ours and int8")
    args = parser.parse_args()
    silence_third_party_warnings()
    torch.set_num_threads(args.threads)
    print(f"{args.size}, {args.prompt_tokens} tokens of prompt, {args.new_tokens} new; {machine('cpu')}")
    rows = []
    for batch_size in args.batch_sizes:
        print(f"\nbatch {batch_size}")
        sides = make_sides(args.sides, args.size, batch_size, args.new_tokens, args.cache == "static")
        ids = torch.randint(50257, (batch_size, args.prompt_tokens), generator=torch.Generator().manual_seed(1))
        check_same(sides, ids)
        for side in sides.values():
            run(side, ids)
        rounds: dict[str, list[Round]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                rounds[name].append(run(side, ids))
        rows += [table_row(name, batch_size, args.new_tokens, rounds[args.sides[0]], rounds[name]) for name in sides]
    print(
        "\n| side | batch | first token (ms) | tokens/s (min to max) | speed-up (min to max) | of the quickest "
        "| in CPU seconds |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    print("\n".join(rows))


def table_row(name: str, batch_size: int, new_tokens: int, base: list[Round], own: list[Round]) -> str:
    """Medians of the rounds, their range, and the speed-up over `base`."""
    speeds = [batch_size * new_tokens / each.wall for each in own]
    first_token = 1e3 * statistics.median(each.first_token for each in own)
    return f"| {name} | {batch_size} | {first_token:.0f} | {' | '.join([spread(speeds, 1), *speed_up(base, own)])} |"


if __name__ == "__main__":
    main()
