"""Write text with a trained model: `python -m train.generate --checkpoint checkpoint/optimized --prompt "def "`."""

import argparse

from train.errors import UserError, run_command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.generate",
        description="Write text with a trained model.",
        epilog='example: python -m train.generate --checkpoint checkpoint/optimized --prompt "def " --temperature 0',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="a run folder, a step-N folder in it, or any GPT-2 folder")
    parser.add_argument("--prompt", default="", help="the text to go on from; empty: from the start of a document")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="tokens to write after the prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument(
        "--top_k", type=int, default=50, help="draw from this many of the likeliest tokens; 0: from all"
    )
    parser.add_argument("--num_return_sequences", type=int, default=1, help="texts to write")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    args = parser.parse_args(argv)
    for key, least in (("max_new_tokens", 1), ("num_return_sequences", 1), ("top_k", 0), ("temperature", 0)):
        if getattr(args, key) < least:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least {least}")
    from train.quiet import quiet_libraries

    quiet_libraries()
    from train.inference import complete, load_model, load_tokenizer

    model = load_model(args.checkpoint)
    tokenizer = load_tokenizer(args.checkpoint, model)
    limit = model.config.n_positions
    asked = len(tokenizer(args.prompt or tokenizer.eos_token).input_ids) + args.max_new_tokens
    if asked > limit:
        raise UserError(
            f"--max_new_tokens {args.max_new_tokens}: prompt and new tokens make {asked}, the model has {limit} "
            f"positions; ask for {args.max_new_tokens - (asked - limit)} or fewer"
        )
    texts = complete(model, tokenizer, args.prompt, args.max_new_tokens, temperature=args.temperature,
                     top_k=args.top_k, seed=args.seed, samples=args.num_return_sequences)  # fmt: skip
    print(("\n" + "-" * 80 + "\n").join(texts))


if __name__ == "__main__":
    run_command(main)
