"""A source → its documents, in order, streamed by `datasets`.

Local files and the standard library are streamed too, so there is one path to test. No source runs code of its own:
`datasets` refuses script datasets. A stream that fails resumes after its last document, and so does a killed program.
"""

import glob
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from train.preprocess_data.retry import is_script_refusal, wait_or_raise
from train.preprocess_data.sources import HUB_DATASETS, PARQUET_REVISION, READ_ROWS, Source

if TYPE_CHECKING:
    from datasets import IterableDataset

BATCH_DOCUMENTS = 1024
BATCH_BYTES = 1 << 20  # of UTF-8: one unit of work for a thread, and little memory
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")


class Position(NamedTuple):
    """Where a stream resumes: its `state_dict`, and the number of rows to skip after it. It survives JSON."""

    stream: dict[str, Any] | None = None
    skip: int = 0


BEGINNING = Position()


class Documents(NamedTuple):
    row: int  # number of the first one
    texts: pa.LargeStringArray  # valid UTF-8, no nulls
    next: Position  # of the documents after these


def load_documents(source: Source) -> tuple["IterableDataset", Source]:
    """Open the source as a stream of Arrow tables; the returned source has the commit that was opened."""
    import datasets

    datasets.disable_progress_bars()  # of its downloads and file lists; ours counts documents
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it raises what it logs
    # Its own retries would read on from a connection that is gone.
    for setting in ("STREAMING_READ", "STREAMING_OPEN"):
        setattr(datasets.config, f"{setting}_MAX_RETRIES", 1)
        setattr(datasets.config, f"{setting}_RETRY_INTERVAL", 0)
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    if "torch" not in sys.modules:
        datasets.config.TORCH_AVAILABLE = False  # saves 200 MB
    failures = 0
    while True:
        try:
            return _open(source)
        except Exception as error:  # file systems and formats raise errors of their own types
            failures += 1
            wait_or_raise(source, error, failures, opening=True)


def _open(source: Source) -> tuple["IterableDataset", Source]:
    from huggingface_hub.errors import RevisionNotFoundError

    opened = pinned(source)
    try:
        return open_stream(opened), opened
    except RuntimeError as refusal:
        if not is_script_refusal(refusal) or source.revision is not None:
            raise
        try:
            converted = pinned(replace(source, revision=PARQUET_REVISION))
        except RevisionNotFoundError:
            raise refusal from None
        return open_stream(converted), converted


def pinned(source: Source) -> Source:
    """The source at the commit that its revision is now, so that a preparation that resumes reads the same."""
    from huggingface_hub import HfApi

    if source.hub_id is None:
        return source
    return replace(source, revision=HfApi().dataset_info(source.hub_id, revision=source.revision).sha)


def open_stream(source: Source) -> "IterableDataset":
    from datasets import load_dataset_builder
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    options: dict[str, Any] = {"data_files": list(source.data_files) or None, "name": source.subset}
    path, options["revision"] = source.hub_id, source.revision
    if source.kind is not None:
        path = source.kind.builder
        # `datasets` reads names as patterns, and these are names.
        files = [glob.escape(str(Path(file).absolute())) for file in source.files]
        options = {"data_files": files, **source.kind.options(source)}
    if path == "text":
        from train.preprocess_data.text_files import TextFiles

        return TextFiles(**options).as_streaming_dataset(split="train").with_format("arrow")
    builder = load_dataset_builder(path, **options)
    dataset = builder.as_streaming_dataset(split="train")
    if isinstance(builder.config, ParquetConfig):
        # Rows read at once: by default a full row group, and an error for a file that has none.
        options["batch_size"] = READ_ROWS
        if source.text_column in (dataset.column_names or []):
            options["columns"] = [source.text_column]
        dataset = load_dataset_builder(path, **options).as_streaming_dataset(split="train")
    return dataset.with_format("arrow")


def read_documents(
    source: Source, dataset: "IterableDataset", start: Position = BEGINNING, row: int = 0
) -> Iterator[Documents]:
    """Documents from `start` on, in arrays of bounded size. A null is an empty document; a blank JSON line is none."""
    failures = 0
    while True:
        try:
            for texts, position in _read(source, dataset, start):
                failures = 0
                yield Documents(row, texts, position)
                start, row = position, row + len(texts)
            return
        except Exception as error:
            failures += 1
            wait_or_raise(source, error, failures, row=row)


def _read(
    source: Source, dataset: "IterableDataset", start: Position
) -> Iterator[tuple[pa.LargeStringArray, Position]]:
    state, skip = start
    if state is not None:
        dataset.load_state_dict(state)
    pieces: list[pa.LargeStringArray] = []
    documents = size = 0
    for table in dataset.iter(batch_size=source.kind.read_rows if source.kind else READ_ROWS):
        texts, rows = texts_of(source, table)
        ends = np.cumsum(pc.binary_length(texts).to_numpy())
        first = int(np.searchsorted(rows, skip))
        while first < len(texts):
            before = int(ends[first - 1]) if first else 0
            full = int(np.searchsorted(ends, before + BATCH_BYTES - size))  # the document that fills the batch
            end = min(len(texts), first + BATCH_DOCUMENTS - documents, full + 1)
            pieces.append(texts[first:end])
            documents, size = documents + end - first, size + int(ends[end - 1]) - before
            if documents == BATCH_DOCUMENTS or size >= BATCH_BYTES:
                yield pa.concat_arrays(pieces), Position(state, int(rows[end - 1]) + 1)
                pieces, documents, size = [], 0, 0
            first = end
        state, skip = dataset.state_dict(), 0
    if pieces:
        yield pa.concat_arrays(pieces), Position(state)


def texts_of(source: Source, table: pa.Table) -> tuple[pa.LargeStringArray, np.ndarray]:
    """The documents of a table, and the row number of each."""
    if source.kind is not None and source.kind.parse is not None:
        lines = decoded(table.column("text")).to_pylist()
        parsed = pa.array([source.kind.parse(source, line) for line in lines], pa.large_string())
        return parsed.drop_null(), np.flatnonzero(parsed.is_valid())
    if source.text_column not in table.column_names:
        raise source.no_column(table.column_names)
    column = table.column(source.text_column)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise source.not_text(kind, table.column_names)
    return decoded(column), np.arange(len(column))


def decoded(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """The strings of a column; nulls become empty, and bytes that are not UTF-8 U+FFFD."""
    texts = pc.fill_null(column.cast(pa.large_string()).combine_chunks(), "")
    try:
        texts.validate(full=True)  # Arrow does not check what a file calls UTF-8
    except pa.ArrowInvalid:
        contents = texts.cast(pa.large_binary()).to_pylist()
        texts = pa.array([content.decode("utf-8", "replace") for content in contents], pa.large_string())
    return texts


def known_rows(source: Source, dataset: "IterableDataset") -> int | None:
    """The number of documents, where it is known without reading them all."""
    if source.kind is not None:
        return source.kind.count_rows(source.files) if source.kind.count_rows else None
    if source.data_files:
        return None
    splits = dataset.info.splits or {}
    stated = splits["train"].num_examples if "train" in splits else None
    return stated or next((known.rows for known in HUB_DATASETS.values() if known.hub_id == source.hub_id), None)


def expected_rows(source: Source, dataset: "IterableDataset", sample: pa.LargeStringArray) -> int | None:
    """`known_rows`, or about how many documents the files have by their sizes, where these are not compressed."""
    as_written = source.kind.as_written if source.kind else None
    if as_written is None or any(path.endswith(COMPRESSED) for path in source.files):
        return known_rows(source, dataset)
    read = sum(len(as_written(source, text).encode()) for text in sample.to_pylist())
    return sum(Path(path).stat().st_size for path in source.files) * len(sample) // read or None


def count_rows(source: Source, dataset: "IterableDataset") -> int | None:
    """The number of documents; local files are read to their end if necessary. None where the Hub does not say."""
    rows = known_rows(source, dataset)
    if rows is None and source.kind is not None:
        dataset, _ = load_documents(source)  # another one, because a dataset has one position
        with tqdm(unit=" documents", unit_scale=True, desc="counting", leave=False) as progress:
            for documents in read_documents(source, dataset):
                progress.update(len(documents.texts))
            rows = progress.n
    return rows
