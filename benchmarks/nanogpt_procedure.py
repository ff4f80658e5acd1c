"""nanoGPT's procedure from text to `train.bin` and `val.bin`: the reference for ours, in bytes, time and memory.

    python -m benchmarks.nanogpt_procedure parquet shards/*.parquet --out_dir out --num_proc 2
    python -m benchmarks.nanogpt_procedure parquet shards/*.parquet --out_dir out --one_by_one

1. `load_dataset` builds an Arrow copy of all text.
2. `train_test_split` draws the validation documents; both parts keep the order of its permutation.
3. `map` tokenizes each document in `num_proc` processes and writes the tokens, 8 bytes each, to a second copy.
4. Each part is copied, in up to 1024 shards, into a memory-mapped file of `uint16`.

Two things differ from 2022. `datasets` 4 and later read a column lazily, row by row: `[:]` reads all of it at once, as
it did when nanoGPT was written, and is faster. And a part of fewer documents than shards has fewer shards.

`--one_by_one` is the plain loop instead, the reference for batches and threads: read a document, tokenize it, write
it. Its validation documents are the same; both of its files keep the order of the rows.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data.tokenizer import END_OF_TEXT, gpt2_encoding

if TYPE_CHECKING:
    from datasets import Dataset

SEED = 2357
TEST_SIZE = 0.0005
SHARDS = 1024


def encode(row: dict[str, Any]) -> dict[str, Any]:
    ids = gpt2_encoding().encode_ordinary(row["text"])
    ids.append(END_OF_TEXT)
    return {"ids": ids, "len": len(ids)}


def write(part: "Dataset", path: Path) -> None:
    total = int(np.sum(part["len"][:], dtype=np.uint64))
    tokens = np.memmap(path, dtype=np.uint16, mode="w+", shape=(total,))
    shards = min(SHARDS, len(part))
    start = 0
    for index in range(shards):
        shard = part.shard(num_shards=shards, index=index, contiguous=True).with_format("numpy")
        ids = np.concatenate(shard["ids"][:])
        tokens[start : start + len(ids)] = ids
        start += len(ids)
    tokens.flush()


def prepare(builder: str, files: list[str], out_dir: Path, test_size: float, seed: int, num_proc: int) -> None:
    """`builder`: parquet or json, the text in the column "text"."""
    from datasets import load_dataset

    dataset = load_dataset(builder, data_files=files, split="train", num_proc=min(num_proc, len(files)))
    parts = dataset.train_test_split(test_size=test_size, seed=seed, shuffle=True)
    parts["val"] = parts.pop("test")
    gpt2_encoding()  # once, before the processes fork
    parts = parts.map(encode, remove_columns=dataset.column_names, num_proc=num_proc if num_proc > 1 else None)
    for name, part in parts.items():
        write(part, out_dir / f"{name}.bin")


def prepare_one_by_one(files: list[str], out_dir: Path, test_size: float, seed: int) -> None:
    """The plain loop over Parquet files."""
    import pyarrow.parquet

    sources = [pyarrow.parquet.ParquetFile(path) for path in files]
    rows = sum(source.metadata.num_rows for source in sources)
    validation = set(np.random.default_rng(seed).permutation(rows)[: math.ceil(rows * test_size)].tolist())
    texts = (
        text
        for source in sources
        for batch in source.iter_batches(batch_size=1000, columns=["text"])
        for text in batch.column("text").to_pylist()
    )
    with (out_dir / "train.bin").open("wb") as train, (out_dir / "val.bin").open("wb") as val:
        for row, text in enumerate(texts):
            ids = np.array(encode({"text": text})["ids"], dtype=np.uint16)
            (val if row in validation else train).write(ids.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builder", choices=["parquet", "json"])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--test_size", type=float, default=TEST_SIZE)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--num_proc", type=int, default=1)
    parser.add_argument("--one_by_one", action="store_true", help="the plain loop, over Parquet files")
    args = parser.parse_args()
    args.out_dir.mkdir(exist_ok=True)
    if args.one_by_one:
        prepare_one_by_one(args.files, args.out_dir, args.test_size, args.seed)
    else:
        prepare(args.builder, args.files, args.out_dir, args.test_size, args.seed, args.num_proc)


if __name__ == "__main__":
    main()
