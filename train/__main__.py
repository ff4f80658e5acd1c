"""`python -m train`, `accelerate launch -m train`, `deepspeed --module train`: train GPT-2 on a token file."""

import gc

from train.config.run_config import parse
from train.utils.command import outlive_output, run_command


def main() -> None:
    config = parse()
    outlive_output()
    # Imported after the flags are parsed, so that --help and a typo are answered at once. None of these objects is
    # freed before the end: collecting garbage among them takes a fifth of the time here, and of each compilation.
    gc.disable()
    from train.utils.third_party_warnings import silence_third_party_warnings

    silence_third_party_warnings()
    from train.run.loop import train
    from train.run.setup import own_run_folder, resolve

    gc.freeze()
    gc.enable()
    with own_run_folder(config):
        train(resolve(config))


if __name__ == "__main__":
    run_command(main)
