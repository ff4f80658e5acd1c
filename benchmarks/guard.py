"""The time that guards and digests take in a training step.

    python -m benchmarks.guard --size gpt2 --block 256 --batch 1

Guard: what a step does after the backward pass to decide about its update, with the rule for spikes and full windows;
the norm of the gradient, which clipping needs as well, does not count. Digests: those of the weights and moments of a
checkpoint, and the test that they are finite, with a checkpoint every half hour.
"""

import statistics
import time

import torch

from benchmarks.arguments import make_parser
from benchmarks.rounds import machine, spread
from modeling_gpt2flash import GPT2FlashForCausalLM
from train.checkpoints.digests import PIECE_BYTES, TensorDigest
from train.checkpoints.loading import model_config
from train.checkpoints.step_folder import GuardState
from train.config.run_config import parse
from train.engines.accelerated import AcceleratedEngine
from train.engines.base import Review
from train.run.guard import WINDOW, Guard
from train.run.setup import SAVE_MINUTES
from train.utils.command import run_command
from train.utils.tables import markdown_table


def step_seconds(engine: AcceleratedEngine, block: int, batch: int, rounds: int) -> tuple[list[float], list[float]]:
    """The seconds of each step, and of its review."""
    earlier = [float(value % 7) for value in range(WINDOW)]
    guard = Guard(parse(["--on_spike=warn"]), GuardState(0, losses=earlier, grad_norms=earlier))
    review = engine._review
    reviews: list[float] = []

    def timed(norm: torch.Tensor) -> bool:
        began = time.perf_counter()
        accepted = review(norm)
        reviews.append(time.perf_counter() - began)
        return accepted

    engine._review = timed  # type: ignore[assignment]
    ids = torch.randint(engine.module.config.vocab_size, (batch, block + 1))
    tensors = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
    steps = []
    for step in range(rounds + 1):  # the first allocates
        began = time.perf_counter()
        engine.train_step(step, [tensors], 1e-5, Review(guard.accepts, lambda: (False, False)))
        steps.append(time.perf_counter() - began)
    return steps[1:], reviews[1:]


def digest_seconds(model: GPT2FlashForCausalLM) -> float:
    """For the weights; each of the two moments takes as long."""
    began = time.perf_counter()
    for parameter in model.parameters():
        digest, values = TensorDigest(), parameter.detach().numpy().reshape(-1)
        for start in range(0, len(values), PIECE_BYTES // 4):
            digest.update(values[start : start + PIECE_BYTES // 4])
        digest.hexdigest()
    return time.perf_counter() - began


def main() -> None:
    args = make_parser(__doc__, size="gpt2", block=256, batch=1, rounds=9).parse_args()
    flags = [f"--model={args.size}", "--attn_implementation=auto", "--mixed_precision=no", "--learning_rate=1e-5"]
    flags += ["--gradient_accumulation_steps=1"]
    engine = AcceleratedEngine(parse(flags), {})
    model = GPT2FlashForCausalLM(model_config(args.size, dropout=0.0, loss_chunk_size=512))
    engine.prepare(model)
    steps, reviews = step_seconds(engine, args.block, args.batch, args.rounds)
    digests = [3 * digest_seconds(model) for _ in range(args.rounds)]
    step = statistics.median(steps)
    per_step = [each * step / (60 * SAVE_MINUTES) for each in digests]
    print(f"{args.size}, {args.batch} x {args.block} tokens: {spread(steps)} s per step; {machine('cpu')}\n")
    rows = [
        [name, spread([1e3 * each for each in own], 3), f"{statistics.median(own) / step:.4%}"]
        for name, own in (("guard", reviews), ("digests", per_step))
    ]
    print(markdown_table(["part", "ms per step", "of a step"], rows))
    engine.close()


if __name__ == "__main__":
    run_command(main)
