"""Real runs of `python -m train` on random tokens, for benchmarks that read what they leave."""

from pathlib import Path

import numpy as np

from train.data.token_file import END_OF_TEXT, write_token_file


def write_tokens(path: Path, count: int) -> None:
    ids = np.random.default_rng(0).integers(0, END_OF_TEXT, count, np.uint16)
    write_token_file(path, [(ids, 1)], END_OF_TEXT + 1, {})


def flags(tokens: Path, model: str, block: int, steps: int, precision: str) -> list[str]:
    """Of a run that takes `steps` steps, with the attention and the loss of an optimized one and next to nothing else.

    `precision` is `--mixed_precision`'s.
    """
    return [
        f"--model={model}",
        f"--block_size={block}",
        f"--max_steps={steps}",
        f"--mixed_precision={precision}",
        "--attn_implementation=auto",
        "--loss_chunk_size=512",
        f"--train_data_path={tokens}",
        f"--val_data_path={tokens}",
        "--eval_steps=1",
        "--max_new_tokens=0",
        "--report_to=none",
    ]
