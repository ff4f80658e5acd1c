"""A checkpoint for other tools: `python -m train.export CKPT OUT`, read back and held against the original."""

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.utils.command import run_command
from train.utils.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import GPT2Config

    from train.checkpoints.step_folder import Checkpoint

TOLERANCE = 1e-5  # of the logits, as a share of the largest
CHECKED_TOKENS = 64  # in each of the two rows that are compared
EXAMPLES = """examples:
  a folder for transformers, vLLM, llama.cpp and others that know GPT-2, in half the bytes
    python -m train.export checkpoint/optimized gpt2-mine --dtype bfloat16
  out/ckpt.pt with AdamW's moments, for nanoGPT's train.py --init_from=resume and its sample.py
    python -m train.export checkpoint/optimized nanoGPT/out --format nanogpt
  the way back: nanoGPT's checkpoint as a GPT-2 folder
    python -m train.export nanoGPT/out/ckpt.pt gpt2-mine
  model.onnx for ONNX Runtime (pip install 'gpt2flash[onnx]')
    python -m train.export checkpoint/optimized onnx-mine --format onnx
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.export",
        description="Write a trained model for other tools, and check that they will compute the same.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CKPT",
        help="a run folder, a step-N folder in it, any GPT-2 folder, or nanoGPT's ckpt.pt",
    )
    add("out", metavar="OUT", type=Path, help="the folder to write, new or empty")
    add("--format", choices=WRITERS, default="gpt2", help="gpt2: transformers' own GPT-2 (%(default)s)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights (%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"{args.out}: is already there; name a folder that is new or empty")
    if args.format == "onnx":
        from train.export.onnx_graph import check_installed

        check_installed(args.dtype)
    from train.utils.third_party_warnings import silence_third_party_warnings

    silence_third_party_warnings()
    from train.checkpoints.loading import load_for_inference

    model = load_for_inference(args.checkpoint, "float32", device="cpu", flag="CKPT")
    rounded = _rounded(model, args.dtype)
    temporary = args.out.with_name(f".{args.out.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        notes = WRITERS[args.format](args.checkpoint, temporary, rounded, args.dtype)
        temporary.rename(args.out)  # over an empty folder too
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if args.dtype != "float32":
        notes.append(f"rounding to {args.dtype} moved logits by up to {difference(rounded, model):.1e}")
    print(f"{args.out}: {'; '.join(notes)}")


def _rounded(model: Any, dtype: str) -> Any:
    """The model with weights as `dtype` has them, in fp32."""
    import copy

    import torch

    if dtype == "float32":
        return model
    rounded = copy.deepcopy(model).to(getattr(torch, dtype)).to(torch.float32)
    for name, parameter in rounded.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(f"--dtype {dtype}: {name} has values that it cannot hold; take bfloat16 or float32")
    return rounded


def sample_ids(model: Any) -> "torch.Tensor":
    """Two rows of random tokens (2, T), the same for every model with the same vocabulary and positions."""
    import torch

    length = min(CHECKED_TOKENS, model.config.n_positions)
    return torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def logits_of(model: Any) -> "torch.Tensor":
    """Logits (2, T, V) of `sample_ids`."""
    import torch

    with torch.no_grad():
        return model(sample_ids(model)).logits


def difference(model: Any, reference: Any) -> float:
    return (logits_of(model) - logits_of(reference)).abs().max().item()


def checked(written: "torch.Tensor", reference: "torch.Tensor") -> str:
    """What there is to say of logits that are the reference's; others are an error."""
    found = (written - reference).abs().max().item()
    if not found <= TOLERANCE * max(1.0, reference.abs().max().item()):
        raise RuntimeError(f"what was written computes something else: logits differ by {found:.1e}")
    return f"logits checked, largest difference {found:.1e}"


def write_tokenizer(checkpoint: str, folder: Path, model: Any) -> str:
    """Write the checkpoint's tokenizer, else GPT-2's; what there is to say of it."""
    from train.checkpoints.loading import load_tokenizer

    tokenizer = load_tokenizer(checkpoint, model.config, flag="CKPT")
    if tokenizer is None:
        return (
            f"no tokenizer: there is none beside the model, and its {model.config.vocab_size} tokens are not GPT-2's"
        )
    tokenizer.save_pretrained(folder)
    return "with its tokenizer"


def stock_config(model: Any) -> "GPT2Config":
    """The model's configuration as transformers' own GPT-2 has it."""
    from transformers import GPT2Config

    fields = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "dtype", "loss_chunk_size", "transformers_version"):
        fields.pop(key, None)
    return GPT2Config(**fields)


def write_gpt2(checkpoint: str, folder: Path, model: Any, dtype: str) -> list[str]:
    """A folder of transformers' own GPT-2, with the field that older readers want (`n_ctx`)."""
    import torch
    from transformers import GPT2LMHeadModel

    expected = logits_of(model)
    with torch.device("meta"):
        stock: Any = GPT2LMHeadModel(stock_config(model))
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    stock.to(getattr(torch, dtype)).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "n_ctx": model.config.n_positions}, indent=2) + "\n"
    )
    tokenizer = write_tokenizer(checkpoint, folder, model)
    read_back = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    return [f"GPT2LMHeadModel in {dtype}", tokenizer, checked(logits_of(read_back), expected)]


def write_nanogpt(checkpoint: str, folder: Path, model: Any, dtype: str) -> list[str]:
    """`ckpt.pt`, with the optimizer's moments where the checkpoint has them and they are AdamW's."""
    import torch

    from train.checkpoints import nanogpt
    from train.checkpoints import step_folder as checkpoints
    from train.checkpoints.loading import TUNING_LEARNING_RATE, load_for_inference
    from train.config.run_config import RunConfig

    nanogpt.check_writable(model.config)
    trained = training_of(checkpoint)
    settings = dataclasses.asdict(RunConfig(learning_rate=TUNING_LEARNING_RATE))
    moments, step, best = None, 0, nanogpt.NO_LOSS
    if trained is not None:
        settings |= trained.state.config
        step, best = trained.step, best_val_loss(trained) or best
        if trained.state.optimizer == "adamw":
            _, moments = checkpoints.read_tensors(trained, model)
    weights = {name: parameter.to(getattr(torch, dtype)) for name, parameter in model.named_parameters()}
    file = folder / "ckpt.pt"
    nanogpt.write(file, model.config, weights, moments, step=step, best_val_loss=best, settings=settings)
    theirs, expected = load_for_inference(file, "float32", device="cpu"), logits_of(model)
    exact = logits_of(theirs)
    for block in theirs.transformer.h:
        block.mlp.act = model.transformer.h[0].mlp.act
    notes = [
        f"ckpt.pt at iteration {step} {'with' if moments else 'without'} the optimizer's moments",
        f"train.py resumes it with --block_size={model.config.n_positions}",
        checked(logits_of(theirs), expected),
    ]
    if model.config.activation_function in nanogpt.TANH_GELU:
        apart = (exact - expected).abs().max()
        notes.append(f"nanoGPT computes GELU exactly and not by tanh, which moves logits by up to {apart:.1e}")
    return notes


def training_of(checkpoint: str) -> "Checkpoint | None":
    """The training state in a step or run folder; None where there is none."""
    from train.checkpoints import step_folder as checkpoints

    folder = Path(checkpoint)
    if not any((folder / name).exists() for name in (checkpoints.STATE, checkpoints.LATEST)):
        return None
    return checkpoints.find(checkpoint, folder)


def best_val_loss(trained: "Checkpoint") -> float | None:
    """The lowest validation loss up to the checkpoint, in nats, from the run's metrics; None where there is none."""
    file = trained.folder.parent / "metrics.jsonl"
    if not file.exists():
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be half written
    found = [record["val_loss"] for record in records if "val_loss" in record and record["step"] <= trained.step]
    return min(found, default=None)


def write_onnx(checkpoint: str, folder: Path, model: Any, dtype: str) -> list[str]:
    """`model.onnx`, with configuration and tokenizer beside it."""
    import torch

    from train.export.onnx_graph import run, write

    file, ids = folder / "model.onnx", sample_ids(model)
    write(file, model)
    stock_config(model).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer = write_tokenizer(checkpoint, folder, model)
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 2] = 0  # padding on the left, as batches of prompts have it
    with torch.no_grad():
        reference = model(ids, attention_mask=mask).logits
    return ["model.onnx", tokenizer, checked(run(file, ids, mask)[mask == 1], reference[mask == 1])]


WRITERS: dict[str, Callable[[str, Path, Any, str], list[str]]] = {
    "gpt2": write_gpt2,
    "nanogpt": write_nanogpt,
    "onnx": write_onnx,
}

if __name__ == "__main__":
    run_command(main)
