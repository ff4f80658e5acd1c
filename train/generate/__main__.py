"""Generate text with a trained model: `python -m train.generate --checkpoint checkpoint/optimized --prompt "def "`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil

from train.config.arguments import ArgumentParser, flags_of, number
from train.generate.decoding import Decoding
from train.utils.command import run_command
from train.utils.errors import UserError
from train.utils.files import read_text
from train.utils.units import in_unit

BENCHMARK_PROMPT_TOKENS = 32
BENCHMARK_BATCH_SIZES = (1, 8, 32)
LOWEST_TEMPERATURE = 1e-6
FP32_BYTES = 4
SEPARATOR = "-" * 80
EXAMPLES = """examples:
  one text, the most likely token at each step, on the screen as it is generated
    python -m train.generate --checkpoint checkpoint/optimized --prompt "def " --temperature 0 --stream
  three texts for each line of a file, eight lines at a time, one JSON object per line
    python -m train.generate --checkpoint checkpoint/optimized --prompt_file prompts.txt --batch_size 8 \\
        --num_return_sequences 3 --json
  int8 on a CPU: several times as fast, at a small loss
    python -m train.generate --checkpoint checkpoint/optimized --prompt "def " --quantize int8
  assisted generation: a smaller model proposes tokens and the larger one decides, for the same text in less time
    python -m train.generate --checkpoint large --assistant small --prompt "def "
  time to first token, tokens/s and memory at batch 1, 8 and 32
    python -m train.generate --checkpoint checkpoint/optimized --benchmark
"""


def build_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m train.generate",
        description="Generate text with a trained model.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument_group("input").add_argument
    add("--checkpoint", required=True, help="a run folder, a step-N folder in it, or any GPT-2 folder")
    add(
        "--prompt",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="texts to continue; an empty text, or no --prompt, starts a new document",
    )
    add("--prompt_file", metavar="FILE", type=Path, help="a file with one prompt per line; empty lines are skipped")
    add = parser.add_flags(Decoding, "generation").add_argument
    seed = number(int, at_least=0, below=2**64)
    add("--seed", type=seed, default=0, help="seed for sampling; the same command generates the same texts")
    add = parser.add_argument_group("output").add_argument
    add("--stream", action="store_true", help="print a text while it is generated; one text at a time")
    add("--json", action="store_true", help="print one JSON object per text, or one with the figures of --benchmark")
    add = parser.add_argument_group("speed").add_argument
    count = number(int, at_least=1)
    add("--batch_size", type=count, default=1, help="prompts to continue at the same time")
    add(
        "--cache",
        choices=["dynamic", "static"],
        help="key-value cache that grows, or one of fixed size (default: static with --compile, otherwise dynamic)",
    )
    add(
        "--compile",
        action="store_true",
        help="compile a step with the static cache: pays off after minutes of generation",
    )
    add("--quantize", choices=["int8"], help="int8 matmuls, on the CPU: faster and slightly less exact")
    add(
        "--assistant",
        metavar="CHECKPOINT",
        help="a smaller model that proposes several tokens at once, which the model accepts or corrects",
    )
    add = parser.add_argument_group("benchmark").add_argument
    add(
        "--benchmark",
        action="store_true",
        help=f"time the model after {BENCHMARK_PROMPT_TOKENS} random tokens instead of printing text",
    )
    sizes = " ".join(map(str, BENCHMARK_BATCH_SIZES))
    add("--batch_sizes", type=count, nargs="+", metavar="N", help=f"batch sizes for --benchmark (default: {sizes})")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse combinations that no model supports, before one is loaded."""
    if 0 < args.temperature < LOWEST_TEMPERATURE:
        raise UserError(
            f"--temperature {args.temperature}: logits divided by so little overflow; write 0 for the most likely "
            f"token, or {LOWEST_TEMPERATURE} or more"
        )
    if args.num_return_sequences > 1 and args.temperature == 0:
        raise UserError(
            f"--num_return_sequences {args.num_return_sequences}: at --temperature 0 all texts would be the same; "
            "raise the temperature, or ask for one"
        )
    several = args.batch_size > 1 or args.num_return_sequences > 1
    for key in ("stream", "assistant"):
        if getattr(args, key) and several:
            raise UserError(
                f"--{key}: works on one sequence at a time; leave --batch_size and --num_return_sequences at 1"
            )
    if args.stream and args.json:
        raise UserError("--stream: --json prints complete texts; drop one of the two")
    if args.compile and args.cache == "dynamic":
        raise UserError("--cache dynamic: --compile needs a cache of fixed size; use --cache static, or drop --cache")
    if args.assistant and (args.cache == "static" or args.compile):
        raise UserError("--assistant: removes the keys and values of rejected tokens, which a static cache cannot; "
                        "drop --cache static and --compile")  # fmt: skip
    if args.quantize and args.compile:
        raise UserError("--quantize int8: its kernels cannot be compiled; drop --compile")
    if args.compile:
        from train.engines.transforms import check_cpp_compiler

        check_cpp_compiler("--compile")
    if not args.benchmark and args.batch_sizes:
        raise UserError("--batch_sizes: belongs to --benchmark; add it, or use --batch_size")
    if args.benchmark:
        for key in ("prompt", "prompt_file", "stream", "assistant"):
            if getattr(args, key):
                raise UserError(f"--{key}: --benchmark prints no text; drop one of the two")
        if several:
            raise UserError("--benchmark: takes its batch sizes from --batch_sizes; "
                            "drop --batch_size and --num_return_sequences")  # fmt: skip
        if args.max_new_tokens < 2:
            raise UserError("--max_new_tokens 1: --benchmark times the tokens after the first too; ask for 2 or more")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, those of the command line first; one empty prompt if there are none."""
    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        found = [line for line in read_text(args.prompt_file).splitlines() if line]
        if not found:
            raise UserError(f"--prompt_file {args.prompt_file}: has no prompts; write one on each line")
        prompts += found
    return prompts or [""]


def check_positions(name: str, n_positions: int, prompt: int, new: int) -> None:
    """Raise a `UserError` if `prompt` and `new` tokens exceed the positions of the model called `name`."""
    over = prompt + new - n_positions
    if over <= 0:
        return
    remedy = f"ask for {new - over} or fewer" if over < new else "shorten the prompt"
    raise UserError(
        f"--max_new_tokens {new}: the longest prompt and the new tokens are {prompt + new} tokens, {name} has "
        f"{n_positions} positions; {remedy}"
    )


def check_rows(rows: int, vocab_size: int) -> None:
    """Raise a `UserError` if the logits of `rows` sequences alone exceed this machine's memory."""
    needed, there_is = FP32_BYTES * rows * vocab_size, psutil.virtual_memory().total
    if needed > there_is:
        raise UserError(
            f"{rows:,} sequences at once: the logits of one token alone take {in_unit('bytes', needed)}, and this "
            f"machine has {in_unit('bytes', there_is)}; ask for fewer"
        )


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check_flags(args)
    decoding = Decoding(
        **{each.name: getattr(args, each.name) for each in flags_of(Decoding)},
        static_cache=args.compile or args.cache == "static",
        compiled=args.compile,
    )
    # Read by torch at its first tensor. In pages of 2 MB a CPU reads the weights a fifth faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from train.utils.third_party_warnings import silence_third_party_warnings

    silence_third_party_warnings()
    (benchmark if args.benchmark else print_texts)(args, decoding)


def print_texts(args: argparse.Namespace, decoding: Decoding) -> None:
    """Print the texts of all prompts, each batch as soon as it is generated."""
    from transformers import TextStreamer

    from train.checkpoints.loading import load_for_inference, load_tokenizer
    from train.generate.texts import encode_prompt, generate_texts

    prompts = read_prompts(args)
    model = load_for_inference(args.checkpoint, **_loading_arguments(args))
    tokenizer = load_tokenizer(args.checkpoint, model.config, flag="--checkpoint")
    if tokenizer is None:
        raise UserError(
            f"--checkpoint {args.checkpoint}: has no tokenizer, and its {model.config.vocab_size} tokens are not "
            "GPT-2's; save one into it"
        )
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    check_positions("the model", model.config.n_positions, longest, args.max_new_tokens)
    assistant = None
    if args.assistant is not None:
        assistant = load_for_inference(args.assistant, **_loading_arguments(args), flag="--assistant")
        if assistant.config.vocab_size != model.config.vocab_size:
            raise UserError(
                f"--assistant {args.assistant}: has {assistant.config.vocab_size} tokens, the model "
                f"{model.config.vocab_size}; the two need the same vocabulary"
            )
        check_positions("the assistant", assistant.config.n_positions, longest, args.max_new_tokens)
        assistant = optimize(assistant, args, rows=1)

    rows = min(args.batch_size, len(prompts)) * args.num_return_sequences
    check_rows(rows, model.config.vocab_size)
    model = optimize(model, args, rows)
    streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True) if args.stream else None
    texts = generate_texts(
        model,
        tokenizer,
        prompts,
        decoding,
        batch_size=args.batch_size,
        seed=args.seed,
        assistant=assistant,
        streamer=streamer,
    )
    for index, prompt in enumerate(prompts):
        if args.stream and index > 0:
            print(SEPARATOR, flush=True)
        for copy, text in enumerate(next(texts)):
            if args.json:
                readable = sys.stdout.encoding.lower() == "utf-8"  # otherwise escaped, as JSON has it
                print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=not readable), flush=True)
            elif not args.stream:
                print(f"{SEPARATOR}\n{text}" if index + copy > 0 else text, flush=True)


def benchmark(args: argparse.Namespace, decoding: Decoding) -> None:
    """Print time to first token, tokens/s and memory of each batch size, as a table or, with --json, as an object."""
    import torch

    from train.checkpoints.loading import load_for_inference
    from train.generate.latency import measure_speed
    from train.metrics.hardware import hardware, versions
    from train.utils.devices import device_name
    from train.utils.tables import markdown_table

    speeds = []
    for batch_size in args.batch_sizes or BENCHMARK_BATCH_SIZES:
        model = load_for_inference(args.checkpoint, **_loading_arguments(args))  # again, so that only one is in memory
        check_positions("the model", model.config.n_positions, BENCHMARK_PROMPT_TOKENS, args.max_new_tokens)
        check_rows(batch_size, model.config.vocab_size)
        parameters = model.num_parameters()
        model = optimize(model, args, rows=batch_size)
        torch.manual_seed(args.seed)
        ids = torch.randint(model.config.vocab_size, (batch_size, BENCHMARK_PROMPT_TOKENS)).to(model.device)
        speeds.append(measure_speed(model, ids, decoding))
    machine, libraries = hardware(), versions()
    if args.json:
        print(json.dumps({
            "parameters": parameters,
            "prompt_tokens": BENCHMARK_PROMPT_TOKENS,
            "new_tokens": args.max_new_tokens,
            "speeds": speeds,
            "hardware": machine,
            "versions": libraries,
        }))  # fmt: skip
        return
    cpu = f"{machine['cpu']}, {machine['torch_threads']} threads"
    device = cpu if model.device.type == "cpu" else device_name(model.device)
    precision = args.quantize or str(model.dtype).removeprefix("torch.")
    print(
        f"{parameters / 1e6:.1f}M parameters, {precision}, {BENCHMARK_PROMPT_TOKENS} tokens of prompt, "
        f"{args.max_new_tokens} new; {device}, torch {libraries['torch']}, transformers {libraries['transformers']}\n"
    )
    header = ["batch", "time to first token (ms)", "tokens/s", "memory (MB)"]
    print(markdown_table(header, [
        [
            str(speed["batch_size"]),
            f"{1e3 * speed['first_token_seconds']:.1f}",
            f"{speed['tokens_per_second']:.1f}",
            f"{speed['memory_bytes'] / 1e6:.0f}",
        ]
        for speed in speeds
    ]))  # fmt: skip


def _loading_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The folder's dtype on this machine's accelerator; int8 is made from fp32 on the CPU."""
    return {"dtype": "float32", "device": "cpu"} if args.quantize else {}


def optimize(model: Any, args: argparse.Namespace, rows: int) -> Any:
    """The model in the form that generates `rows` sequences fastest, within what the flags allow."""
    import torch

    from train.generate.cpu_layers import pack_weights, quantize_int8

    if args.quantize:
        return quantize_int8(model)
    if model.device.type == "cpu" and model.dtype == torch.float32 and not args.compile:
        return pack_weights(model, rows)
    return model


if __name__ == "__main__":
    run_command(main)
