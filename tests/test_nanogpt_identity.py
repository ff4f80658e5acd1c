"""nanoGPT's procedure, with `datasets`' own split, and ours, side by side on real documents: the same bytes."""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.conftest import command
from train.data.tokenizer import END_OF_TEXT
from train.preprocess_data.sources import stdlib_modules

FILES = 3


@dataclass(frozen=True)
class Corpus:
    builder: str
    files: list[Path]
    test_size: float
    seed: int
    nanogpt: Path  # the folder with what nanoGPT's procedure wrote


@pytest.fixture(scope="module")
def documents() -> list[str]:
    """The standard library's functions, classes and paragraphs, and its empty modules."""
    modules = (Path(path).read_text(encoding="utf-8", errors="replace") for path in stdlib_modules())
    pieces = [piece for text in modules for piece in re.split(r"\n\n+(?=\S| {4}\S)", text)]
    assert len(pieces) >= 20_000
    assert pieces.count("") > 1
    return pieces


def write_files(folder: Path, builder: str, documents: list[str]) -> list[Path]:
    bounds = np.linspace(0, len(documents), FILES + 1).astype(int)
    paths = []
    for index in range(FILES):
        texts = documents[bounds[index] : bounds[index + 1]]
        path = folder / f"{index}.{builder}"
        if builder == "parquet":
            pyarrow.parquet.write_table(pa.table({"text": texts, "id": range(len(texts))}), path, row_group_size=1000)
        else:
            path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
        paths.append(path)
    return paths


@pytest.fixture(
    scope="module", params=[("parquet", 0.0005, 2357), ("json", 0.02, 7)], ids=["parquet-nanogpts", "json-others"]
)
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Corpus:
    builder, test_size, seed = request.param
    folder = tmp_path_factory.mktemp(builder)
    files = write_files(folder, builder, documents)
    procedure = [sys.executable, "-m", "benchmarks.nanogpt_procedure", builder, *files, "--out_dir", folder]
    command(*procedure, "--num_proc=2", f"--test_size={test_size}", f"--seed={seed}", cwd=folder, timeout=900)
    return Corpus(builder, files, test_size, seed, folder)


def prepare(corpus: Corpus, out_dir: Path, *flags: str) -> None:
    source = ["--dataset", corpus.builder, "--data_files", *corpus.files, "--out_dir", out_dir]
    split = ["--split=nanogpt", f"--val_fraction={corpus.test_size}", f"--seed={corpus.seed}"]
    words = [sys.executable, "-m", "train.preprocess_data", *source, *split, *flags]
    command(*words, cwd=out_dir.parent, timeout=900)


def tokens_by_document(path: Path) -> Counter[bytes]:
    ids = np.fromfile(path, dtype=np.uint16)
    ends = np.flatnonzero(ids == END_OF_TEXT) + 1
    assert ends[-1] == len(ids)
    return Counter(document.tobytes() for document in np.split(ids, ends[:-1]))


def test_in_nanogpts_order_both_files_are_nanogpts(corpus: Corpus, tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "out", "--order=nanogpt")
    for name in ("train.bin", "val.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (corpus.nanogpt / name).read_bytes()


def test_in_the_sources_order_the_same_documents(corpus: Corpus, documents: list[str], tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "out")
    assert (tmp_path / "out" / "val.bin").read_bytes() == (corpus.nanogpt / "val.bin").read_bytes()
    ours, theirs = (tokens_by_document(folder / "train.bin") for folder in (tmp_path / "out", corpus.nanogpt))
    assert ours == theirs
    assert ours.total() == len(documents) - np.ceil(len(documents) * corpus.test_size)
