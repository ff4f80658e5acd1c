"""The benchmark of preparing text: its sides run, and none that writes something else is timed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from benchmarks.tokenize import (
    NANOGPT,
    NANOGPTS_ORDER,
    ONE_BY_ONE,
    OURS,
    Variant,
    check_files,
    compare,
    make_corpus,
    text_megabytes,
)
from train.data.tokenizer import END_OF_TEXT
from train.preprocess_data.sources import stdlib_modules


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    texts = [Path(path).read_text(encoding="utf-8", errors="replace") for path in stdlib_modules()[:120]]
    for part in range(2):
        pyarrow.parquet.write_table(pa.table({"text": texts[part::2]}), folder / f"{part}.parquet")
    return folder


def test_a_corpus_has_each_document_once_in_files_of_one_size(shards: Path, tmp_path: Path) -> None:
    given = [
        text for path in sorted(shards.iterdir()) for text in pyarrow.parquet.read_table(path)["text"].to_pylist()
    ]
    corpus = make_corpus(tmp_path, shards, megabytes=1000, parts=4)
    cut = [pyarrow.parquet.read_table(path)["text"].to_pylist() for path in corpus]
    assert [text for texts in cut for text in texts] == given
    sizes = [sum(len(text.encode()) for text in texts) for texts in cut]
    assert text_megabytes(corpus) == sum(sizes) / 1e6
    assert max(sizes) - min(sizes) <= 2 * max(len(text.encode()) for text in given)
    half = make_corpus(tmp_path, shards, megabytes=sum(sizes) / 2e6, parts=1)
    assert text_megabytes(half) == pytest.approx(sum(sizes) / 2e6, abs=0.2)


def write_files(folder: Path, train: list[int], val: list[int]) -> Path:
    folder.mkdir()
    for name, ids in (("train.bin", train), ("val.bin", val)):
        np.array(ids, dtype=np.uint16).tofile(folder / name)
    return folder


def test_what_writes_something_else_is_refused(tmp_path: Path) -> None:
    end = END_OF_TEXT
    reference = write_files(tmp_path / "reference", [1, 2, end, 3, end, end], [4, end, 5, end])
    train_in_another_order = write_files(tmp_path / "train", [end, 3, end, 1, 2, end], [4, end, 5, end])
    both_in_another_order = write_files(tmp_path / "both", [end, 3, end, 1, 2, end], [5, end, 4, end])
    other_documents = write_files(tmp_path / "other", [1, end, 2, 3, end, end], [4, end, 5, end])
    ours = next(side for side in OURS if side != NANOGPTS_ORDER)
    for side in (ours, ONE_BY_ONE, NANOGPTS_ORDER):
        check_files(side, reference, reference)
        with pytest.raises(SystemExit, match=r"^train"):
            check_files(side, other_documents, reference)
    check_files(ours, train_in_another_order, reference)
    check_files(ONE_BY_ONE, both_in_another_order, reference)
    with pytest.raises(SystemExit, match=r"^train"):
        check_files(NANOGPTS_ORDER, train_in_another_order, reference)
    with pytest.raises(SystemExit, match=r"^val"):
        check_files(ours, both_in_another_order, reference)


@pytest.mark.slow
def test_every_side_is_watched_and_timed(shards: Path, tmp_path: Path) -> None:
    files = sorted(shards.iterdir())
    results = compare(
        [Variant(NANOGPT, 2), Variant(ONE_BY_ONE), Variant("ours, tiktoken", 1)], files, rounds=2, folder=tmp_path
    )
    for result in results.values():
        assert len(result.rounds) == 2
        assert all(timed.wall > 0 and timed.cpu > 0 for timed in result.rounds)
        assert result.peaks.memory >= result.peaks.anonymous > 10_000_000
    text = sum(len(text) for path in files for text in pyarrow.parquet.read_table(path)["text"].to_pylist())
    assert results[Variant(NANOGPT, 2)].peaks.disk > text, "its copy of the text counts"
    assert list(tmp_path.iterdir()) == [shards]
