"""Plan a run before it is started: which layouts fit into memory, which is the fastest, and its command.

  python -m train.plan --model gpt2-xl --block_size 1024 --world_size 8 --device_memory 80GB

Tries every layout of this trainer (one process, DDP, FSDP2, ZeRO-1/2/3 with and without offload, 1F1B pipelines), with
no, selective and full activation checkpointing, and with all sizes of micro-batches that divide the step. Memory is
computed by arithmetic that the tests compare with measured steps; speed is an estimate for ranking, whose assumptions
are printed.
"""

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import get_args

from train.checkpoints.loading import load_config
from train.config.arguments import ArgumentParser, number
from train.engines.pipeline.partition import partition
from train.plan.memory import Ledger, predict
from train.plan.shapes import ActivationCheckpointing, Layout, Shape
from train.plan.speed import DEVICES, Device, Speed, predict_speed
from train.utils.command import run_command
from train.utils.errors import UserError, shortened
from train.utils.tables import markdown_table
from train.utils.third_party_warnings import silence_third_party_warnings

MOST_LAYERS = 10_000  # each is computed for itself
USABLE = 0.9  # of the device's memory; the rest is for the driver, libraries and an allocator's gaps
UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Plan:
    shape: Shape
    layout: Layout
    memory: Ledger
    speed: Speed

    @property
    def name(self) -> str:
        layout = self.layout
        if layout.stages > 1:
            return f"pipeline of {layout.stages}" + (f" x {layout.data_parallel}" if layout.data_parallel > 1 else "")
        names = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "zero": f"ZeRO-{layout.zero_stage}"}
        return names[layout.kind] + " offload" * layout.offload


def plans(
    model: str, block_size: int | None, world_size: int, sequences: int, device: Device, efficiency: float
) -> list[Plan]:
    """Every layout for a step of `sequences`, whether it fits or not, the fastest first.

    Raises:
        UserError: if the model is unknown, or no layout can have these numbers.
    """
    config = load_config(model)
    block_size = block_size or config.n_positions
    if block_size > config.n_positions:
        raise UserError(f"--block_size {block_size}: {model} has {config.n_positions} positions; ask for fewer")
    if config.n_layer > MOST_LAYERS:
        raise UserError(f"--model {model}: has {config.n_layer:,} layers; a plan is made for {MOST_LAYERS:,} at most")
    shape = Shape.of(config, block_size)
    found = []
    for layout in _layouts(world_size, len(shape.layers), device):
        bounds = partition(config, layout.stages, block_size=block_size).bounds if layout.stages > 1 else ()
        layout = replace(layout, bf16=device.has_bf16, device=device.kind, bounds=bounds)
        share, rest = divmod(sequences, layout.data_parallel)
        micro_batches = [number for number in range(1, share + 1) if not rest and share % number == 0]
        for micro_batch, mode in product(micro_batches, get_args(ActivationCheckpointing)):
            accumulation = share // micro_batch
            layout = replace(layout, micro_batch=micro_batch, accumulation=accumulation, activation_checkpointing=mode)
            speed = predict_speed(shape, layout, device, efficiency)
            found.append(Plan(shape, layout, predict(shape, layout), speed))
    if not found:
        raise UserError(
            f"--sequences_per_step {sequences}: cannot be divided among {world_size} processes; give a multiple of it"
        )
    # Of equally fast ones, the one with less memory.
    return sorted(found, key=lambda plan: (-plan.speed.tokens_per_second, plan.memory.peak))


def _layouts(world_size: int, layers: int, device: Device) -> Iterator[Layout]:
    """`layers`: those that a pipeline can be split into: embeddings, blocks, final norm, head."""
    if world_size == 1:
        yield Layout("single", 1)
    else:
        yield Layout("ddp", world_size)
        yield Layout("fsdp2", world_size)
    for stage in (1, 2, 3):
        for offload in (False, True):
            # A single process has nothing to shard, and a CPU is its own host.
            if (not offload or device.kind == "gpu") and (offload or world_size > 1):
                yield Layout("zero", world_size, zero_stage=stage, offload=offload)
    for stages in range(2, min(world_size, layers) + 1):
        if world_size % stages == 0:
            yield Layout("zero", world_size, zero_stage=1, stages=stages)


def command(plan: Plan, model: str) -> str:
    """The command that starts the plan here, with a shipped configuration and the default data and folders."""
    layout = plan.layout
    launcher = ["accelerate", "launch", *layout.launcher_flags] if layout.launcher_flags else ["python"]
    attention = "sdpa" if layout.activation_checkpointing == "selective" else "auto"
    words = [*launcher, "-m", "train", *layout.flags, "--model", model, "--block_size", str(plan.shape.block_size)]
    words += ["--attn_implementation", attention, "--loss_chunk_size", str(layout.loss_chunk_size)]
    words += ["--mixed_precision", "bf16" if layout.bf16 else "no"]
    return shlex.join(words).replace(" --", " \\\n    --")


def best_of_each(found: Sequence[Plan], limit: float) -> list[Plan]:
    """The fastest plan of each layout that fits, the fastest first."""
    best: dict[str, Plan] = {}
    for plan in found:
        if plan.memory.peak <= limit:
            best.setdefault(plan.name, plan)
    return list(best.values())


def table(chosen: Sequence[Plan]) -> str:
    columns = "layout, micro-batch, accumulation, checkpointing, GB per process, tokens/s, idle, communication"
    rows = []
    for plan in chosen:
        layout, speed = plan.layout, plan.speed
        rows.append([
            plan.name,
            str(layout.micro_batch),
            str(layout.accumulation),
            layout.activation_checkpointing,
            f"{plan.memory.peak / 1e9:.3g}",
            f"{speed.tokens_per_second:,.0f}",
            f"{speed.bubble / speed.seconds:.1%}",
            f"{speed.communication / speed.seconds:.1%}",
        ])  # fmt: skip
    return markdown_table(columns.split(", "), rows)


def assumptions(device: Device, efficiency: float, limit: float, layout: Layout) -> str:
    return "\n".join([
        f"- {'bf16' if layout.bf16 else 'fp32'}, fused attention, loss in chunks of {layout.loss_chunk_size} rows "
        "(FSDP2: full logits), not compiled, no dropout, AdamW",
        f"- memory: tensors up to {limit / 1e9:.1f} GB, {USABLE:.0%} of a device's; with the bucket sizes in "
        "ds_configs",
        f"- arithmetic: {efficiency:.0%} of {device.flops(layout.bf16) / 1e12:g} TFLOP/s ({device.name}), and what is "
        "recomputed",
        "- offloaded state needs 16 to 18 bytes of host memory per parameter, which is not checked",
        f"- links: {device.link / 1e9:g} GB/s between processes, {device.host_link / 1e9:g} GB/s to the host",
    ])  # fmt: skip


def size(text: str) -> float:
    """ "80GB" -> 80e9 bytes; "40GiB", "512MB" and plain numbers as well."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or not 0 < float(match[1]) < 1e30:
        raise argparse.ArgumentTypeError(
            f"{shortened(text)} is not a size in bytes; write, for example, 80GB or 24GiB"
        )
    return float(match[1]) * UNITS[match[2].upper()]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m train.plan", description=__doc__)
    add, count = parser.add_argument, number(int, at_least=1)
    add("--model", default="gpt2", help="gpt2, gpt2-medium, ..., or a model folder")
    add("--block_size", type=count, help="tokens in a sequence (default: the model's positions)")
    add("--world_size", type=number(int, at_least=1, at_most=1_000_000), default=1, help="processes, one per device")
    add("--device", choices=DEVICES, default="H100", help="the device that each process runs on")
    add("--device_memory", type=size, default="80GB", help="memory of one device, for example 24GB")
    sequences = number(int, at_least=1, at_most=1_000_000)
    whole = "global batch in sequences, over all processes (GPT-2 used 512)"
    add("--sequences_per_step", type=sequences, default=512, help=whole)
    share = number(float, above=0, at_most=1)
    add("--efficiency", type=share, default=0.4, help="fraction of its peak FLOP/s that a device reaches")
    add("--link", type=size, help="bytes/s between processes, for example 25GB (default: the device's own links)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    silence_third_party_warnings()
    device = DEVICES[args.device]
    if args.link:
        device = replace(device, link=args.link)
    limit = USABLE * args.device_memory
    found = plans(args.model, args.block_size, args.world_size, args.sequences_per_step, device, args.efficiency)
    chosen = best_of_each(found, limit)
    if not chosen:
        nearest = min(found, key=lambda plan: plan.memory.peak)
        layout = nearest.layout
        raise UserError(
            f"nothing fits into {args.device_memory / 1e9:g}GB x {USABLE:.0%}; the closest is {nearest.name}, with "
            f"micro-batches of {layout.micro_batch}, {layout.activation_checkpointing} activation checkpointing and "
            f"{nearest.memory.peak / 1e9:.3g} GB; take more processes, a smaller model or a smaller --block_size"
        )
    print(table(chosen))
    best = chosen[0]
    at_peak = ", ".join(f"{category} {amount / 1e9:.2f}" for category, amount in best.memory.at_peak.items())
    print(f"\nat the peak of the first: {at_peak} GB")
    print(f"\nassumed:\n{assumptions(device, args.efficiency, limit, best.layout)}")
    print(f"\n{command(best, args.model)}")


if __name__ == "__main__":
    run_command(main)
