import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from train import sources
from train.errors import UserError
from train.preprocess_data import main
from train.sources import OPENWEBTEXT_ID, PARQUET_REVISION, Source, resolve_source, stdlib_modules


def test_stdlib_modules() -> None:
    root = Path(os.__file__).parent
    modules = [Path(path).relative_to(root) for path in stdlib_modules()]
    assert len(modules) > 400
    assert Path("os.py") in modules
    assert Path("asyncio/tasks.py") in modules
    assert not {"test", "tests", "idlelib", "site-packages"} & {part for path in modules for part in path.parts}
    assert [str(path) for path in modules] == sorted(map(str, modules))


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))  # where it leaves lock files
    monkeypatch.setattr(sources, "BATCH_DOCUMENTS", 8)
    monkeypatch.setattr(sources, "BATCH_CHARACTERS", 100)
    documents = ["x" * 60] * 5 + ["y"] * 20 + ["z" * 500]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    source = resolve_source("json", [str(tmp_path / "a.jsonl")], "text", None)
    dataset, source = sources.load_documents(source)
    batches = list(sources.document_batches(source, dataset))
    assert [text for batch in batches for text in batch] == documents
    assert [len(batch) for batch in batches] == [2, 2, 8, 8, 6]
    assert [text for batch in sources.document_batches(source, dataset, 11) for text in batch] == documents[:11]
    assert sources.count_documents(source, dataset, 11) == 11


class FakeHub:
    """Stands in for `load_dataset`, which would need the network: remembers what was asked for."""

    def __init__(self, scripts: set[str | None], rows: int | None = None) -> None:
        self.scripts = scripts
        self.rows = rows
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, path: str, revision: str | None = None, **options: Any) -> Any:
        assert options == {"data_files": None, "split": "train", "streaming": True}
        self.asked.append((path, revision))
        if revision in self.scripts:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        stream = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(10)]}).to_iterable_dataset()
        stream.info.splits = datasets.SplitDict.from_split_dict(
            {"train": {"name": "train", "num_examples": self.rows}}
        )
        return stream


def test_openwebtext_falls_back_to_the_hubs_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(scripts={None}, rows=10)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    main(["--dataset", "openwebtext", "--out_dir", str(tmp_path), "--val_fraction", "0.2"])
    assert hub.asked == [(OPENWEBTEXT_ID, None), (OPENWEBTEXT_ID, PARQUET_REVISION)]
    sidecar = json.loads((tmp_path / "val.json").read_text())
    assert (sidecar["source"]["revision"], sidecar["source"]["hub_id"]) == (PARQUET_REVISION, OPENWEBTEXT_ID)
    assert (sidecar["split"], sidecar["num_rows"], sidecar["documents"]) == ("nanogpt", 10, 2)


def test_code_from_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = FakeHub(scripts={None, "v1", PARQUET_REVISION})
    monkeypatch.setattr(datasets, "load_dataset", hub)
    with pytest.raises(UserError, match="--dataset owner/name at revision v1 runs code of its own, which is refused"):
        main(["--dataset", "owner/name", "--revision", "v1", "--out_dir", str(tmp_path)])
    assert hub.asked == [("owner/name", "v1")]  # the wish for a revision is not reinterpreted
    with pytest.raises(UserError, match="runs code of its own"):
        main(["--dataset", "owner/name", "--out_dir", str(tmp_path)])


def test_nanogpt_split_of_the_hub_needs_a_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "load_dataset", FakeHub(scripts=set()))
    arguments = ["--dataset", "owner/name", "--split", "nanogpt", "--out_dir", str(tmp_path), "--val_fraction", "0.2"]
    with pytest.raises(UserError, match="--dataset owner/name, and the Hub does not say: give --num_rows"):
        main(arguments)
    main([*arguments, "--num_rows", "10"])
    assert json.loads((tmp_path / "val.json").read_text())["documents"] == 2


def test_rows_of_openwebtext() -> None:
    silent: Any = SimpleNamespace(info=SimpleNamespace(splits=None))
    source = resolve_source("openwebtext", [], "text", None)
    assert sources.known_rows(source, silent) == 8_013_769
    assert sources.known_rows(Source("openwebtext", OPENWEBTEXT_ID, "text", data_files=("a",)), silent) is None
