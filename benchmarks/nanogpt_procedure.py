"""nanoGPT's way from text to `train.bin` and `val.bin`: what ours is held against, in bytes, time and memory.

    python -m benchmarks.nanogpt_procedure parquet shards/*.parquet --out_dir out --num_proc 2

1. `load_dataset` builds an Arrow copy of all text.
2. `train_test_split` draws the validation documents; both parts keep the order of its permutation.
3. `map` cuts each document into tokens in `num_proc` processes and writes them, 8 bytes an id, to a second copy.
4. Each part is copied, in up to 1024 pieces, into a memory-mapped file of `uint16`.

Two things are not as in 2022. `datasets` 4 and later read a column lazily, row by row: `[:]` has it whole, as it was
when nanoGPT was written, and is faster. And a part of fewer documents than pieces is cut into fewer.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data.token_file import END_OF_TEXT, gpt2_encoding

if TYPE_CHECKING:
    from datasets import Dataset

SEED = 2357
TEST_SIZE = 0.0005
PIECES = 1024


def encode(row: dict[str, Any]) -> dict[str, Any]:
    ids = gpt2_encoding().encode_ordinary(row["text"])
    ids.append(END_OF_TEXT)
    return {"ids": ids, "len": len(ids)}


def write(part: "Dataset", path: Path) -> None:
    total = int(np.sum(part["len"][:], dtype=np.uint64))
    tokens = np.memmap(path, dtype=np.uint16, mode="w+", shape=(total,))
    pieces = min(PIECES, len(part))
    start = 0
    for index in range(pieces):
        piece = part.shard(num_shards=pieces, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(piece["ids"][:])
        tokens[start : start + len(ids)] = ids
        start += len(ids)
    tokens.flush()


def prepare(builder: str, files: list[str], out_dir: Path, test_size: float, seed: int, num_proc: int) -> None:
    """`builder`: parquet or json, the text in the column "text"; `out_dir` exists."""
    from datasets import load_dataset

    dataset = load_dataset(builder, data_files=files, split="train", num_proc=min(num_proc, len(files)))
    parts = dataset.train_test_split(test_size=test_size, seed=seed, shuffle=True)
    parts["val"] = parts.pop("test")
    gpt2_encoding()  # once, before the processes fork
    parts = parts.map(encode, remove_columns=dataset.column_names, num_proc=num_proc if num_proc > 1 else None)
    for name, part in parts.items():
        write(part, out_dir / f"{name}.bin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builder", choices=["parquet", "json"])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--test_size", type=float, default=TEST_SIZE)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--num_proc", type=int, default=1)
    args = parser.parse_args()
    prepare(args.builder, args.files, args.out_dir, args.test_size, args.seed, args.num_proc)


if __name__ == "__main__":
    main()
