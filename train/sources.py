"""Where text comes from: a name on the command line → batches of documents, by way of `datasets`.

Every source is streamed through `datasets.load_dataset`, local files and the standard library too, so there is one
path to test. No source runs code of its own: `datasets` refuses script datasets, and so does this.
"""

import glob
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    from datasets import IterableDataset

OPENWEBTEXT = "openwebtext"
OPENWEBTEXT_ID = "Skylion007/openwebtext"
OPENWEBTEXT_REVISION: str | None = None  # the repository's main branch
OPENWEBTEXT_ROWS = 8_013_769  # nanoGPT's count, and so the one its split is drawn over
PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own conversion of repositories that still have a script

BUILDERS = ("text", "json", "parquet")
STDLIB = "stdlib"
# Tests and a GUI, and what somebody installed.
NOT_STDLIB = frozenset({"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages"})

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 22  # 4 Mi: threads stay busy, memory stays small


@dataclass(frozen=True)
class Source:
    """One source in `load_dataset`'s words."""

    name: str  # as it was asked for
    path: str  # a builder (text, json, parquet) or a repository on the Hub
    text_column: str
    files: tuple[str, ...] = ()  # local files
    data_files: tuple[str, ...] = ()  # as they were asked for
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return bool(self.files)

    def description(self) -> dict[str, Any]:
        """For the sidecar: what was asked for, and what it was taken to mean."""
        return {
            "dataset": self.name,
            "hub_id": None if self.is_local else self.path,
            "revision": self.revision,
            "data_files": list(self.data_files) or None,
            "files": len(self.files) if self.is_local else None,
            "text_column": self.text_column,
            "python": platform.python_version() if self.name == STDLIB else None,
        }


def resolve_source(name: str, data_files: list[str], text_column: str, revision: str | None) -> Source:
    """Turn what was asked for into a source; nothing is read, and the Hub is not asked."""
    patterns = tuple(data_files)
    if name == STDLIB:
        if patterns:
            raise UserError("--data_files is not for --dataset stdlib, which reads Python's own modules: use text")
        return Source(name, "text", text_column, stdlib_modules(), options=whole_documents())
    if name in BUILDERS:
        if not patterns:
            raise UserError(f"--dataset {name} reads local files: name them with --data_files")
        if revision:
            raise UserError(f"--revision {revision} is for datasets on the Hub, and --dataset {name} is local")
        # Rows read at once: without the number a whole row group, and an error for a file that has none.
        options = {"text": whole_documents(), "json": {}, "parquet": {"batch_size": BATCH_DOCUMENTS}}[name]
        return Source(name, name, text_column, local_files(patterns), patterns, options=options)
    if name == OPENWEBTEXT:
        return Source(name, OPENWEBTEXT_ID, text_column, (), patterns, revision or OPENWEBTEXT_REVISION)
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(
            f"--dataset {name} is neither {OPENWEBTEXT}, {STDLIB}, {', '.join(BUILDERS)} nor a dataset on the Hub, "
            "which is written owner/name"
        )
    return Source(name, name, text_column, (), patterns, revision)


def whole_documents() -> dict[str, Any]:
    """Options of the text builder: one document a file; bytes that are not UTF-8 become U+FFFD, line ends \\n."""
    return {"sample_by": "document", "encoding_errors": "replace"}


def stdlib_modules() -> tuple[str, ...]:
    """Every module of the running Python's standard library, sorted, without tests and the editor."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in root.rglob("*.py") if NOT_STDLIB.isdisjoint(path.relative_to(root).parts)]
    if not modules:
        raise UserError(f"this Python has no modules as files in {root}: use --dataset text with --data_files")
    return tuple(str(path) for path in sorted(modules))


def local_files(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The files that the patterns match, sorted, each once."""
    found: set[str] = set()
    for pattern in patterns:
        # pathlib's glob takes no absolute patterns
        matches = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]  # noqa: PTH207
        if not matches:
            remedy = f"give the files in it, such as {pattern.rstrip('/')}/*" if Path(pattern).is_dir() else "check it"
            raise UserError(f"--data_files {pattern} matches no file: {remedy}")
        found.update(matches)
    return tuple(sorted(found))


def load_documents(source: Source) -> tuple["IterableDataset", Source]:
    """Open the source as a stream; the source that comes back says which revision was opened."""
    import datasets

    datasets.disable_progress_bars()  # of its downloads and file lists; ours counts documents
    with one_sentence(source):
        try:
            return open_stream(source), source
        except RuntimeError as refusal:
            if not is_script_refusal(refusal) or source.revision is not None:
                raise
            converted = replace(source, revision=PARQUET_REVISION)
            try:
                return open_stream(converted), converted
            except datasets.exceptions.DatasetNotFoundError:
                raise refusal from None


def open_stream(source: Source) -> "IterableDataset":
    from datasets import load_dataset

    # `datasets` reads names as patterns; local ones are already resolved, so what looks like a pattern is a name.
    files = [glob.escape(str(Path(path).absolute())) for path in source.files] or list(source.data_files) or None
    return load_dataset(
        source.path, data_files=files, revision=source.revision, split="train", streaming=True, **source.options
    )


def is_script_refusal(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "scripts are no longer supported" in str(error)


@contextmanager
def one_sentence(source: Source) -> Iterator[None]:
    """Turn whatever `datasets`, Arrow and the network raise while they read into a sentence with a remedy."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the set is open: every file system and format brings its own
        raise UserError(reading_failed(source, error)) from error


def reading_failed(source: Source, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    where = f"--dataset {source.name}" if source.name == source.path else f"--dataset {source.name} ({source.path})"
    at = f" at revision {source.revision}" if source.revision else ""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
    if isinstance(error, StopIteration):  # what `datasets` raises on JSON files that are all empty
        reason = "no documents in them"
    if source.is_local:
        return f"cannot read {where} as {source.path} files ({reason}): check {' '.join(source.data_files) or 'them'}"
    if isinstance(error, DatasetNotFoundError):
        return (
            f"{where}{at} does not exist on the Hub, or this account may not read it: check the name and the "
            "revision, or log in with `hf auth login`"
        )
    if isinstance(error, ConnectionError):
        return (
            f"cannot reach the Hub for {where}{at}: check the network (HF_ENDPOINT, HF_HUB_OFFLINE), or prepare "
            "local files with --dataset text, json or parquet, or --dataset stdlib"
        )
    if is_script_refusal(error):
        return (
            f"{where}{at} runs code of its own, which is refused: download its text and prepare it with --dataset "
            "text, json or parquet"
        )
    return f"cannot read {where}{at} ({reason}): check --revision and --data_files"


def document_batches(
    source: Source, dataset: "IterableDataset", max_documents: int | None = None
) -> Iterator[list[str]]:
    """Documents in the stream's order, in lists of bounded size; a null is an empty document."""
    batch: list[str] = []
    characters = 0
    for texts in read_columns(source, dataset, max_documents):
        for text in texts:
            batch.append(text or "")
            characters += len(batch[-1])
            if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def count_documents(source: Source, dataset: "IterableDataset", max_documents: int | None = None) -> int:
    return sum(len(texts) for texts in read_columns(source, dataset, max_documents))


def read_columns(source: Source, dataset: "IterableDataset", max_documents: int | None) -> Iterator[list[str | None]]:
    """The text column, a few rows at a time. Whole files may be large, so of these one at a time is held."""
    rows = 1 if source.path == "text" else BATCH_DOCUMENTS // 4
    left = max_documents
    tables = iter(dataset.with_format("arrow").iter(batch_size=rows))
    while left is None or left > 0:
        with one_sentence(source):
            table = next(tables, None)
            if table is None:
                return
            texts = text_column(source, table)[:left]
        yield texts
        if left is not None:
            left -= len(texts)


def text_column(source: Source, table: "pyarrow.Table") -> list[str | None]:
    import pyarrow.types as types

    name = source.text_column
    if name not in table.column_names:
        raise UserError(
            f"--dataset {source.name} has no column {name}: choose one with --text_column from "
            f"{', '.join(table.column_names)}"
        )
    column = table.column(name)
    kind = column.type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)):
        raise UserError(
            f"column {name} of --dataset {source.name} holds {kind}, not text: choose another with --text_column from "
            f"{', '.join(table.column_names)}"
        )
    return column.to_pylist()


def known_rows(source: Source, dataset: "IterableDataset") -> int | None:
    """How many rows a dataset on the Hub says it has; None when it says nothing or only some files were asked for."""
    if source.data_files:
        return None
    splits = dataset.info.splits or {}
    stated = splits["train"].num_examples if "train" in splits else None
    return stated or (OPENWEBTEXT_ROWS if source.path == OPENWEBTEXT_ID else None)
