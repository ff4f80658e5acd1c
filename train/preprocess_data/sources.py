"""Where text comes from: a name on the command line → a source in the words of `datasets`."""

import glob
import platform
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.utils.errors import UserError

OPENWEBTEXT = "openwebtext"
OPENWEBTEXT_ID = "Skylion007/openwebtext"
OPENWEBTEXT_ROWS = 8_013_769  # nanoGPT's count, and so the one its split is drawn over
PARQUET_REVISION = "refs/convert/parquet"  # the Hub's own conversion of repositories that still have a script
FINEWEB_EDU = "fineweb-edu"
FINEWEB_EDU_ID = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_SUBSET = "sample-10BT"

BUILDERS = ("text", "json", "parquet")
STDLIB = "stdlib"
# Tests and a GUI, and what somebody installed.
NOT_STDLIB = frozenset({"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages"})

READ_ROWS = 256  # at once


@dataclass(frozen=True)
class Source:
    """One source in `load_dataset`'s words."""

    name: str  # as it was asked for
    path: str  # a builder (text, parquet) or a repository on the Hub
    text_column: str
    files: tuple[str, ...] = ()  # local ones
    data_files: tuple[str, ...] = ()  # as they were asked for
    subset: str | None = None
    revision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return bool(self.files)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of files on servers that are not the Hub."""
        return () if self.is_local or self.is_on_the_hub else self.data_files

    @property
    def is_on_the_hub(self) -> bool:
        return self.name not in (STDLIB, *BUILDERS)

    def description(self) -> dict[str, Any]:
        """For the sidecar: what was asked for, and what it was taken to mean."""
        return {
            "dataset": self.name,
            "hub_id": self.path if self.is_on_the_hub else None,
            "subset": self.subset,
            "revision": self.revision,
            "data_files": list(self.data_files) or None,
            "files": len(self.files) if self.is_local else None,
            "text_column": self.text_column,
            "python": platform.python_version() if self.name == STDLIB else None,
        }


def resolve_source(
    name: str, data_files: list[str], text_column: str, subset: str | None = None, revision: str | None = None
) -> Source:
    """Turn what was asked for into a source; nothing is read, and the Hub is not asked."""
    patterns = tuple(data_files)
    if name == STDLIB and patterns:
        raise UserError("--data_files is not for --dataset stdlib, which reads Python's own modules: use text")
    if name in (STDLIB, *BUILDERS):
        for flag, value in (("subset", subset), ("revision", revision)):
            if value:
                raise UserError(f"--{flag} {value} is for datasets on the Hub, and --dataset {name} is none")
    if name == STDLIB:
        return Source(name, "text", text_column, stdlib_modules(), options=WHOLE_DOCUMENTS)
    if name in BUILDERS:
        if not patterns:
            raise UserError(f"--dataset {name} reads files: name them with --data_files")
        remote = [pattern for pattern in patterns if "://" in pattern]
        if remote and len(remote) < len(patterns):
            raise UserError(f"--data_files mixes addresses ({remote[0]}) and local files: prepare them apart")
        options = {"text": WHOLE_DOCUMENTS, "json": LINES}.get(name, {})
        path = "text" if name == "json" else name
        return Source(name, path, text_column, () if remote else local_files(patterns), patterns, options=options)
    if name == OPENWEBTEXT:
        return Source(name, OPENWEBTEXT_ID, text_column, (), patterns, subset, revision)
    if name == FINEWEB_EDU:
        return Source(name, FINEWEB_EDU_ID, text_column, (), patterns, subset or FINEWEB_EDU_SUBSET, revision)
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(
            f"--dataset {name} is neither {OPENWEBTEXT}, {FINEWEB_EDU}, {STDLIB}, {', '.join(BUILDERS)} nor a "
            "dataset on the Hub, which is written owner/name"
        )
    return Source(name, name, text_column, (), patterns, subset, revision)


# Options of train/text_files.py.
WHOLE_DOCUMENTS: dict[str, Any] = {"sample_by": "document"}
# JSON lines are read as lines and parsed here, for Arrow refuses the lone surrogates that JSON can spell.
LINES: dict[str, Any] = {"sample_by": "line", "chunksize": 1 << 20}


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
