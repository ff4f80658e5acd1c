"""Text → `train.bin` and `val.bin` with their sidecars, ready for `python -m train`.

1. Documents are streamed from the source (train/sources.py), in its order.
2. Each goes to training or to validation, by one of two rules:
   `hash`: to validation when blake2b, keyed with the seed, of its UTF-8 bytes is below val_fraction · 2^64. Neither
   order nor number matter, and equal documents fall on the same side.
   `nanogpt`: to validation when its row number is among the first ⌈n · val_fraction⌉ entries of
   `numpy.random.default_rng(seed).permutation(n)`, n rows in all. This is the split of `Dataset.train_test_split`,
   which nanoGPT takes with seed 2357 and 0.0005. (It also shuffles the rows; here they stay in the stream's order.)
3. It is cut into GPT-2's tokens and closed by `<|endoftext|>`. An empty document is that token alone, as in nanoGPT.
   The text `<|endoftext|>` inside a document is text.
4. Both files appear when all is written, or neither does.
"""

import argparse
import hashlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from train.errors import UserError, run_command
from train.sources import (
    BUILDERS,
    OPENWEBTEXT,
    STDLIB,
    Source,
    count_documents,
    document_batches,
    known_rows,
    load_documents,
    resolve_source,
)
from train.tokens import (
    END_OF_TEXT,
    RANKS_SHA256,
    TOKENIZER_NAME,
    VOCABULARY_SIZE,
    TokenWriter,
    gpt2_encoding,
    is_sidecar,
    sidecar_path,
)

if TYPE_CHECKING:
    from datasets import IterableDataset

VAL_FRACTION = 0.0005  # nanoGPT's
STDLIB_VAL_FRACTION = 0.05  # of some 670 modules, 0.0005 would be none

EXAMPLES = """\
examples:
  Python's own standard library, some 5 million tokens in seconds, no network:
    python -m train.preprocess_data --out_dir data
  OpenWebText with nanoGPT's split, some 9 billion tokens:
    python -m train.preprocess_data --dataset openwebtext --out_dir data/openwebtext
  text files, one document each:
    python -m train.preprocess_data --dataset text --data_files 'books/**/*.txt' --val_fraction 0.05
  JSON lines (also .gz, .zst), the text under "content":
    python -m train.preprocess_data --dataset json --data_files 'dump/*.jsonl.gz' --text_column content
  Parquet:
    python -m train.preprocess_data --dataset parquet --data_files 'shards/*.parquet'
  any dataset on the Hub that needs no code of its own, streamed, here its first 100,000 documents:
    python -m train.preprocess_data --dataset HuggingFaceFW/fineweb-edu --max_documents 100000
"""

# (row number, UTF-8 bytes) → is it for validation?
SplitRule = Callable[[int, bytes], bool]


def hash_rule(val_fraction: float, seed: int) -> SplitRule:
    key = seed.to_bytes(8, "little")
    threshold = int(val_fraction * 2**64)

    def is_validation(row: int, content: bytes) -> bool:
        return int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest(), "little") < threshold

    return is_validation


def nanogpt_rule(val_fraction: float, seed: int, rows: int) -> SplitRule:
    validation = np.zeros(rows, dtype=bool)  # 8 MB for OpenWebText
    validation[np.random.default_rng(seed).permutation(rows)[: math.ceil(rows * val_fraction)]] = True

    def is_validation(row: int, content: bytes) -> bool:
        if row >= rows:
            raise UserError(f"there are more than the {rows:,} documents that the split is for: correct --num_rows")
        return bool(validation[row])

    return is_validation


class Document(NamedTuple):
    text: str
    content: bytes  # the text in UTF-8
    ids: list[int]


@dataclass
class Part:
    """Training or validation, while it is written."""

    writer: TokenWriter
    empty_documents: int = 0
    undecodable_documents: int = 0
    text_bytes: int = 0

    def write(self, documents: Sequence[Document]) -> None:
        if not documents:
            return
        for text, content, _ in documents:
            self.empty_documents += not text
            self.undecodable_documents += "\ufffd" in text
            self.text_bytes += len(content)
        ids = [np.array([*document.ids, END_OF_TEXT], dtype=self.writer.dtype) for document in documents]
        self.writer.write(np.concatenate(ids), len(documents))

    def finish(self, preparation: dict[str, Any]) -> dict[str, Any]:
        return self.writer.finish(
            {
                "empty_documents": self.empty_documents,
                "documents_with_replacement_character": self.undecodable_documents,
                "text_bytes": self.text_bytes,
                **preparation,
            }
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.preprocess_data",
        description="Cut text into GPT-2's tokens: out_dir/train.bin and val.bin (nanoGPT's format), each with a "
        ".json beside it that says where it came from.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", default=STDLIB, metavar="NAME", help=f"{OPENWEBTEXT}, {STDLIB}, {', '.join(BUILDERS)}, or a "
        f"dataset on the Hub as owner/name (default: {STDLIB})")  # fmt: skip
    add("--out_dir", default="data", metavar="DIR", help="where the files go; made if missing (default: data)")
    add("--data_files", nargs="+", default=[], metavar="GLOB", help="files for text, json and parquet (** crosses "
        "folders); for a dataset on the Hub, which of its files")  # fmt: skip
    add("--text_column", default="text", metavar="NAME", help="the column that holds the text (default: text)")
    add("--revision", metavar="REV", help="branch, tag or commit of a dataset on the Hub (default: main, or the "
        "Hub's Parquet conversion where main has only a script)")  # fmt: skip
    add("--val_fraction", type=float, metavar="F", help=f"share of documents for validation (default: {VAL_FRACTION}; "
        f"{STDLIB_VAL_FRACTION} for {STDLIB})")  # fmt: skip
    add("--split", choices=("hash", "nanogpt"), help="hash: by each document's content, independent of order; "
        "nanogpt: by row number, as datasets' train_test_split does (default: nanogpt for openwebtext, else "
        "hash)")  # fmt: skip
    add("--num_rows", type=int, metavar="N", help="documents in the whole dataset, for --split nanogpt where the Hub "
        "does not say; local files are counted")  # fmt: skip
    add("--seed", type=int, default=2357, metavar="N", help="of the split (default: 2357, nanoGPT's)")
    add("--max_documents", type=int, metavar="N", help="take the first N documents for the whole dataset "
        "(default: all)")  # fmt: skip
    add("--num_threads", type=int, default=available_cores(), metavar="N", help="threads that cut text into tokens "
        "(default: the cores of this machine, %(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the files in out_dir")
    args = parser.parse_args(argv)
    args.split = args.split or ("nanogpt" if args.dataset == OPENWEBTEXT else "hash")
    if args.val_fraction is None:
        args.val_fraction = STDLIB_VAL_FRACTION if args.dataset == STDLIB else VAL_FRACTION
    return args


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_arguments(args: argparse.Namespace) -> None:
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction} is not between 0 and 1 (nanoGPT's is {VAL_FRACTION})")
    for name in ("max_documents", "num_rows", "num_threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed} must be at least 0 and less than 2^64")
    if args.num_rows and args.split != "nanogpt":
        raise UserError(
            f"--num_rows {args.num_rows} is for --split nanogpt; --split hash needs no count: leave it out"
        )
    out_dir = Path(args.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is a file: name a folder")
    present = [str(path) for path in (out_dir / "train.bin", out_dir / "val.bin") if path.exists()]
    if present and not args.overwrite:
        raise UserError(f"{' and '.join(present)} exist already: give --overwrite, or another --out_dir")
    for path in (out_dir / "train.bin", out_dir / "val.bin"):
        sidecar = sidecar_path(path)
        if sidecar.exists() and not is_sidecar(sidecar):
            raise UserError(f"{sidecar} is in the way of a sidecar and is not one: name another --out_dir")


def rows_to_split(args: argparse.Namespace, source: Source, dataset: "IterableDataset") -> int:
    """n of the nanogpt rule; local files are read once to count them."""
    rows = args.num_rows
    if rows is None:
        local = source.is_local
        rows = count_documents(source, dataset, args.max_documents) if local else known_rows(source, dataset)
    if rows is None:
        raise UserError(
            f"--split nanogpt needs the number of documents in --dataset {args.dataset}, and the Hub does not say: "
            "give --num_rows, or --split hash"
        )
    return min(rows, args.max_documents or rows)


def encoded_batches(batches: Iterator[list[str]], num_threads: int) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Each batch with its token ids; while one is cut, the one before it is written and the next one read."""
    encoding = gpt2_encoding()
    pending: tuple[list[str], Future[list[list[int]]]] | None = None
    with ThreadPoolExecutor(1) as worker:
        for texts in batches:
            following = texts, worker.submit(encoding.encode_ordinary_batch, texts, num_threads=num_threads)
            if pending:
                yield pending[0], pending[1].result()
            pending = following
        if pending:
            yield pending[0], pending[1].result()


def write_parts(encoded: Iterator[tuple[list[str], list[list[int]]]], rule: SplitRule, train: Part, val: Part) -> int:
    """Send every document to its part; return how many there were."""
    row = 0
    # A terminal is refreshed twice a second; a log gets a line every half minute.
    interval = 0.5 if sys.stderr.isatty() else 30
    with tqdm(unit=" documents", unit_scale=True, mininterval=interval) as progress:
        for texts, ids_of_texts in encoded:
            for_train: list[Document] = []
            for_val: list[Document] = []
            for text, ids in zip(texts, ids_of_texts, strict=True):
                document = Document(text, text.encode("utf-8", "surrogatepass"), ids)
                (for_val if rule(row, document.content) else for_train).append(document)
                row += 1
            train.write(for_train)
            val.write(for_val)
            rate = (train.text_bytes + val.text_bytes) / 1e6 / max(progress.format_dict["elapsed"], 1e-9)
            tokens = train.writer.tokens + val.writer.tokens
            progress.set_postfix_str(f"{rate:.1f} MB/s, {tokens:,} tokens", refresh=False)
            progress.update(len(texts))
    return row


def finish_both(train: Part, val: Part, preparation: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Put both files in place. The older pair goes first, so a crash never leaves files of two preparations; and it
    goes only when the new pair is on the disk, so a full disk does not cost the older one.
    """
    paths = (train.writer.path, val.writer.path)
    for part in (train, val):
        part.writer.flush()
    for path in paths:
        path.unlink(missing_ok=True)
    try:
        return train.finish(preparation), val.finish(preparation)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
            sidecar_path(path).unlink(missing_ok=True)
        raise


def check_parts(args: argparse.Namespace, train: Part, val: Part, rows: int, expected: int | None) -> None:
    if expected is not None and rows != expected:
        raise UserError(
            f"--dataset {args.dataset} ended after {rows:,} documents, and the split was for {expected:,}: "
            f"give --num_rows {rows}, or --split hash"
        )
    for name, part in (("training", train), ("validation", val)):
        if not part.writer.documents:
            direction = "lower" if part is train else "raise"
            raise UserError(
                f"--val_fraction {args.val_fraction} leaves no document for {name} of {rows:,} in all: "
                f"{direction} it, or prepare more documents"
            )


def prepare(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write both files; return their sidecars."""
    check_arguments(args)
    source = resolve_source(args.dataset, args.data_files, args.text_column, args.revision)
    dataset, source = load_documents(source)
    batches = document_batches(source, dataset, args.max_documents)
    first = next(batches, None)
    if first is None:
        raise UserError(f"--dataset {args.dataset} has no documents: check {' '.join(args.data_files) or 'its name'}")
    rows = rows_to_split(args, source, dataset) if args.split == "nanogpt" else None
    if rows is None:
        rule = hash_rule(args.val_fraction, args.seed)
    else:
        rule = nanogpt_rule(args.val_fraction, args.seed, rows)
    preparation = {
        "tokenizer": TOKENIZER_NAME,
        "tokenizer_sha256": RANKS_SHA256,
        "source": source.description(),
        "split": args.split,
        "val_fraction": args.val_fraction,
        "seed": args.seed,
        "num_rows": rows,
        "max_documents": args.max_documents,
    }
    out_dir = Path(args.out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            train, val = (
                Part(stack.enter_context(TokenWriter(out_dir / name, VOCABULARY_SIZE)))
                for name in ("train.bin", "val.bin")
            )
            written = write_parts(encoded_batches(chain([first], batches), args.num_threads), rule, train, val)
            check_parts(args, train, val, written, rows)
            return finish_both(train, val, preparation)
    except OSError as error:
        raise UserError(f"cannot write to --out_dir {out_dir}: {error.strerror or error}") from error


def print_summary(args: argparse.Namespace, train: dict[str, Any], val: dict[str, Any]) -> None:
    documents = train["documents"] + val["documents"]
    text_bytes = train["text_bytes"] + val["text_bytes"]
    empty = train["empty_documents"] + val["empty_documents"]
    undecodable = train["documents_with_replacement_character"] + val["documents_with_replacement_character"]
    print(
        f"documents: {documents:,} ({text_bytes / 1e6:,.1f} MB of text, {empty:,} empty, {undecodable:,} with U+FFFD)"
    )
    print(f"tokens: {train['tokens']:,} for training, {val['tokens']:,} for validation")
    print(f"split: {args.split}, val_fraction {args.val_fraction}, seed {args.seed}, {val['documents']:,} documents")
    print(f"files: {Path(args.out_dir, 'train.bin')} and {Path(args.out_dir, 'val.bin')}, each with its .json")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    train, val = prepare(args)
    print_summary(args, train, val)


if __name__ == "__main__":
    run_command(main)
