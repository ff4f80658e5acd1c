"""`python -m train`, `accelerate launch -m train`, `deepspeed --module train`: train GPT-2 on a token file."""

from train.config import parse
from train.errors import run_command


def main() -> None:
    config = parse()
    # Imported when the flags are known to be right, so that --help and a typo are answered at once.
    from train.quiet import quiet_libraries

    quiet_libraries()
    from train.build import settle
    from train.loop import train

    train(settle(config))


if __name__ == "__main__":
    run_command(main)
