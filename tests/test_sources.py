import csv
import gzip
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from train.preprocess_data import streams
from train.preprocess_data.__main__ import main
from train.preprocess_data.sources import HUB_DATASETS, PARQUET_REVISION, Source, resolve_source, stdlib_modules
from train.preprocess_data.streams import Position
from train.utils.errors import UserError

OPENWEBTEXT_ID = HUB_DATASETS["openwebtext"].hub_id


def test_stdlib_modules() -> None:
    root = Path(os.__file__).parent
    modules = [Path(path).relative_to(root) for path in stdlib_modules()]
    assert len(modules) > 400
    assert Path("os.py") in modules
    assert Path("asyncio/tasks.py") in modules
    assert not {"test", "tests", "idlelib", "site-packages"} & {part for path in modules for part in path.parts}
    assert [str(path) for path in modules] == sorted(map(str, modules))


@pytest.fixture
def document_files(tmp_path: Path) -> dict[str, tuple[Source, list[str]]]:
    """For each kind of local files: a source of three files, one of them empty where that can be, and its texts."""
    rng = random.Random(0)
    texts = [f"{i} " + "é" * rng.randrange(60) for i in range(700)]
    parts = [texts[:300], [], texts[300:]]
    for i, part in enumerate(parts):
        pyarrow.parquet.write_table(pa.table({"n": range(len(part)), "text": part}), tmp_path / f"{i}.parquet", 29)
        lines = "".join(json.dumps({"text": text}) + rng.choice(["\n", "\r\n", "\n\n"]) for text in part)
        (tmp_path / f"{i}.jsonl").write_text(lines)
        with (tmp_path / f"{i}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("n", "text"), *enumerate(part)])
        for j, text in enumerate(part[:30]):
            (tmp_path / f"{i}-{j:03d}.txt").write_text(text)
    kinds = {"parquet": "*.parquet", "json": "*.jsonl", "csv": "*.csv", "text": "*.txt"}
    expected = {"parquet": texts, "json": texts, "csv": texts, "text": texts[:30] + texts[300:330]}
    return {
        kind: (resolve_source(kind, [str(tmp_path / pattern)], "text"), expected[kind])
        for kind, pattern in kinds.items()
    }


@pytest.mark.parametrize("kind", ["parquet", "json", "csv", "text"])
def test_a_stream_resumes_after_any_batch(
    document_files: dict[str, tuple[Source, list[str]]], kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))  # where it leaves lock files
    monkeypatch.setattr(streams, "BATCH_DOCUMENTS", 17)
    monkeypatch.setattr(streams, "BATCH_BYTES", 400)
    source, texts = document_files[kind]
    dataset, source = streams.load_documents(source)
    batches = list(streams.read_documents(source, dataset))
    assert [text for batch in batches for text in batch.texts.to_pylist()] == texts
    assert all(len(batch.texts) <= 17 for batch in batches)
    assert all(sum(len(text.encode()) for text in batch.texts[:-1].to_pylist()) < 400 for batch in batches)
    done = 0
    for batch in batches[:: 1 if kind == "text" else 5]:
        done = texts.index(batch.texts[-1].as_py()) + 1
        again, _ = streams.load_documents(source)
        position = Position(*json.loads(json.dumps(batch.next)))
        later = [text for batch in streams.read_documents(source, again, position) for text in batch.texts.to_pylist()]
        assert later == texts[done:]
    assert streams.count_rows(source, dataset) == len(texts)


class FakeHub:
    """Stands in for the Hub, which would need the network: remembers what was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scripts: set[str | None], rows: int | None = None) -> None:
        self.scripts = scripts
        self.rows = rows
        self.asked: list[tuple[str, str | None]] = []
        monkeypatch.setattr(datasets, "load_dataset_builder", self.builder)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda api, path, revision: self.commit(revision))

    @staticmethod
    def commit(revision: str | None) -> Any:
        return SimpleNamespace(sha=f"commit of {revision or 'main'}")

    def builder(self, path: str, revision: str | None = None, **options: Any) -> Any:
        assert options == {"data_files": None, "name": None}
        self.asked.append((path, revision))
        if revision in self.scripts:
            raise RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py")
        stream = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(10)]}).to_iterable_dataset()
        stream.info.splits = datasets.SplitDict.from_split_dict(
            {"train": {"name": "train", "num_examples": self.rows}}
        )
        return SimpleNamespace(config=None, as_streaming_dataset=lambda split: stream)


MAIN, CONVERTED = "commit of main", f"commit of {PARQUET_REVISION}"


def test_openwebtext_falls_back_to_the_hubs_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, scripts={MAIN}, rows=10)
    main(["--dataset", "openwebtext", "--out_dir", str(tmp_path), "--val_fraction", "0.2"])
    assert hub.asked == [(OPENWEBTEXT_ID, MAIN), (OPENWEBTEXT_ID, CONVERTED)]
    sidecar = json.loads((tmp_path / "val.json").read_text())
    assert (sidecar["source"]["revision"], sidecar["source"]["hub_id"]) == (CONVERTED, OPENWEBTEXT_ID)
    assert (sidecar["split"], sidecar["num_rows"], sidecar["documents"]) == ("nanogpt", 10, 2)


def test_code_from_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = FakeHub(monkeypatch, scripts={MAIN, "commit of v1", CONVERTED})
    with pytest.raises(UserError, match="--dataset owner/name at revision v1 runs code of its own, which is refused"):
        main(["--dataset", "owner/name", "--revision", "v1", "--out_dir", str(tmp_path)])
    assert hub.asked == [("owner/name", "commit of v1")]  # the wish for a revision is not reinterpreted
    with pytest.raises(UserError, match="runs code of its own"):
        main(["--dataset", "owner/name", "--out_dir", str(tmp_path)])


def test_nanogpt_split_of_the_hub_needs_a_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeHub(monkeypatch, scripts=set())
    arguments = ["--dataset", "owner/name", "--split", "nanogpt", "--out_dir", str(tmp_path), "--val_fraction", "0.2"]
    with pytest.raises(UserError, match="--dataset owner/name, and nothing says it: give --num_rows"):
        main(arguments)
    main([*arguments, "--num_rows", "10"])
    assert json.loads((tmp_path / "val.json").read_text())["documents"] == 2


def test_rows_of_openwebtext() -> None:
    silent: Any = SimpleNamespace(info=SimpleNamespace(splits=None))
    source = resolve_source("openwebtext", [], "text")
    assert streams.known_rows(source, silent) == 8_013_769
    assert streams.known_rows(Source("openwebtext", "text", hub_id=OPENWEBTEXT_ID, data_files=("a",)), silent) is None


def test_csv(tmp_path: Path) -> None:
    rows = [("title", "body"), ("a", 'NA "quoted", 1\nline two'), ("b", ""), ("c", "12"), ("d", "café"), ("e", "null")]
    with (tmp_path / "0.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows[:3])
    with gzip.open(tmp_path / "1.csv.gz", "wt", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[0], *rows[3:]])
    (tmp_path / "2.csv").write_bytes(b"body,n\nna\xefve,1\n")
    source = resolve_source("csv", [str(tmp_path / "*.csv*")], "body")
    dataset, source = streams.load_documents(source)
    texts = [text for batch in streams.read_documents(source, dataset) for text in batch.texts.to_pylist()]
    assert texts == [*(body for _, body in rows[1:]), "na\ufffdve"]
    with pytest.raises(UserError, match=r"--dataset csv has no column text in .*0\.csv: choose one .*title, body"):
        streams.load_documents(resolve_source("csv", [str(tmp_path / "*.csv*")], "text"))
