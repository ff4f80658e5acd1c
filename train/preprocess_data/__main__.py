"""Text → `train.bin` and `val.bin` with their sidecars, ready for `python -m train`.

1. Documents are streamed from the source (train/sources.py, train/streams.py), in its order.
2. Each goes to training or to validation, by one of two rules (train/splits.py): `hash`, by its content, which depends
   neither on order nor on number; `nanogpt`, by its row's number, as `Dataset.train_test_split` does it for nanoGPT.
3. It is cut into GPT-2's tokens (train/encoders.py) and closed by `<|endoftext|>`. An empty document is that token
   alone, as in nanoGPT. The text `<|endoftext|>` inside a document is text.
4. What is written survives a kill at any moment (train/preparation.py): the same command goes on, to the same bytes.
5. With `nanogpt`, `val.bin` gets nanoGPT's order, and with `--order nanogpt` so does `train.bin`.
"""

import argparse
import gc
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from train.data.token_file import (
    END_OF_TEXT,
    RANKS_SHA256,
    TOKENIZER_NAME,
    VOCABULARY_SIZE,
    is_sidecar,
    read_sidecar,
    sidecar_path,
    token_dtype,
)
from train.preprocess_data.encoders import ENCODERS, Encoder, choose_encoder
from train.preprocess_data.preparation import PARTS, WORK_FOLDER, Chunk, Preparation, finished, locked
from train.preprocess_data.sources import (
    BUILDERS,
    FINEWEB_EDU,
    FINEWEB_EDU_SUBSET,
    OPENWEBTEXT,
    STDLIB,
    Source,
    resolve_source,
)
from train.preprocess_data.splits import SplitRule, hash_rule, nanogpt_rows, nanogpt_rule
from train.preprocess_data.streams import (
    Documents,
    Position,
    count_rows,
    estimated_rows,
    fingerprint,
    known_rows,
    load_documents,
    read_documents,
)
from train.preprocess_data.verify import verify
from train.utils.arguments import ArgumentParser
from train.utils.command import run_command
from train.utils.errors import UserError
from train.utils.workers import in_parallel

if TYPE_CHECKING:
    from datasets import IterableDataset

VAL_FRACTION = 0.0005  # nanoGPT's
COLLECTED_BATCHES = 16  # between two looks for garbage
CHECKED_DOCUMENTS = 64  # before all else, by the reference; later ones in samples
STDLIB_VAL_FRACTION = 0.05  # of some 670 modules, 0.0005 would be none

EXAMPLES = """\
examples:
  Python's own standard library, some 5 million tokens in seconds, no network:
    python -m train.preprocess_data --out_dir data
  OpenWebText with nanoGPT's split, some 9 billion tokens, to the byte nanoGPT's own files:
    python -m train.preprocess_data --dataset openwebtext --out_dir data/openwebtext --order nanogpt
  text files, one document each:
    python -m train.preprocess_data --dataset text --data_files 'books/**/*.txt' --val_fraction 0.05
  JSON lines (also .gz, .zst), the text under "content":
    python -m train.preprocess_data --dataset json --data_files 'dump/*.jsonl.gz' --text_column content
  Parquet:
    python -m train.preprocess_data --dataset parquet --data_files 'shards/*.parquet'
  the first 100,000 documents of FineWeb-Edu, or of any dataset on the Hub that needs no code of its own:
    python -m train.preprocess_data --dataset fineweb-edu --max_documents 100000
  check what was written:
    python -m train.preprocess_data --verify data
Killed, or out of disk? The same command goes on where it was.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m train.preprocess_data",
        description="Cut text into GPT-2's tokens: out_dir/train.bin and val.bin (nanoGPT's format), each with a "
        ".json beside it that says where it came from.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--dataset", default=STDLIB, metavar="NAME", help=f"{OPENWEBTEXT}, {STDLIB}, {', '.join(BUILDERS)}, or a "
        f"dataset on the Hub as owner/name (default: {STDLIB})")  # fmt: skip
    add("--out_dir", default="data", metavar="DIR", help="where the files go; made if missing (default: data)")
    add("--data_files", nargs="+", default=[], metavar="GLOB", help="files for text, json (JSON lines) and parquet "
        "(** crosses folders), or their http(s) addresses; for a dataset on the Hub, which of its files")  # fmt: skip
    add("--text_column", default="text", metavar="NAME", help="the column that holds the text (default: text)")
    add("--subset", metavar="NAME", help="which configuration of a dataset on the Hub (default: its own; "
        f"{FINEWEB_EDU_SUBSET} of {FINEWEB_EDU})")  # fmt: skip
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
    add("--order", choices=("source", "nanogpt"), default="source", help="of train.bin: the source's, or with "
        "--split nanogpt nanoGPT's, to the byte, for twice the disk while it is made (default: source)")  # fmt: skip
    add("--tokenizer", choices=ENCODERS, default="auto", help="what cuts text into tokens; all give the same "
        "(default: gigatoken where it is installed and agrees with tiktoken on a sample, else tiktoken)")  # fmt: skip
    add("--num_proc", type=int, default=available_cores(), metavar="N", help="how many of them work at once, as "
        "threads (default: the cores of this machine, %(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the files in out_dir, and what another command left "
        "unfinished there; the same command goes on where it was killed")  # fmt: skip
    add(
        "--verify", metavar="DIR", help="prepare nothing: check the files in a folder (sizes, digests, ids, documents)"
    )
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
    for name in ("max_documents", "num_rows", "num_proc"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed} must be at least 0 and less than 2^64")
    if args.split != "nanogpt":
        if args.num_rows:
            raise UserError(
                f"--num_rows {args.num_rows} is for --split nanogpt; --split hash needs no count: leave it out"
            )
        if args.order == "nanogpt":
            raise UserError("--order nanogpt is for --split nanogpt: the order is the one of that split's permutation")
    out_dir = Path(args.out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"--out_dir {out_dir} is a file: name a folder")
    for name in PARTS:
        sidecar = sidecar_path(out_dir / f"{name}.bin")
        if sidecar.exists() and not is_sidecar(sidecar):
            raise UserError(f"{sidecar} is in the way of a sidecar and is not one: name another --out_dir")


def requested(args: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What decides about the files, byte for byte; a preparation that was killed is taken up by the same only."""
    flags = ("dataset", "text_column", "subset", "revision", "split", "order", "val_fraction", "seed", "num_rows")
    return {
        **{flag: getattr(args, flag) for flag in flags},
        "data_files": list(args.data_files),
        "max_documents": args.max_documents,
        "files_sha256": fingerprint(source),
    }


def rows_to_split(args: argparse.Namespace, source: Source, dataset: "IterableDataset") -> int:
    """n of the nanogpt rule; local files are read once to count them where they do not say."""
    rows = args.num_rows or count_rows(source, dataset)
    if rows is None:
        raise UserError(
            f"--split nanogpt needs the number of documents in --dataset {args.dataset}, and nothing says it: "
            "give --num_rows, or --split hash"
        )
    return min(rows, args.max_documents or rows)


class Batch(NamedTuple):
    row: int  # the first one's number
    texts: pa.LargeStringArray
    behind: Position


def numbered(documents: Iterable[Documents], row: int, limit: int | None) -> Iterator[Batch]:
    """Documents with their rows' numbers, from `row` up to below `limit`."""
    for texts, behind in documents:
        kept = texts if limit is None else texts[: limit - row]
        if len(kept):
            yield Batch(row, kept, behind)
        row += len(kept)
        if row == limit:
            return


def tokenize(batch: Batch, encode: Encoder, rule: SplitRule) -> tuple[Chunk, Chunk]:
    """The batch's training and its validation documents."""
    ids, lengths = encode(batch.texts)
    is_validation = rule(batch.row, batch.texts)
    closed = np.full(ids.size + lengths.size, END_OF_TEXT, dtype=token_dtype(VOCABULARY_SIZE))
    is_text = np.ones(closed.size, dtype=bool)
    is_text[np.cumsum(lengths + 1) - 1] = False
    closed[is_text] = ids
    sizes = pc.binary_length(batch.texts).to_numpy()
    damaged = with_replacement_character(batch.texts)

    def chunk(chosen: np.ndarray) -> Chunk:
        kept = closed if chosen.all() else closed[np.repeat(chosen, lengths + 1)]
        some = sizes[chosen]
        return Chunk(kept, len(some), int((some == 0).sum()), int(damaged[chosen].sum()), int(some.sum()))

    return chunk(~is_validation), chunk(is_validation)


def with_replacement_character(texts: pa.LargeStringArray) -> np.ndarray:
    """(texts,) bool: which of them have a U+FFFD, as bytes that were no UTF-8 become."""
    # Arrow's own search takes a third of gigatoken's time. Mostly there is none in all of the texts together.
    _, offsets, content = texts.buffers()
    start, end = np.frombuffer(offsets, dtype=np.int64)[[texts.offset, texts.offset + len(texts)]].tolist()
    if "\ufffd".encode() not in content.slice(start, end - start).to_pybytes():
        return np.zeros(len(texts), dtype=bool)
    return pc.match_substring(texts, "\ufffd").to_numpy(zero_copy_only=False)


def checked(batches: Iterable[Batch], rows: int | None, preparation: Preparation) -> Iterator[Batch]:
    """Raise, and leave nothing, where there are more documents than the split is for."""
    for batch in batches:
        if rows is not None and batch.row + len(batch.texts) > rows:
            preparation.discard()
            raise UserError(f"there are more than the {rows:,} documents that the split is for: correct --num_rows")
        yield batch


def read_all(args: argparse.Namespace, source: Source, preparation: Preparation) -> None:
    """Stream the source, from where the preparation is to its end."""
    before = preparation.sidecar
    dataset, source = load_documents(replace(source, revision=before["source"]["revision"]) if before else source)
    stream = read_documents(source, dataset, preparation.position, preparation.rows)
    first = next(stream, None)
    if first is None and not preparation.rows:
        raise UserError(f"--dataset {args.dataset} has no documents: check {' '.join(args.data_files) or 'its name'}")
    if not before:
        preparation.settle(described(args, source, dataset))
    rows = preparation.sidecar["num_rows"]
    if rows is None:
        rule = hash_rule(args.val_fraction, args.seed)
    else:
        rule = nanogpt_rule(args.val_fraction, args.seed, rows)
    if first is not None:
        encode, why = choose_encoder(args.tokenizer, first.texts[:CHECKED_DOCUMENTS])
        print(f"tokenizer: {why}", file=sys.stderr)
        batches = numbered(chain([first], stream), preparation.rows, args.max_documents)
        batches = checked(batches, rows, preparation)
        known = known_rows(source, dataset) or estimated_rows(source, first.texts)
        expected = rows or min(filter(None, (known, args.max_documents)), default=None)
        write_all(
            args,
            in_parallel(partial(tokenize, encode=encode, rule=rule), batches, args.num_proc),
            expected,
            preparation,
        )
    check_parts(args, preparation)


def described(args: argparse.Namespace, source: Source, dataset: "IterableDataset") -> dict[str, Any]:
    return {
        "tokenizer": TOKENIZER_NAME,
        "tokenizer_sha256": RANKS_SHA256,
        "source": source.description(),
        "split": args.split,
        "order": args.order,
        "val_fraction": args.val_fraction,
        "seed": args.seed,
        "num_rows": rows_to_split(args, source, dataset) if args.split == "nanogpt" else None,
        "max_documents": args.max_documents,
    }


def write_all(
    args: argparse.Namespace,
    tokenized: Iterable[tuple[Batch, tuple[Chunk, Chunk]]],
    expected: int | None,
    preparation: Preparation,
) -> None:
    text_bytes = 0
    # A terminal is refreshed twice a second; a log gets a line every half minute.
    interval = 0.5 if sys.stderr.isatty() else 30
    name = f"{args.dataset}, {args.split} split"
    with tqdm(
        desc=name, total=expected, initial=preparation.rows, unit=" documents", unit_scale=True, mininterval=interval
    ) as progress:
        # What `datasets` leaves of each table refers to itself, and Python would look for it after hundreds of tables.
        gc.freeze()
        for number, (batch, chunks) in enumerate(tokenized):
            if number % COLLECTED_BATCHES == 0:
                gc.collect()
            preparation.append(chunks, len(batch.texts), batch.behind)
            text_bytes += sum(chunk.text_bytes for chunk in chunks)
            rate = text_bytes / 1e6 / max(progress.format_dict["elapsed"], 1e-9)
            tokens = sum(preparation.tokens().values())
            progress.set_postfix_str(f"{rate:.1f} MB/s, {tokens:,} tokens", refresh=False)
            progress.update(len(batch.texts))


def check_parts(args: argparse.Namespace, preparation: Preparation) -> None:
    """Raise, and leave nothing, if what was read is not what the split was for, or leaves one part empty."""
    rows, expected, fault = preparation.rows, preparation.sidecar["num_rows"], None
    documents = preparation.documents()
    if expected is not None and rows != expected:
        fault = (
            f"--dataset {args.dataset} ended after {rows:,} documents, and the split was for {expected:,}: "
            f"give --num_rows {rows}, or --split hash"
        )
    for part, name, direction in (("train", "training", "lower"), ("val", "validation", "raise")):
        if not documents[part]:
            fault = fault or (
                f"--val_fraction {args.val_fraction} leaves no document for {name} of {rows:,} in all: "
                f"{direction} it, or prepare more documents"
            )
    if fault:
        preparation.discard()
        raise UserError(fault)


def orders(preparation: Preparation) -> dict[str, np.ndarray | None]:
    """The rows of each part in the order that its file gets; None for the stream's."""
    sidecar = preparation.sidecar
    if sidecar["split"] != "nanogpt":
        return dict.fromkeys(PARTS)
    train, val = nanogpt_rows(sidecar["val_fraction"], sidecar["seed"], sidecar["num_rows"])
    return {"train": train if sidecar["order"] == "nanogpt" else None, "val": val}


def prepare(args: argparse.Namespace) -> None:
    check_arguments(args)
    source = resolve_source(args.dataset, args.data_files, args.text_column, args.subset, args.revision)
    request = requested(args, source)
    out_dir = Path(args.out_dir)
    paths = [out_dir / f"{name}.bin" for name in PARTS]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with locked(out_dir):
            under_way = (out_dir / WORK_FOLDER / "journal.json").exists()
            present = [str(path) for path in paths if path.exists()]
            if present and not under_way and not args.overwrite:
                if not finished(out_dir, request):
                    raise UserError(f"{' and '.join(present)} exist already: give --overwrite, or another --out_dir")
                shutil.rmtree(out_dir / WORK_FOLDER, ignore_errors=True)  # all that a kill at the very end leaves
                print("already prepared; --overwrite prepares it again", file=sys.stderr)
                return
            with Preparation(out_dir, request, args.overwrite) as preparation:
                if preparation.phase == "reading":
                    read_all(args, source, preparation)
                preparation.finish(orders(preparation))
    except OSError as error:
        kept = "; the same command goes on when there is room" if (out_dir / WORK_FOLDER).exists() else ""
        raise UserError(f"cannot write to --out_dir {out_dir}: {error.strerror or error}{kept}") from error


def print_summary(out_dir: Path) -> None:
    train, val = (read_sidecar(out_dir / f"{name}.bin") or {} for name in PARTS)
    documents, text_bytes, empty, undecodable = (
        train[key] + val[key]
        for key in ("documents", "text_bytes", "empty_documents", "documents_with_replacement_character")
    )
    print(
        f"documents: {documents:,} ({text_bytes / 1e6:,.1f} MB of text, {empty:,} empty, {undecodable:,} with U+FFFD)"
    )
    print(f"tokens: {train['tokens']:,} for training, {val['tokens']:,} for validation")
    split = f"split: {val['split']}, val_fraction {val['val_fraction']}, seed {val['seed']}"
    print(f"{split}, {val['documents']:,} documents")
    print(f"files: {out_dir / 'train.bin'} and {out_dir / 'val.bin'}, each with its .json")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.verify:
        verify(Path(args.verify))
        return
    prepare(args)
    print_summary(Path(args.out_dir))


if __name__ == "__main__":
    run_command(main)
