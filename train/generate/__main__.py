"""Write text with a trained model: `python -m train.generate --checkpoint checkpoint/optimized --prompt "def "`."""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.utils.command import run_command
from train.utils.compilers import check_cpp_compiler
from train.utils.errors import UserError

if TYPE_CHECKING:
    from train.generate.inference import Decoding

BENCHMARK_PROMPT = 32  # tokens before the ones that --benchmark times
SEPARATOR = "-" * 80
EXAMPLES = """examples:
  one text, the likeliest at each step, on the screen as it is written
    python -m train.generate --checkpoint checkpoint/optimized --prompt "def " --temperature 0 --stream
  three texts for each line of a file, eight lines at a time, a JSON object a line
    python -m train.generate --checkpoint checkpoint/optimized --prompt_file prompts.txt --batch_size 8 \\
        --num_return_sequences 3 --json
  int8 on a CPU: several times as fast, at a small loss
    python -m train.generate --checkpoint checkpoint/optimized --prompt "def " --quantize int8
  a smaller model proposes, the larger one decides: its own text, sooner
    python -m train.generate --checkpoint large --assistant small --prompt "def "
  time to first token, tokens/s and memory at batch 1, 8 and 32
    python -m train.generate --checkpoint checkpoint/optimized --benchmark
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.generate",
        description="Write text with a trained model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to write").add_argument
    add("--checkpoint", required=True, help="a run folder, a step-N folder in it, or any GPT-2 folder")
    add(
        "--prompt",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help="texts to go on from; an empty one, or none at all: from the start of a document",
    )
    add("--prompt_file", metavar="FILE", help="a file with a prompt on each line that is not empty")
    add("--max_new_tokens", type=int, default=100, help="tokens to write after each prompt (%(default)s)")
    add("--num_return_sequences", type=int, default=1, help="texts to write for each prompt (%(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time (%(default)s)")
    add("--top_k", type=int, default=50, help="draw from so many of the likeliest tokens; 0: from all (%(default)s)")
    add("--seed", type=int, default=0, help="of the drawing: the same command draws the same texts (%(default)s)")
    add = parser.add_argument_group("how to show it").add_argument
    add("--stream", action="store_true", help="show a text while it is written; one at a time")
    add("--json", action="store_true", help="a JSON object a line: prompt and text, or the figures of --benchmark")
    add = parser.add_argument_group("how to be quick").add_argument
    add("--batch_size", type=int, default=1, help="prompts to go on from at the same time (%(default)s)")
    add(
        "--cache",
        choices=["dynamic", "static"],
        help="keys and values that grow, or in a place of fixed size (static with --compile, else dynamic)",
    )
    add("--compile", action="store_true", help="compile the step of a static cache: pays after minutes of writing")
    add("--quantize", choices=["int8"], help="multiply in int8, on the CPU: faster and a little less exact")
    add(
        "--assistant",
        metavar="CHECKPOINT",
        help="a smaller model whose proposals the model accepts or corrects, several tokens at once",
    )
    add = parser.add_argument_group("how quick it is").add_argument
    add(
        "--benchmark",
        action="store_true",
        help=f"time the model after {BENCHMARK_PROMPT} random tokens instead of writing",
    )
    add("--batch_sizes", type=int, nargs="+", metavar="N", help="sequences at a time for --benchmark (1 8 32)")
    return parser.parse_args(argv)


def refuse_impossible(args: argparse.Namespace) -> None:
    """Raise a UserError for what no model could do, before one is loaded."""
    for key, least in (("max_new_tokens", 1), ("num_return_sequences", 1), ("batch_size", 1), ("top_k", 0),
                       ("temperature", 0)):  # fmt: skip
        if getattr(args, key) < least:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least {least}")
    if args.num_return_sequences > 1 and args.temperature == 0:
        raise UserError(
            f"--num_return_sequences {args.num_return_sequences}: at --temperature 0 all would be the same; "
            "raise the temperature, or ask for one"
        )
    at_once = args.batch_size > 1 or args.num_return_sequences > 1
    for key in ("stream", "assistant"):
        if getattr(args, key) and at_once:
            raise UserError(
                f"--{key}: works on one sequence at a time; leave --batch_size and --num_return_sequences at 1"
            )
    if args.stream and args.json:
        raise UserError("--stream: --json prints whole texts; drop one of the two")
    if args.compile and args.cache == "dynamic":
        raise UserError("--cache dynamic: --compile needs a cache of one shape; take --cache static, or leave it out")
    if args.assistant and (args.cache == "static" or args.compile):
        raise UserError("--assistant: takes back keys and values of rejected tokens, which a static cache cannot; "
                        "leave --cache static and --compile out")  # fmt: skip
    if args.quantize and args.compile:
        raise UserError("--quantize int8: its kernels cannot be compiled; drop --compile")
    if args.compile:
        check_cpp_compiler("--compile")
    if not args.benchmark and args.batch_sizes:
        raise UserError("--batch_sizes: belongs to --benchmark; add it, or say --batch_size")
    if args.benchmark:
        for key in ("prompt", "prompt_file", "stream", "assistant"):
            if getattr(args, key):
                raise UserError(f"--{key}: --benchmark writes nothing to read; drop one of the two")
        if at_once:
            raise UserError("--benchmark: its sequences are counted by --batch_sizes; "
                            "drop --batch_size and --num_return_sequences")  # fmt: skip
        if min(args.batch_sizes or [1]) < 1:
            raise UserError(f"--batch_sizes {min(args.batch_sizes)}: must be at least 1")
        if args.max_new_tokens < 2:
            raise UserError("--max_new_tokens 1: --benchmark times the tokens after the first too; ask for 2 or more")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, those of the command line first; one empty prompt if there are none.

    Raises:
        UserError: when the file cannot be read or has none.
    """
    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        path = Path(args.prompt_file)
        if not path.is_file():
            raise UserError(f"--prompt_file {path}: there is no such file")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"--prompt_file {path}: is not UTF-8 text; convert it") from None
        found = [line for line in lines if line]
        if not found:
            raise UserError(f"--prompt_file {path}: has no prompts; write one on each line")
        prompts += found
    return prompts or [""]


def check_room(name: str, n_positions: int, prompt: int, new: int) -> None:
    """Raise a UserError if `prompt` and `new` tokens are more than the model called `name` has positions for."""
    over = prompt + new - n_positions
    if over <= 0:
        return
    remedy = f"ask for {new - over} or fewer" if over < new else "shorten the prompt"
    raise UserError(
        f"--max_new_tokens {new}: the longest prompt and the new tokens make {prompt + new}, {name} has {n_positions} "
        f"positions; {remedy}"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    refuse_impossible(args)
    # Read by torch at its first tensor. In pages of 2 MB a CPU reads the weights a fifth faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from train.utils.third_party_warnings import silence_third_party_warnings

    silence_third_party_warnings()
    from train.generate.inference import Decoding

    static = args.compile or args.cache == "static"
    decoding = Decoding(
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.num_return_sequences,
        static_cache=static,
        compiled=args.compile,
    )
    (benchmark if args.benchmark else write_prompts)(args, decoding)


def write_prompts(args: argparse.Namespace, decoding: "Decoding") -> None:
    """The texts of all prompts to stdout, each batch as soon as it is there."""
    from transformers import TextStreamer

    from train.generate.inference import load_model, load_tokenizer, prompt_ids, write

    prompts = read_prompts(args)
    model = load_model(args.checkpoint, **_precision(args))
    tokenizer = load_tokenizer(args.checkpoint, model)
    longest = max(len(prompt_ids(tokenizer, prompt)) for prompt in prompts)
    check_room("the model", model.config.n_positions, longest, args.max_new_tokens)
    assistant = None
    if args.assistant is not None:
        assistant = load_model(args.assistant, **_precision(args), flag="--assistant")
        if assistant.config.vocab_size != model.config.vocab_size:
            raise UserError(
                f"--assistant {args.assistant}: has {assistant.config.vocab_size} tokens, the model "
                f"{model.config.vocab_size}; the two need the same vocabulary"
            )
        check_room("the assistant", assistant.config.n_positions, longest, args.max_new_tokens)
        assistant = ready(assistant, args, rows=1)

    model = ready(model, args, rows=min(args.batch_size, len(prompts)) * args.num_return_sequences)
    streamer: Any = TextStreamer(tokenizer, skip_special_tokens=True) if args.stream else None
    texts = write(
        model,
        tokenizer,
        prompts,
        decoding,
        batch_size=args.batch_size,
        seed=args.seed,
        assistant=assistant,
        streamer=streamer,
    )
    for number, prompt in enumerate(prompts):
        if args.stream and number > 0:
            print(SEPARATOR, flush=True)
        for copy, text in enumerate(next(texts)):
            if args.json:
                print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)
            elif not args.stream:
                print(f"{SEPARATOR}\n{text}" if number + copy > 0 else text, flush=True)


def benchmark(args: argparse.Namespace, decoding: "Decoding") -> None:
    """Time to first token, tokens/s and memory of each batch size, as a table or, with --json, as an object."""
    import torch

    from train.generate.inference import load_model, measure_speed
    from train.metrics.summary import hardware, versions
    from train.utils.devices import device_name

    speeds = []
    for batch_size in args.batch_sizes or [1, 8, 32]:
        model = load_model(args.checkpoint, **_precision(args))  # anew, so that the memory is of one copy
        check_room("the model", model.config.n_positions, BENCHMARK_PROMPT, args.max_new_tokens)
        parameters = model.num_parameters()
        model = ready(model, args, rows=batch_size)
        torch.manual_seed(args.seed)
        ids = torch.randint(model.config.vocab_size, (batch_size, BENCHMARK_PROMPT)).to(model.device)
        speeds.append(measure_speed(model, ids, decoding))
    machine, libraries = hardware(), versions()
    if args.json:
        print(json.dumps({
            "parameters": parameters,
            "prompt_tokens": BENCHMARK_PROMPT,
            "new_tokens": args.max_new_tokens,
            "speeds": [dataclasses.asdict(speed) for speed in speeds],
            "hardware": machine,
            "versions": libraries,
        }))  # fmt: skip
        return
    cpu = f"{machine['cpu']}, {machine['torch_threads']} threads"
    device = cpu if model.device.type == "cpu" else device_name(model.device)
    precision = args.quantize or str(model.dtype).removeprefix("torch.")
    print(
        f"{parameters / 1e6:.1f}M parameters, {precision}, {BENCHMARK_PROMPT} tokens of prompt, "
        f"{args.max_new_tokens} new; {device}, torch {libraries['torch']}, transformers {libraries['transformers']}\n"
        "\n| batch | time to first token (ms) | tokens/s | memory (MB) |\n| ---: | ---: | ---: | ---: |"
    )
    for speed in speeds:
        print(f"| {speed.batch_size} | {1e3 * speed.first_token_seconds:.1f} | {speed.tokens_per_second:.1f} "
              f"| {speed.memory_bytes / 1e6:.0f} |")  # fmt: skip


def _precision(args: argparse.Namespace) -> dict[str, Any]:
    """As the folder has it, or for int8 what that is made from."""
    return {"dtype": "float32", "device": "cpu"} if args.quantize else {}


def ready(model: Any, args: argparse.Namespace, rows: int) -> Any:
    """The model in the form in which it writes `rows` sequences soonest, of those that the flags allow."""
    import torch

    from train.generate.cpu_layers import laid_out, quantized

    if args.quantize:
        return quantized(model)
    if model.device.type == "cpu" and model.dtype == torch.float32 and not args.compile:
        return laid_out(model, rows)
    return model


if __name__ == "__main__":
    run_command(main)
