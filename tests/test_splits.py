from pathlib import Path

import numpy as np
import pytest

from train.data.tokenizer import END_OF_TEXT
from train.preprocess_data import splits
from train.preprocess_data.splits import document_ends, in_order, nanogpt_rows


def test_the_parts_are_disjoint_and_whole() -> None:
    train, val = nanogpt_rows(0.0005, 2357, 10_001)
    assert len(val) == 6  # ⌈5.0005⌉
    assert sorted([*train, *val]) == list(range(10_001))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("read_tokens", [1, 50, 1 << 22])
def test_documents_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, read_tokens: int
) -> None:
    monkeypatch.setattr(splits, "READ_TOKENS", read_tokens)
    rng = np.random.default_rng(0)
    rows = rng.choice(1000, size=40, replace=False)  # the other rows are of the other part
    documents = {row: [*rng.integers(0, 50_000, size=rng.integers(0, 9)), END_OF_TEXT] for row in rows}
    path = tmp_path / "train.bin"
    np.array([i for row in sorted(rows) for i in documents[row]], dtype=dtype).tofile(path)
    assert (
        document_ends(path, np.dtype(dtype)).tolist() == np.cumsum([len(documents[r]) for r in sorted(rows)]).tolist()
    )
    pieces = list(in_order(path, np.dtype(dtype), rows))
    assert np.concatenate([ids for ids, _ in pieces]).tolist() == [i for row in rows for i in documents[row]]
    assert sum(count for _, count in pieces) == 40
    with pytest.raises(ValueError, match="has 40 documents, and the order is of 39"):
        list(in_order(path, np.dtype(dtype), rows[1:]))
