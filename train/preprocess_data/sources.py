"""Sources of text by their name on the command line. A new one is an entry of `FILE_KINDS` or `HUB_DATASETS`."""

import glob
import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from train.utils.errors import UserError

PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own conversion of repositories that still have a script
STDLIB = "stdlib"
# Tests, a GUI, and installed packages.
NOT_STDLIB = frozenset({"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages"})
READ_ROWS = 256  # at once


class HubDataset(NamedTuple):
    """A dataset on the Hub that has a short name."""

    hub_id: str
    subset: str | None = None
    rows: int | None = None  # where the Hub does not say
    split: str = "hash"  # the default of --split


HUB_DATASETS = {
    "openwebtext": HubDataset("Skylion007/openwebtext", rows=8_013_769, split="nanogpt"),  # as nanoGPT counted them
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", subset="sample-10BT"),
}


@dataclass(frozen=True)
class FileKind:
    """How files of one kind are read."""

    description: str
    example: str  # flags, for --help
    builder: str  # of `datasets`; "text" is train/preprocess_data/text_files.py
    options: Callable[["Source"], dict[str, Any]]  # of the builder
    read_rows: int = READ_ROWS
    parse: Callable[["Source", str], str | None] | None = None  # a line → its document; None for a blank line
    count_rows: Callable[[Sequence[str]], int] | None = None  # of files, without reading them to their end
    as_written: Callable[["Source", str], str] | None = None  # to estimate the number of rows


@dataclass(frozen=True)
class Source:
    """Where documents come from."""

    name: str  # on the command line
    text_column: str
    kind: FileKind | None = None  # of local files
    files: tuple[str, ...] = ()
    hub_id: str | None = None
    data_files: tuple[str, ...] = ()  # on the command line
    subset: str | None = None
    revision: str | None = None

    def description(self) -> dict[str, Any]:
        """For the sidecar."""
        return {
            "dataset": self.name,
            "hub_id": self.hub_id,
            "subset": self.subset,
            "revision": self.revision,
            "data_files": list(self.data_files) or None,
            "files": len(self.files) if self.kind else None,
            "text_column": self.text_column,
            "python": platform.python_version() if self.name == STDLIB else None,
        }

    def fingerprint(self) -> str | None:
        """SHA-256 that changes with the files' names, sizes and times; None for the Hub, which has commits."""
        if self.kind is None:
            return None
        stats = [(path, Path(path).stat()) for path in self.files]
        facts = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def no_column(self, columns: Sequence[str], where: str = "") -> UserError:
        return UserError(
            f"--dataset {self.name} has no column {self.text_column}{where}: choose one with --text_column from "
            f"{', '.join(columns)}"
        )

    def not_text(self, kind: object, columns: Sequence[str]) -> UserError:
        return UserError(
            f"column {self.text_column} of --dataset {self.name} holds {kind}, not text: choose another with "
            f"--text_column from {', '.join(columns)}"
        )


def parse_json_line(source: Source, line: str) -> str | None:
    """The text of a JSON line; None for a blank line. Lone surrogates become U+FFFD, as in tiktoken."""
    if not line or line.isspace():
        return None
    where = f"the line that begins {line.rstrip()[:60]!r} in {' '.join(source.data_files)}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(
            f"cannot read --dataset json: {where} is not valid JSON ({error}); write one object per line"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"cannot read --dataset json: {where} is not a JSON object; write one object per line")
    if source.text_column not in value:
        raise source.no_column(list(value), f" in {where}")
    text = value[source.text_column]
    if text is not None and not isinstance(text, str):
        raise source.not_text(type(text).__name__, list(value))
    text = text or ""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def csv_options(source: Source) -> dict[str, Any]:
    import pandas as pd
    from datasets import Features, Value

    for file in source.files:
        columns = list(pd.read_csv(file, nrows=0, encoding_errors="replace").columns)
        if source.text_column not in columns:
            raise source.no_column(columns, f" in {file}")
    # Without these features pandas would read the text "12" as a number, and with its filter "NA" as missing.
    features = Features({source.text_column: Value("string")})
    return {"usecols": [source.text_column], "features": features, "na_filter": False, "encoding_errors": "replace",
            "chunksize": 4 * READ_ROWS}  # fmt: skip


def parquet_options(source: Source) -> dict[str, Any]:
    import pyarrow.dataset

    # Otherwise Arrow keeps what it has read of a file, still compressed, until the file ends.
    return {"fragment_scan_options": pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)}


def parquet_rows(files: Sequence[str]) -> int:
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(path).num_rows for path in files)


FILE_KINDS = {
    "text": FileKind(
        description="text files, one document each",
        example="--data_files 'books/**/*.txt' --val_fraction 0.05",
        builder="text",
        options=lambda source: {"sample_by": "document"},
        read_rows=1,  # files may be large
        count_rows=len,
    ),
    "json": FileKind(
        description="JSON lines (also .gz, .zst)",
        example="--data_files 'dump/*.jsonl.gz' --text_column content",
        # Read as lines and parsed here, because Arrow refuses the lone surrogates that JSON can express.
        builder="text",
        options=lambda source: {"sample_by": "line", "chunksize": 1 << 20},
        parse=parse_json_line,
        as_written=lambda source, text: json.dumps({source.text_column: text}, ensure_ascii=False) + "\n",
    ),
    "parquet": FileKind(
        description="Parquet files",
        example="--data_files 'shards/*.parquet'",
        builder="parquet",
        options=parquet_options,
        count_rows=parquet_rows,
    ),
    "csv": FileKind(
        description="CSV files with a header (also .gz, .zst)",
        example="--data_files 'tables/*.csv' --text_column body",
        builder="csv",
        options=csv_options,
    ),
}


def file_kinds(last: str) -> str:
    """The names of the kinds of files, with `last` ("and", "or") before the last one."""
    *names, end = FILE_KINDS
    return f"{', '.join(names)} {last} {end}"


def resolve_source(
    name: str, data_files: Sequence[str], text_column: str, subset: str | None = None, revision: str | None = None
) -> Source:
    """The source with a name; no file is read, and the Hub is not asked."""
    patterns = tuple(data_files)
    if name == STDLIB or name in FILE_KINDS:
        for flag, value in (("subset", subset), ("revision", revision)):
            if value:
                raise UserError(f"--{flag} {value} is for datasets on the Hub, and --dataset {name} is not one")
    if name == STDLIB:
        if patterns:
            raise UserError("--data_files is not for --dataset stdlib, which reads Python's own modules: use text")
        return Source(name, text_column, FILE_KINDS["text"], stdlib_modules())
    if name in FILE_KINDS:
        if not patterns:
            raise UserError(f"--dataset {name} reads files: name them with --data_files")
        return Source(name, text_column, FILE_KINDS[name], local_files(patterns), data_files=patterns)
    known = HUB_DATASETS.get(name, HubDataset(name))
    if known.hub_id.count("/") != 1 or not all(known.hub_id.split("/")):
        raise UserError(
            f"--dataset {name} is neither {', '.join([*HUB_DATASETS, STDLIB, *FILE_KINDS])} nor a dataset on the Hub, "
            "which is written owner/name"
        )
    return Source(name, text_column, None, (), known.hub_id, patterns, subset or known.subset, revision)


def stdlib_modules() -> tuple[str, ...]:
    """Every module of the running Python's standard library, sorted, without tests and the editor."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = [path for path in root.rglob("*.py") if NOT_STDLIB.isdisjoint(path.relative_to(root).parts)]
    if not modules:
        raise UserError(f"this Python has no modules as files in {root}: use --dataset text with --data_files")
    return tuple(str(path) for path in sorted(modules))


def local_files(patterns: Sequence[str]) -> tuple[str, ...]:
    """The files that match the patterns, sorted, each once."""
    found: set[str] = set()
    for pattern in patterns:
        # pathlib's glob takes no absolute patterns.
        matches = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]  # noqa: PTH207
        if not matches:
            remedy = f"give the files in it, such as {pattern.rstrip('/')}/*" if Path(pattern).is_dir() else "check it"
            if "://" in pattern:
                remedy = "download it, or name a dataset on the Hub as --dataset owner/name"
            raise UserError(f"--data_files {pattern} matches no file: {remedy}")
        found.update(matches)
    return tuple(sorted(found))
