"""A checkpoint for other tools: `python -m train.export CKPT OUT`, read back and compared with the original."""

import argparse
import importlib
from pathlib import Path
from typing import Any

from train.config.arguments import ArgumentParser
from train.utils.command import run_command
from train.utils.errors import UserError
from train.utils.files import atomic_folder

# A module for each format. Its `write(checkpoint, folder, model, dtype)` fills a folder and returns what to report.
FORMATS = {
    "gpt2": "train.export.gpt2_folder",
    "nanogpt": "train.export.nanogpt_file",
    "onnx": "train.export.onnx_graph",
}
EXAMPLES = """examples:
  a folder for transformers, vLLM, llama.cpp and others that know GPT-2, in half the bytes
    python -m train.export checkpoint/optimized gpt2-mine --dtype bfloat16
  out/ckpt.pt with AdamW's moments, for nanoGPT's train.py --init_from=resume and its sample.py
    python -m train.export checkpoint/optimized nanoGPT/out --format nanogpt
  the other direction: nanoGPT's checkpoint as a GPT-2 folder
    python -m train.export nanoGPT/out/ckpt.pt gpt2-mine
  model.onnx for ONNX Runtime (pip install 'gpt2flash[onnx]')
    python -m train.export checkpoint/optimized onnx-mine --format onnx
"""


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m train.export",
        description="Write a trained model for other tools, and check that they will compute the same.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CKPT",
        help="a run folder, a step-N folder in it, any GPT-2 folder, or nanoGPT's ckpt.pt",
    )
    add("out", metavar="OUT", type=Path, help="the folder to write, new or empty")
    add("--format", choices=FORMATS, default="gpt2", help="gpt2: transformers' own GPT-2")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="dtype of the exported weights")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"{args.out}: is already there; name a folder that is new or empty")
    if args.format == "onnx":
        from train.export.onnx_graph import check_installed

        check_installed(args.dtype)
    from train.utils.third_party_warnings import silence_third_party_warnings

    silence_third_party_warnings()
    from train.checkpoints.loading import load_for_inference
    from train.export.checks import largest_difference, logits_of

    model = load_for_inference(args.checkpoint, "float32", device="cpu", flag="CKPT")
    rounded = round_weights(model, args.dtype)
    with atomic_folder(args.out) as folder:
        notes = importlib.import_module(FORMATS[args.format]).write(args.checkpoint, folder, rounded, args.dtype)
    if args.dtype != "float32":
        change = largest_difference(logits_of(rounded), logits_of(model))
        notes.append(f"rounding to {args.dtype} changed logits by up to {change:.1e}")
    print(f"{args.out}: {'; '.join(notes)}")


def round_weights(model: Any, dtype: str) -> Any:
    """A copy of an fp32 model whose fp32 weights have only values of `dtype`."""
    import copy

    import torch

    if dtype == "float32":
        return model
    rounded = copy.deepcopy(model).to(getattr(torch, dtype)).to(torch.float32)
    for name, parameter in rounded.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"--dtype {dtype}: {name} has values out of its range; use bfloat16 or float32")
    return rounded


if __name__ == "__main__":
    run_command(main)
