"""A source → its documents, in the stream's order, by way of `datasets`.

Local files and the standard library are streamed too, so there is one path to test. No source runs code of its own:
`datasets` refuses script datasets, and so does this. A stream that breaks off goes on behind the last document that
came, and so does a program that was killed.
"""

import glob
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from train.preprocess_data.sources import (
    LINES,
    OPENWEBTEXT_ID,
    OPENWEBTEXT_ROWS,
    PARQUET_REVISION,
    READ_ROWS,
    WHOLE_DOCUMENTS,
    Source,
)
from train.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

BATCH_DOCUMENTS = 1024
BATCH_BYTES = 1 << 20  # of UTF-8: the workers' share, and memory stays small

UNCOMPRESSED = (".jsonl", ".json", ".ndjson")
SILENCE_SECONDS = 60.0  # of a server that answers nothing: a failure
RETRIES = 10  # in a row without a document between them, when a server fails: about 9 minutes
RETRY_SECONDS = 1.0  # before the first; doubled for each one after it
LONGEST_RETRY_SECONDS = 60.0


class Position(NamedTuple):
    """Where a stream goes on: its `state_dict` and how many rows to leave out behind it. It survives JSON."""

    stream: dict[str, Any] | None = None
    skip: int = 0


BEGINNING = Position()


class Documents(NamedTuple):
    texts: pa.LargeStringArray  # valid UTF-8, no nulls
    behind: Position


def fingerprint(source: Source) -> str | None:
    """SHA-256 of what tells the files from later ones of the same names; None on the Hub, which has commits."""
    if source.is_on_the_hub:
        return None
    facts: list[tuple[Any, ...]] = []
    for path in source.files:
        stat = Path(path).stat()
        facts.append((path, stat.st_size, stat.st_mtime_ns))
    facts += [(address, *_headers(source, address)) for address in source.addresses]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _headers(source: Source, address: str) -> list[str | None]:
    from huggingface_hub.utils import httpx

    attempts = Attempts(source)
    while True:
        try:
            response = httpx.head(address, follow_redirects=True, timeout=SILENCE_SECONDS)
            if response.status_code not in (405, 501):  # not every server answers this question
                response.raise_for_status()
            return [response.headers.get(name) for name in ("ETag", "Last-Modified", "Content-Length")]
        except Exception as error:
            attempts.failed(error, opening=True)


def load_documents(source: Source) -> tuple["IterableDataset", Source]:
    """Open the source as a stream of Arrow tables; the source that comes back has the commit that was opened."""
    import datasets

    datasets.disable_progress_bars()  # of its downloads and file lists; ours counts documents
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it raises too
    # It would read on by itself from a connection that is gone.
    for setting in ("STREAMING_READ", "STREAMING_OPEN"):
        setattr(datasets.config, f"{setting}_MAX_RETRIES", 1)
        setattr(datasets.config, f"{setting}_RETRY_INTERVAL", 0)
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    if "torch" not in sys.modules:
        datasets.config.TORCH_AVAILABLE = False  # 200 MB that nothing here needs
    attempts = Attempts(source)
    while True:
        try:
            return _open(source)
        except Exception as error:  # the set is open: every file system and format brings its own
            attempts.failed(error, opening=True)


def _open(source: Source) -> tuple["IterableDataset", Source]:
    from datasets.exceptions import DatasetNotFoundError

    opened = pinned(source)
    try:
        return open_stream(opened), opened
    except RuntimeError as refusal:
        if not is_script_refusal(refusal) or source.revision is not None:
            raise
        converted = pinned(replace(source, revision=PARQUET_REVISION))
        try:
            return open_stream(converted), converted
        except DatasetNotFoundError:
            raise refusal from None


def pinned(source: Source) -> Source:
    """The source at the commit that its revision is now, so that whoever goes on later reads the same."""
    from huggingface_hub import HfApi

    if not source.is_on_the_hub:
        return source
    return replace(source, revision=HfApi().dataset_info(source.path, revision=source.revision).sha)


def open_stream(source: Source) -> "IterableDataset":
    from datasets import load_dataset_builder
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    # `datasets` reads names as patterns; local ones are already resolved, so what looks like a pattern is a name.
    files = [glob.escape(str(Path(path).absolute())) for path in source.files] or list(source.data_files) or None
    words: dict[str, Any] = {"data_files": files, **source.options}
    if source.addresses:
        import aiohttp

        # Its own gives up after five minutes of one answer, however well it flows, and not before if nothing comes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        options: dict[str, Any] = {"client_kwargs": {"timeout": timeout}}
        if source.path == "text":
            options["block_size"] = 0  # read in one answer, as not every server can be asked for a part
        words["storage_options"] = {"http": options, "https": options}
    if source.path == "text":
        from train.preprocess_data.text_files import TextFiles

        return TextFiles(**words).as_streaming_dataset(split="train").with_format("arrow")
    words |= {"name": source.subset, "revision": source.revision}
    builder = load_dataset_builder(source.path, **words)
    dataset = builder.as_streaming_dataset(split="train")
    if isinstance(builder.config, ParquetConfig):
        # Rows read at once: without the number a whole row group, and an error for a file that has none.
        words["batch_size"] = READ_ROWS
        if source.is_local:
            import pyarrow.dataset

            # Else Arrow keeps what it has read of a file, still compressed, to the file's end.
            words["fragment_scan_options"] = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
        if source.text_column in (dataset.column_names or []):
            words["columns"] = [source.text_column]
        dataset = load_dataset_builder(source.path, **words).as_streaming_dataset(split="train")
    return dataset.with_format("arrow")


def is_script_refusal(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "scripts are no longer supported" in str(error)


class Attempts:
    """What to do when a source cannot be read: wait, longer each time, or say in a sentence why there is no use."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.failures = 0

    def succeeded(self) -> None:
        self.failures = 0

    def failed(self, error: Exception, opening: bool = False, row: int = 0) -> None:
        """Return when it is time to try again.

        Raises:
            UserError: it would fail again.
        """
        if isinstance(error, UserError):
            raise error
        self.failures += 1
        # fsspec calls a file missing whatever the server answered
        remote = self.source.addresses
        missing = remote and isinstance(error, FileNotFoundError) and not any(map(is_refused, remote))
        if self.source.is_local or not (missing or is_transient(error, opening)):
            raise UserError(reading_failed(self.source, error)) from error
        if self.failures > RETRIES:
            raise UserError(
                f"{reading_failed(self.source, error)}; it failed {self.failures} times in a row, so try again later"
            ) from error
        seconds = min(RETRY_SECONDS * 2 ** (self.failures - 1), LONGEST_RETRY_SECONDS)
        again = f"trying again from row {row:,} in {seconds:g} s ({self.failures} of {RETRIES})"
        tqdm.write(f"{reason(error)}: {again}", file=sys.stderr)
        time.sleep(seconds)


def is_transient(error: BaseException | None, opening: bool) -> bool:
    """Whether a server or the way to it failed, for once. Who cannot even connect at first is offline."""
    from huggingface_hub.utils import httpx

    aiohttp = sys.modules.get("aiohttp")  # slow to import, and what was not imported raised nothing
    disconnections = (EOFError, ConnectionError, httpx.RequestError, *([aiohttp.ClientError] if aiohttp else []))
    while error is not None:
        status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int) and status:
            return status >= 500 or status in (408, 429)
        if isinstance(error, TimeoutError | httpx.TimeoutException) or (
            not opening and isinstance(error, disconnections)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_refused(address: str) -> bool:
    """Whether a server says for good that it has no such file for us."""
    from huggingface_hub.utils import httpx

    try:
        status = httpx.head(address, follow_redirects=True, timeout=SILENCE_SECONDS).status_code
    except httpx.RequestError:
        return False
    return 400 <= status < 500 and status not in (408, 429)


def reason(error: BaseException) -> str:
    if isinstance(error, ConnectionError) and error.__cause__ is not None:
        error = error.__cause__  # what `datasets` only calls "Server Disconnected"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def reading_failed(source: Source, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import httpx

    where = f"--dataset {source.name}" if source.name == source.path else f"--dataset {source.name} ({source.path})"
    at = f" at revision {source.revision}" if source.revision else ""
    if not source.is_on_the_hub:
        files = " ".join(source.data_files) or "them"
        return f"cannot read --dataset {source.name} as {source.name} files ({reason(error)}): check {files}"
    if isinstance(error, DatasetNotFoundError | RepositoryNotFoundError | RevisionNotFoundError):
        return (
            f"{where}{at} does not exist on the Hub, or this account may not read it: check the name and the "
            "revision, or log in with `hf auth login`"
        )
    if isinstance(error, ConnectionError | httpx.RequestError):
        return (
            f"cannot reach the Hub for {where}{at}: check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or prepare "
            "local files with --dataset text, json or parquet, or --dataset stdlib"
        )
    if is_script_refusal(error):
        return (
            f"{where}{at} runs code of its own, which is refused: download its text and prepare it with --dataset "
            "text, json or parquet"
        )
    return f"cannot read {where}{at} ({reason(error)}): check --revision, --subset and --data_files"


def read_documents(
    source: Source, dataset: "IterableDataset", start: Position = BEGINNING, row: int = 0
) -> Iterator[Documents]:
    """Documents behind `start`, in arrays of bounded size; a null is an empty document, a blank JSON line is none."""
    attempts = Attempts(source)
    while True:
        try:
            for documents in _read(source, dataset, start):
                attempts.succeeded()
                yield documents
                start, row = documents.behind, row + len(documents.texts)
            return
        except Exception as error:
            attempts.failed(error, row=row)


def _read(source: Source, dataset: "IterableDataset", start: Position) -> Iterator[Documents]:
    state, skip = start
    if state is not None:
        dataset.load_state_dict(state)
    pieces: list[pa.LargeStringArray] = []
    documents = size = 0
    # Whole files may be large, so of these one at a time is held.
    for table in dataset.iter(batch_size=1 if source.options is WHOLE_DOCUMENTS else READ_ROWS):
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
                yield Documents(pa.concat_arrays(pieces), Position(state, int(rows[end - 1]) + 1))
                pieces, documents, size = [], 0, 0
            first = end
        state, skip = dataset.state_dict(), 0
    if pieces:
        yield Documents(pa.concat_arrays(pieces), Position(state))


def texts_of(source: Source, table: pa.Table) -> tuple[pa.LargeStringArray, np.ndarray]:
    """The documents of a table, and the number of each one's row."""
    if source.options is LINES:
        lines = decoded(table.column("text")).to_pylist()
        parsed = pa.array([parse_line(source, line) for line in lines], pa.large_string())
        return parsed.drop_null(), np.flatnonzero(parsed.is_valid())
    name = source.text_column
    if name not in table.column_names:
        raise UserError(
            f"--dataset {source.name} has no column {name}: choose one with --text_column from "
            f"{', '.join(table.column_names)}"
        )
    column = table.column(name)
    kind = column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise UserError(
            f"column {name} of --dataset {source.name} holds {kind}, not text: choose another with --text_column from "
            f"{', '.join(table.column_names)}"
        )
    return decoded(column), np.arange(len(column))


def decoded(column: pa.ChunkedArray) -> pa.LargeStringArray:
    """The strings of a column; nulls become empty, and bytes that are not UTF-8 U+FFFD."""
    texts = pc.fill_null(column.cast(pa.large_string()).combine_chunks(), "")
    try:
        texts.validate(full=True)  # Arrow does not check by itself what a file calls UTF-8
    except pa.ArrowInvalid:
        contents = texts.cast(pa.large_binary()).to_pylist()
        texts = pa.array([content.decode("utf-8", "replace") for content in contents], pa.large_string())
    return texts


def parse_line(source: Source, line: str | None) -> str | None:
    """The text of a JSON line; None of a blank one. Lone surrogates become U+FFFD, as in tiktoken."""
    if not line or line.isspace():
        return None
    where = f"the line that begins {line.rstrip()[:60]!r} in {' '.join(source.data_files)}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"cannot read --dataset json: {where} is no JSON ({error}); write one object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read --dataset json: {where} is no JSON object; write one a line")
    if source.text_column not in value:
        raise UserError(
            f"--dataset json has no column {source.text_column} in {where}: choose one with --text_column from "
            f"{', '.join(value)}"
        )
    text = value[source.text_column]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"column {source.text_column} of --dataset json holds {type(text).__name__}, not text: choose another "
            f"with --text_column from {', '.join(value)}"
        )
    text = text or ""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def known_rows(source: Source, dataset: "IterableDataset") -> int | None:
    """How many documents there are, where that can be known without reading them all."""
    if source.is_local:
        if source.path == "parquet":
            import pyarrow.parquet as parquet

            return sum(parquet.read_metadata(path).num_rows for path in source.files)
        return None if source.options is LINES else len(source.files)
    if source.data_files:
        return None
    splits = dataset.info.splits or {}
    stated = splits["train"].num_examples if "train" in splits else None
    return stated or (OPENWEBTEXT_ROWS if source.path == OPENWEBTEXT_ID else None)


def estimated_rows(source: Source, sample: pa.LargeStringArray) -> int | None:
    """About how many documents local JSON lines have, from their files' sizes; None of what is compressed."""
    if source.options is not LINES or not all(path.endswith(UNCOMPRESSED) for path in source.files):
        return None
    lines = [json.dumps({source.text_column: text}, ensure_ascii=False) for text in sample.to_pylist()]
    read = sum(len(line.encode()) + 1 for line in lines)
    return sum(Path(path).stat().st_size for path in source.files) * len(sample) // read or None


def count_rows(source: Source, dataset: "IterableDataset") -> int | None:
    """How many documents there are, if need be by reading local files to their end; None of others that do not say."""
    rows = known_rows(source, dataset)
    if rows is None and source.is_local:
        dataset, _ = load_documents(source)  # another one, for a dataset knows one position only
        with tqdm(unit=" documents", unit_scale=True, desc="counting", leave=False) as progress:
            for documents in read_documents(source, dataset):
                progress.update(len(documents.texts))
            rows = progress.n
    return rows
