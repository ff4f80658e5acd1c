"""A checkpoint: how long training waits for it, and how long it takes until it is complete on the disk.

    python -m benchmarks.checkpoint --size gpt2 --rounds 7 --folder /tmp

The sides alternate: saved while training waits, saved in the background, the library's own `save_file` and `dd`, each
with fsync, of the same bytes.
"""

import os
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from benchmarks.arguments import make_parser
from benchmarks.rounds import machine, spread, take_turns
from modeling_gpt2flash import GPT2FlashForCausalLM
from train.checkpoints.background import BackgroundWriter, States
from train.checkpoints.loading import load_config
from train.checkpoints.step_folder import TrainingState, save
from train.optim.parameter_groups import ADAMW_MOMENTS
from train.utils.command import run_command
from train.utils.files import fsync
from train.utils.tables import markdown_table


def main() -> None:
    args = make_parser(__doc__, size="gpt2", rounds=7, folder=".").parse_args()
    model = GPT2FlashForCausalLM(load_config(args.size))
    states = [
        (name, {"weight": p.detach(), **{key: torch.rand_like(p) for key in ADAMW_MOMENTS}})
        for name, p in model.named_parameters()
    ]
    tensors = {f"{key}.{name}": tensor for name, state in states for key, tensor in state.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    state = TrainingState(
        step=1, tokens=1, model={}, train_data={}, seed=0, block_size=1, sequences_per_step=1, total_steps=1, config={}
    )
    with TemporaryDirectory(dir=args.folder) as name, BackgroundWriter(lambda _: None) as writer:
        folder = Path(name)

        def ours(states: States) -> None:
            save(folder / "run", model.config, None, states, state, keep=1)

        def librarys() -> None:
            save_file(tensors, folder / "file")
            fsync(folder / "file")

        def disk() -> None:
            copy = ["dd", f"if={folder / 'file'}", f"of={folder / 'copy'}", "bs=1M", "conv=fsync", "status=none"]
            subprocess.run(copy, check=True)

        sides = {
            "while training waits": lambda: ours(states),
            "in the background": lambda: writer.start(states, ours),
            "safetensors' `save_file`": librarys,
            "`dd`": disk,
        }

        def measure(side: str) -> tuple[float, float]:
            os.sync()  # what another side wrote must not slow this one down
            began = time.perf_counter()
            sides[side]()
            stalled = time.perf_counter()
            writer.wait()
            return stalled - began, time.perf_counter() - began

        turns = {side: lambda side=side: measure(side) for side in sides}
        take_turns(turns, rounds=1)  # allocates the copy
        taken = take_turns(turns, args.rounds)
    rows = []
    for side, own in taken.items():
        stalls, totals = zip(*own, strict=True)
        shares = [stall / base for stall, (base, _) in zip(stalls, taken["while training waits"], strict=True)]
        fastest = min(stalls) / min(base for base, _ in taken["while training waits"])
        rate = f"{size / 1e9 / min(totals):.2f}"
        rows.append([side, spread(stalls), spread(shares, 1, "%"), f"{fastest:.1%}", spread(totals), rate])
    print(f"{args.size}: {size / 1e9:.2f} GB of weights and moments; {machine('cpu')}\n")
    header = ["saved", "stall (s)", "of the first", "by the fastest round", "complete (s)", "GB/s at best"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    run_command(main)
