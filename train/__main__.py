"""`python -m train`, `accelerate launch -m train`, `deepspeed --module train`: train GPT-2 on a token file."""

import gc

from train.config.run_config import parse
from train.utils.command import run_command


def main() -> None:
    config = parse()
    # Imported when the flags are known to be right, so that --help and a typo are answered at once. All of it stays,
    # so that looking for garbage in it is a fifth of the time here, and of that of every compilation later.
    gc.disable()
    from train.utils.third_party_warnings import silence_third_party_warnings

    silence_third_party_warnings()
    from train.run.loop import train
    from train.run.setup import resolve

    gc.freeze()
    gc.enable()
    train(resolve(config))


if __name__ == "__main__":
    run_command(main)
