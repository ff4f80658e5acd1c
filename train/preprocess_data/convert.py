"""Documents → `train.bin` and `val.bin`: the steps of the README in this folder."""

import gc
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from train.config.arguments import flag
from train.data.token_file import read_sidecar, sidecar_path, token_dtype
from train.data.tokenizer import END_OF_TEXT, RANKS_SHA256, TOKENIZER_NAME, VOCABULARY_SIZE
from train.data.workers import in_parallel
from train.preprocess_data.preparation import PARTS, WORK_FOLDER, Chunk, Preparation
from train.preprocess_data.sources import FILE_KINDS, HUB_DATASETS, STDLIB, Source, file_kinds, resolve_source
from train.preprocess_data.splits import SplitRule, hash_rule, nanogpt_rows, nanogpt_rule
from train.preprocess_data.streams import Documents, count_rows, expected_rows, load_documents, read_documents
from train.preprocess_data.tokenization import ENCODERS, Encoder, choose_encoder
from train.utils import lock
from train.utils.errors import UserError
from train.utils.processes import usable_cores

if TYPE_CHECKING:
    from datasets import IterableDataset

VAL_FRACTION = 0.0005  # nanoGPT's
STDLIB_VAL_FRACTION = 0.05  # 0.0005 of its 670 modules would be none
SUBSETS = "".join(f"; {known.subset} for {name}" for name, known in HUB_DATASETS.items() if known.subset)
CHECKED_DOCUMENTS = 64  # that the encoder must agree with the reference on before anything is written
GC_INTERVAL = 16  # batches


@dataclass(frozen=True)
class SourceFlags:
    """source"""

    dataset: str = flag(
        STDLIB, f"{', '.join([*HUB_DATASETS, STDLIB, *FILE_KINDS])}, or a dataset on the Hub as owner/name"
    )
    data_files: tuple[str, ...] = flag(
        (),
        f"files for {file_kinds('and')} (** crosses folders); for a dataset on the Hub, which of its files to use",
        nargs="+",
    )
    text_column: str = flag("text", "the column that holds the text")
    subset: str | None = flag(None, f"configuration of a dataset on the Hub (default: the dataset's own{SUBSETS})")
    revision: str | None = flag(
        None,
        "branch, tag or commit of a dataset on the Hub (default: main, or the Hub's Parquet conversion where main "
        "has only a script)",
    )
    max_documents: int | None = flag(None, "use only the first N documents (default: all)", at_least=1)


@dataclass(frozen=True)
class SplitFlags:
    """split and order"""

    # The defaults of val_fraction and split depend on the dataset; the command fills them in.
    val_fraction: float = flag(
        None,
        f"fraction of the documents for validation (default: {VAL_FRACTION}; {STDLIB_VAL_FRACTION} for {STDLIB})",
        above=0,
        below=1,
    )
    split: str = flag(
        None,
        "hash: by each document's content, independent of their order; nanogpt: by row number, as datasets' "
        "train_test_split does (default: nanogpt for openwebtext, else hash)",
        choices=("hash", "nanogpt"),
    )
    num_rows: int | None = flag(
        None,
        "number of documents in the dataset, for --split nanogpt where the Hub does not state it; local files are "
        "counted",
        at_least=1,
    )
    seed: int = flag(2357, "seed of the split (default: 2357, nanoGPT's)", at_least=0, below=2**64)
    order: Literal["source", "nanogpt"] = flag(
        "source",
        "order of documents in train.bin: the source's or, with --split nanogpt, nanoGPT's, byte for byte, which "
        "takes twice the disk space while the file is written",
    )


@dataclass(frozen=True)
class SpeedFlags:
    """speed"""

    tokenizer: str = flag(
        "auto",
        "all give the same ids; auto: gigatoken where it is installed and agrees with tiktoken on a sample, "
        "else tiktoken",
        choices=ENCODERS,
    )
    num_proc: int = flag(
        usable_cores(), "number of tokenizing threads (default: the cores of this machine)", at_least=1, at_most=1024
    )


@dataclass(frozen=True)
class OutputFlags:
    """output"""

    out_dir: Path = flag(Path("data"), "folder for the files; created if missing")  # noqa: RUF009
    overwrite: bool = flag(
        False,
        "replace the files in out_dir, and an unfinished preparation by another command; without it, the same "
        "command resumes where it stopped",
    )


@dataclass(frozen=True)
class PreparationConfig(OutputFlags, SpeedFlags, SplitFlags, SourceFlags):
    """One preparation: the flags of all groups."""

    def check(self) -> None:
        """Refuse what cannot be, before anything is read."""
        if self.num_rows and self.split != "nanogpt":
            raise UserError(f"--num_rows {self.num_rows} is for --split nanogpt: --split hash needs no count")
        if self.order == "nanogpt" and self.split != "nanogpt":
            raise UserError("--order nanogpt is for --split nanogpt: it is the order of that split's permutation")
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise UserError(f"--out_dir {self.out_dir} is a file: name a folder")
        for name in PARTS:
            path = self.out_dir / f"{name}.bin"
            try:
                read_sidecar(path)
            except UserError:
                in_the_way = f"{sidecar_path(path)} is in the way of a sidecar and is not one"
                raise UserError(f"{in_the_way}: name another --out_dir") from None

    def request(self, source: Source) -> dict[str, Any]:
        """Everything that decides about the files' content. Only the same request resumes a killed preparation."""
        fields = asdict(self)
        for name in ("out_dir", "tokenizer", "num_proc", "overwrite"):
            del fields[name]
        return fields | {"data_files": list(self.data_files), "files_sha256": source.fingerprint()}


def prepare(config: PreparationConfig) -> None:
    """Prepare the files in `config.out_dir`, or resume a preparation that was killed there."""
    config.check()
    source = resolve_source(config.dataset, config.data_files, config.text_column, config.subset, config.revision)
    request = config.request(source)
    out_dir = config.out_dir
    try:
        with lock.owned(out_dir, "--out_dir"):
            is_unfinished = (out_dir / WORK_FOLDER / "journal.json").exists()
            present = [path for path in (out_dir / f"{name}.bin" for name in PARTS) if path.exists()]
            if present and not is_unfinished and not config.overwrite:
                sidecars = [read_sidecar(path) for path in present]
                if len(present) < len(PARTS) or any(not each or each.request != request for each in sidecars):
                    files = " and ".join(map(str, present))
                    raise UserError(f"{files} exist already: give --overwrite, or another --out_dir")
                shutil.rmtree(out_dir / WORK_FOLDER, ignore_errors=True)  # a kill at the very end leaves it, empty
                print("already prepared; --overwrite prepares it again", file=sys.stderr)
                return
            with Preparation(out_dir, request, config.overwrite) as preparation:
                if preparation.journal.phase == "reading":
                    read_all(config, source, preparation)
                preparation.finish(orders(preparation))
    except OSError as error:
        kept = "; the same command resumes when there is room" if (out_dir / WORK_FOLDER).exists() else ""
        raise UserError(f"cannot write to --out_dir {out_dir}: {error.strerror or error}{kept}") from error


def read_all(config: PreparationConfig, source: Source, preparation: Preparation) -> None:
    """Stream the source from the preparation's position to the end, tokenize and write it."""
    journal = preparation.journal
    before = journal.provenance
    dataset, source = load_documents(replace(source, revision=before["source"]["revision"]) if before else source)
    stream = read_documents(source, dataset, journal.position, journal.rows)
    first = next(stream, None)
    if first is None and not journal.rows:
        files = " ".join(config.data_files) or "its name"
        raise UserError(f"--dataset {config.dataset} has no documents: check {files}")
    if not before:
        journal.provenance = provenance(config, source, dataset)
    rows = journal.provenance["num_rows"]
    if first is not None:
        encode, why = choose_encoder(config.tokenizer, first.texts[:CHECKED_DOCUMENTS])
        print(f"tokenizer: {why}", file=sys.stderr)
        split = (config.val_fraction, config.seed)
        rule = hash_rule(*split) if rows is None else nanogpt_rule(*split, rows)
        batches = limited(chain([first], stream), config.max_documents, rows, preparation)
        available = expected_rows(source, dataset, first.texts)
        expected = rows or min(filter(None, (available, config.max_documents)), default=None)
        tokenized = in_parallel(partial(tokenize, encode=encode, rule=rule), batches, config.num_proc)
        write_all(tokenized, f"{config.dataset}, {config.split} split", expected, preparation)
    check_parts(config, preparation)


def provenance(config: PreparationConfig, source: Source, dataset: "IterableDataset") -> dict[str, Any]:
    """The fields that both sidecars share."""
    return {
        "tokenizer": TOKENIZER_NAME,
        "tokenizer_sha256": RANKS_SHA256,
        "source": source.description(),
        "split": config.split,
        "order": config.order,
        "val_fraction": config.val_fraction,
        "seed": config.seed,
        "num_rows": rows_to_split(config, source, dataset) if config.split == "nanogpt" else None,
        "max_documents": config.max_documents,
    }


def rows_to_split(config: PreparationConfig, source: Source, dataset: "IterableDataset") -> int:
    """The n of the nanogpt rule; local files that do not state it are read once to count it."""
    rows = config.num_rows or count_rows(source, dataset)
    if rows is None:
        raise UserError(
            f"--split nanogpt needs the number of documents in --dataset {config.dataset}, and nothing says it: "
            "give --num_rows, or --split hash"
        )
    return min(rows, config.max_documents or rows)


def limited(
    batches: Iterable[Documents], limit: int | None, rows: int | None, preparation: Preparation
) -> Iterator[Documents]:
    """The first `limit` documents. Raise, and leave nothing, if these are more than the `rows` of the split."""
    for row, texts, position in batches:
        kept = texts if limit is None else texts[: limit - row]
        if rows is not None and row + len(kept) > rows:
            preparation.discard()
            raise UserError(f"there are more than the {rows:,} documents that the split is for: correct --num_rows")
        if len(kept):
            yield Documents(row, kept, position)
        if row + len(kept) == limit:
            return


def tokenize(batch: Documents, encode: Encoder, rule: SplitRule) -> tuple[Chunk, Chunk]:
    """The training and the validation documents of a batch."""
    ids, lengths = encode(batch.texts)
    is_validation = rule(batch.row, batch.texts)
    terminated = np.full(ids.size + lengths.size, END_OF_TEXT, dtype=token_dtype(VOCABULARY_SIZE))
    is_text = np.ones(terminated.size, dtype=bool)
    is_text[np.cumsum(lengths + 1) - 1] = False
    terminated[is_text] = ids
    sizes = pc.binary_length(batch.texts).to_numpy()
    damaged = with_replacement_character(batch.texts)

    def chunk(chosen: np.ndarray) -> Chunk:
        kept = terminated if chosen.all() else terminated[np.repeat(chosen, lengths + 1)]
        chosen_sizes = sizes[chosen]
        counts = {
            "documents": len(chosen_sizes),
            "empty_documents": int((chosen_sizes == 0).sum()),
            "documents_with_replacement_character": int(damaged[chosen].sum()),
            "text_bytes": int(chosen_sizes.sum()),
        }
        return Chunk(kept, counts)

    return chunk(~is_validation), chunk(is_validation)


def with_replacement_character(texts: pa.LargeStringArray) -> np.ndarray:
    """(texts,) bool: which of them contain U+FFFD, which replaces bytes that are not UTF-8."""
    # Arrow's search takes a third of gigatoken's time, and mostly no text of a batch has one.
    _, offsets, content = texts.buffers()
    start, end = np.frombuffer(offsets, dtype=np.int64)[[texts.offset, texts.offset + len(texts)]].tolist()
    if "\ufffd".encode() not in content.slice(start, end - start).to_pybytes():
        return np.zeros(len(texts), dtype=bool)
    return pc.match_substring(texts, "\ufffd").to_numpy(zero_copy_only=False)


def write_all(
    tokenized: Iterable[tuple[Documents, tuple[Chunk, Chunk]]],
    title: str,
    expected: int | None,
    preparation: Preparation,
) -> None:
    """Append everything to the preparation, under a progress bar."""
    text_bytes = 0
    start = preparation.journal.rows
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log gets a line each time
    with tqdm(
        desc=title, total=expected, initial=start, unit=" documents", unit_scale=True, mininterval=interval
    ) as progress:
        # Bounds the memory: what `datasets` keeps of each table is in a reference cycle, which Python would look for
        # after hundreds of tables only.
        gc.freeze()
        for number, (batch, chunks) in enumerate(tokenized):
            if number % GC_INTERVAL == 0:
                gc.collect()
            preparation.append(chunks, len(batch.texts), batch.next)
            text_bytes += sum(chunk.counts["text_bytes"] for chunk in chunks)
            rate = text_bytes / 1e6 / max(progress.format_dict["elapsed"], 1e-9)
            tokens = sum(part.tokens for part in preparation.journal.parts.values())
            progress.set_postfix_str(f"{rate:.1f} MB/s, {tokens:,} tokens", refresh=False)
            progress.update(len(batch.texts))


def check_parts(config: PreparationConfig, preparation: Preparation) -> None:
    """Raise, and leave nothing, if the split was for another number of documents, or leaves a part empty."""
    rows, parts = preparation.journal.rows, preparation.journal.parts
    expected, fault = preparation.journal.provenance["num_rows"], None
    if expected is not None and rows != expected:
        fault = (
            f"--dataset {config.dataset} ended after {rows:,} documents, and the split was for {expected:,}: "
            f"give --num_rows {rows}, or --split hash"
        )
    elif not (parts["train"].documents and parts["val"].documents):
        name, direction = ("validation", "raise") if parts["train"].documents else ("training", "lower")
        fault = (
            f"--val_fraction {config.val_fraction} leaves no document for {name} of {rows:,} in all: "
            f"{direction} it, or prepare more documents"
        )
    if fault:
        preparation.discard()
        raise UserError(fault)


def orders(preparation: Preparation) -> dict[str, np.ndarray | None]:
    """For each part, the row numbers in the order of its file; None for the stream's order."""
    fields = preparation.journal.provenance
    if fields["split"] != "nanogpt":
        return dict.fromkeys(PARTS)
    train, val = nanogpt_rows(fields["val_fraction"], fields["seed"], fields["num_rows"])
    return {"train": train if fields["order"] == "nanogpt" else None, "val": val}


def summary(out_dir: Path) -> str:
    """A description of the prepared files."""
    train, val = (read_sidecar(out_dir / f"{name}.bin") for name in PARTS)
    assert train is not None
    assert val is not None
    documents, text_bytes, empty, undecodable = (
        getattr(train, key) + getattr(val, key)
        for key in ("documents", "text_bytes", "empty_documents", "documents_with_replacement_character")
    )
    return (
        f"documents: {documents:,} ({text_bytes / 1e6:,.1f} MB of text, {empty:,} empty, {undecodable:,} with U+FFFD)"
        "\n"
        f"tokens: {train.tokens:,} for training, {val.tokens:,} for validation\n"
        f"split: {val.split}, val_fraction {val.val_fraction}, seed {val.seed}, {val.documents:,} documents\n"
        f"files: {out_dir / 'train.bin'} and {out_dir / 'val.bin'}, each with its .json"
    )
