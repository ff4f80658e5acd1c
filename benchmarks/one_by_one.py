"""The plain loop, against which batches and threads are measured: a document read, cut by tiktoken, written.

    python -m benchmarks.one_by_one shards/*.parquet --out_dir out

The validation documents are nanoGPT's; both files keep the order of the rows.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet

from benchmarks.nanogpt_procedure import SEED, TEST_SIZE
from train.data.token_file import END_OF_TEXT, gpt2_encoding


def prepare(files: list[Path], out_dir: Path) -> None:
    sources = [pyarrow.parquet.ParquetFile(path) for path in files]
    rows = sum(source.metadata.num_rows for source in sources)
    validation = set(np.random.default_rng(SEED).permutation(rows)[: math.ceil(rows * TEST_SIZE)].tolist())
    row = 0
    with (out_dir / "train.bin").open("wb") as train, (out_dir / "val.bin").open("wb") as val:
        for source in sources:
            for batch in source.iter_batches(batch_size=1000, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    ids = [*gpt2_encoding().encode_ordinary(text), END_OF_TEXT]
                    (val if row in validation else train).write(np.array(ids, dtype=np.uint16).tobytes())
                    row += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out_dir", type=Path, required=True)
    args = parser.parse_args()
    prepare(args.files, args.out_dir)


if __name__ == "__main__":
    main()
