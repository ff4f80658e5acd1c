"""Causal attention kernels at growing length, forward and backward, as the model calls them.

    python -m benchmarks.attention
    python -m benchmarks.attention --sides sdpa-flash sdpa-cudnn flash_attention_3 eager --lengths 1024 4096 16384

Queries, keys and values are slices of one projection, as in the model; each length has the same number of tokens. A
round is `--repeats` calls. Outputs and gradients are compared with those of the first side before anything is timed.
FLOP/s count the causal half of the scores: 2 matmuls forward, 5 backward (FlashAttention-2, arXiv:2307.08691, 4.1).
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.arguments import make_parser
from benchmarks.rounds import alternate, machine, speed_up, spread
from modeling_gpt2flash import GPT2FlashConfig
from modeling_gpt2flash.attention import FLASH_KERNELS, choose_attention, eager_attention_forward
from modeling_gpt2flash.modeling_gpt2flash import GPT2FlashAttention
from train.checkpoints.loading import SIZES
from train.utils.command import run_command
from train.utils.devices import device_type
from train.utils.errors import UserError
from train.utils.tables import markdown_table

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SIDES = ("eager", "sdpa", *BACKENDS, *FLASH_KERNELS)
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of outputs' and gradients' norms
Attention = Callable[[Tensor], Tensor]  # (B, T, 3D) -> (B, T, D)


def make_side(name: str, size: str, dtype: torch.dtype, device: str) -> Attention:
    """The attention of one layer of `size`, without its projections; a `UserError` if the kernel cannot run here."""
    _, n_head, n_embd, _ = SIZES[size]
    implementation = "sdpa" if name in BACKENDS else name
    try:
        choose_attention(implementation, torch.device(device).type, dtype, n_embd // n_head)
    except ValueError as error:
        raise UserError(f"--sides {name}: {error}") from None
    config = GPT2FlashConfig(n_head=n_head, n_embd=n_embd)
    config._attn_implementation = implementation
    module = GPT2FlashAttention(config, 0).to(device)
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)

    def attend(qkv: Tensor) -> Tensor:
        batch, length, _ = qkv.shape
        query, key, value = (
            part.view(batch, length, n_head, -1).transpose(1, 2) for part in qkv.split(n_embd, dim=-1)
        )
        mask = None
        if name == "eager":
            mask = torch.full((1, 1, length, length), -torch.inf, dtype=dtype, device=device).triu(1)
        chosen: AbstractContextManager = sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext()
        with chosen:
            output, _ = kernel(module, query, key, value, mask, dropout=0.0, scaling=module.scaling)
        return output.reshape(batch, length, n_embd)

    return attend


def check_same(sides: dict[str, Attention], qkv: Tensor, d_output: Tensor) -> None:
    """Exit with a message unless all sides give the first one's output and gradient."""
    first, *others = sides
    expected = [each.float() for each in _output_and_gradient(sides[first], qkv, d_output)]
    for name in others:
        for what, ours, theirs in zip(
            ("output", "gradient"), _output_and_gradient(sides[name], qkv, d_output), expected, strict=True
        ):
            error = ((ours.float() - theirs).norm() / theirs.norm()).item()
            if not error <= TOLERANCES[qkv.dtype]:
                raise SystemExit(f"{name}'s {what} is {error:.1e} of its norm off {first}'s; nothing was timed")


def _output_and_gradient(side: Attention, qkv: Tensor, d_output: Tensor) -> tuple[Tensor, Tensor]:
    output = side(qkv)
    (gradient,) = torch.autograd.grad(output, qkv, d_output)
    return output.detach(), gradient


def compare(sides: dict[str, Attention], qkv: Tensor, rounds: int, repeats: int) -> list[list[str]]:
    """Table rows. Each timed call is `repeats` calls, so that a GPU has no gaps between its kernels."""
    d_output = torch.randn_like(qkv[..., : qkv.shape[-1] // 3])
    check_same(sides, qkv, d_output)

    @torch.no_grad()
    def forward(side: Attention) -> None:
        for _ in range(repeats):
            side(qkv)

    def both(side: Attention) -> None:
        for _ in range(repeats):
            _output_and_gradient(side, qkv, d_output)

    batch, length, width = qkv.shape
    matmul_flops = batch * length**2 * width / 3  # 2 x B x T x T x D, of which the causal mask leaves half
    rows = [[str(length), name] for name in sides]
    for timed, matmuls in ((forward, 2), (both, 7)):
        taken = alternate({name: partial(timed, side) for name, side in sides.items()}, rounds)
        for cells, own in zip(rows, taken.values(), strict=True):
            walls = [each.wall / repeats for each in own]
            rate = matmuls * matmul_flops / statistics.median(walls)
            cells += [spread([1e3 * wall for wall in walls]), f"{rate / 1e12:.3g}"]
            cells.append(speed_up(next(iter(taken.values())), own)[0])
    return rows


def main() -> None:
    on_cpu = device_type() == "cpu"
    lengths = [256, 1024, 2048] if on_cpu else [1024, 4096, 16384]
    parser = make_parser(__doc__, size="gpt2", lengths=lengths, rounds=7, repeats=1 if on_cpu else 20,
                         threads=torch.get_num_threads(), device=device_type())  # fmt: skip
    default = ["eager", "sdpa"] if on_cpu else ["sdpa-flash", "sdpa-cudnn", "eager"]
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=default, help="each is compared with the first")
    parser.add_argument("--tokens", type=int, help="tokens in a batch (default: the longest sequence)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32" if on_cpu else "bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    sides = {name: make_side(name, args.size, dtype, args.device) for name in args.sides}
    print(f"{args.size}'s heads, {args.dtype}; {machine(args.device)}", flush=True)
    rows = []
    for length in args.lengths:
        shape = (max(1, (args.tokens or max(args.lengths)) // length), length, 3 * SIZES[args.size][2])
        torch.manual_seed(0)
        qkv = torch.randn(shape, device=args.device, dtype=dtype).requires_grad_()
        rows += compare(sides, qkv, args.rounds, args.repeats)
    columns = [f"{passes}{unit}" for passes in ("forward", "with backward")
               for unit in (" (ms)", " (TFLOP/s)", ", speed-up")]  # fmt: skip
    print(f"\n{markdown_table(['length', 'side', *columns], rows)}")


if __name__ == "__main__":
    run_command(main)
