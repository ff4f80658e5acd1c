import csv
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.conftest import ROOT
from train.data.token_file import TokenWriter, open_tokens
from train.data.tokenizer import END_OF_TEXT, RANKS_SHA256, VOCABULARY_SIZE, gpt2_encoding
from train.preprocess_data import streams
from train.preprocess_data.__main__ import main
from train.preprocess_data.sources import stdlib_modules
from train.preprocess_data.splits import hash_rule, nanogpt_rule
from train.utils.errors import UserError

WORDS = [
    "the",
    "GPT-2",
    "don't",
    "café",
    "日本語",
    "👍",
    "1234",
    "\n",
    "\n\n\n",
    "\t",
    "\x00",
    "<|endoftext|>",
    "f(x):",
]


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`datasets` leaves lock files in its cache: they go to a temporary folder, here and in child processes."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return cache


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 80))) for _ in range(300)]
    documents[5] = documents[150] = ""
    documents[7] = "\x00\x00"
    return documents


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    content = "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    pyarrow.parquet.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), path, row_group_size=64)
    return path


def write_csv(path: Path, texts: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("id", "text"), *enumerate(texts)])
    return path


def read(folder: Path, name: str) -> tuple[list[int], dict[str, Any]]:
    """A file's ids as nanoGPT reads them, and the sidecar."""
    ids = np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r").tolist()
    return ids, json.loads((folder / f"{name}.json").read_text())


def reference(texts: list[str], validation: Collection[int]) -> tuple[list[int], list[int]]:
    """Training ids in the texts' order and validation ids in the rows' order, the plain way."""

    def ids(rows: Iterable[int]) -> list[int]:
        return [i for row in rows for i in [*gpt2_encoding().encode_ordinary(texts[row]), END_OF_TEXT]]

    return ids(row for row in range(len(texts)) if row not in validation), ids(validation)


def hash_validation(texts: list[str], fraction: float, seed: int = 2357) -> list[int]:
    key = seed.to_bytes(8, "little")
    digests = [hashlib.blake2b(text.encode(), digest_size=8, key=key).digest() for text in texts]
    return [row for row, digest in enumerate(digests) if int.from_bytes(digest, "little") / 2**64 < fraction]


def assert_prepared(folder: Path, texts: list[str], validation: list[int]) -> None:
    expected = reference(texts, validation)
    for name, ids, rows in zip(
        ("train", "val"), expected, (set(range(len(texts))) - set(validation), validation), strict=True
    ):
        written, sidecar = read(folder, name)
        assert written == ids
        assert (sidecar["tokens"], sidecar["documents"]) == (len(ids), len(rows))
        assert sidecar["max_token_id"] == max(ids)
        assert sidecar["text_bytes"] == sum(len(texts[row].encode()) for row in rows)
        assert sidecar["rows"] == len(texts)
        assert sidecar["empty_documents"] == sum(not texts[row] for row in rows)
        assert sidecar["sha256"] == hashlib.sha256((folder / f"{name}.bin").read_bytes()).hexdigest()
        opened = open_tokens(folder / f"{name}.bin", VOCABULARY_SIZE).sidecar
        assert opened is not None
        assert opened.to_json() == sidecar
    assert {path.name for path in folder.iterdir()} == {"train.bin", "train.json", "val.bin", "val.json"}


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    root = ROOT
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "train.preprocess_data", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv"])
def test_files_of_rows(tmp_path: Path, texts: list[str], kind: str) -> None:
    write = {"parquet": write_parquet, "csv": write_csv}.get(kind, write_jsonl)
    for i in range(3):  # three files, read in the order of their names
        write(tmp_path / f"part{i}.{kind}", texts[100 * i : 100 * (i + 1)])
    dataset = kind.split(".")[0].removesuffix("l")
    files = f"--dataset {dataset} --data_files {tmp_path}/part*.{kind}"
    main(f"{files} --out_dir {tmp_path}/out --val_fraction 0.1 --num_proc 2".split())
    assert_prepared(tmp_path / "out", texts, hash_validation(texts, 0.1))


def test_text_files_one_document_each(tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "books" / ".hidden").mkdir(parents=True)
    documents = [*texts[:20], "", "café [*?]"]
    for i, text in enumerate(documents):
        (tmp_path / "books" / f"{i:02d} [a]*.txt").write_bytes(text.encode())
    (tmp_path / "books" / "latin.txt").write_bytes(b"caf\xe9\r\nau lait")
    documents.append("caf\ufffd\nau lait")  # not UTF-8, and its line end is Python's
    out = tmp_path / "out"
    pattern = f"{tmp_path}/**/*.txt"
    main(["--dataset", "text", "--data_files", pattern, pattern, "--val_fraction", "0.3", "--out_dir", str(out)])
    assert_prepared(out, documents, hash_validation(documents, 0.3))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert printed[0].startswith("documents: 23 (")
    assert printed[0].endswith("2 empty, 1 with U+FFFD)")
    assert printed[3] == f"files: {out / 'train.bin'} and {out / 'val.bin'}, each with its .json"


def test_sidecar_says_where_it_came_from(tmp_path: Path, texts: list[str]) -> None:
    pattern = str(write_jsonl(tmp_path / "a.jsonl", texts, column="content"))
    arguments = ["--dataset", "json", "--data_files", pattern, "--text_column", "content", "--out_dir", str(tmp_path)]
    main([*arguments, "--val_fraction", "0.25", "--seed", "1", "--split", "nanogpt", "--max_documents", "40"])
    sidecar = read(tmp_path, "val")[1]
    assert sidecar["documents"] == 10
    assert (sidecar["tokenizer"], sidecar["tokenizer_sha256"], sidecar["dtype"]) == ("gpt2", RANKS_SHA256, "uint16")
    assert (sidecar["split"], sidecar["val_fraction"], sidecar["seed"]) == ("nanogpt", 0.25, 1)
    assert (sidecar["num_rows"], sidecar["max_documents"]) == (40, 40)
    assert sidecar["source"] == {
        "dataset": "json",
        "hub_id": None,
        "subset": None,
        "revision": None,
        "data_files": [pattern],
        "files": 1,
        "text_column": "content",
        "python": None,
    }


def test_the_standard_library_is_the_default(tmp_path: Path) -> None:
    result = run("--max_documents", "12", "--val_fraction", "0.3", cwd=tmp_path)
    assert (result.returncode, result.stdout.count("\n")) == (0, 4), result.stderr
    assert "Traceback" not in result.stderr
    documents = [Path(path).read_text("utf-8", errors="replace") for path in stdlib_modules()[:12]]
    assert_prepared(tmp_path / "data", documents, hash_validation(documents, 0.3))
    source = read(tmp_path / "data", "train")[1]["source"]
    assert (source["dataset"], source["python"]) == ("stdlib", sys.version.split()[0])


@pytest.mark.parametrize(("rows", "fraction", "seed"), [(7, 0.3, 2357), (1000, 0.0005, 2357), (300, 0.1, 1)])
def test_nanogpt_rule_is_train_test_split(rows: int, fraction: float, seed: int) -> None:
    split = datasets.Dataset.from_dict({"row": range(rows)}).train_test_split(fraction, seed=seed, shuffle=True)
    rule = nanogpt_rule(fraction, seed, rows)
    assert np.flatnonzero(rule(0, pa.array([""] * rows, pa.large_string()))).tolist() == sorted(split["test"]["row"])


def test_nanogpt_split_of_files(tmp_path: Path, texts: list[str]) -> None:
    files = f"--dataset parquet --data_files {write_parquet(tmp_path / 'a.parquet', texts)}"
    main(f"{files} --out_dir {tmp_path}/out --split nanogpt --val_fraction 0.05".split())
    rows = datasets.Dataset.from_dict({"row": range(len(texts))})
    test = rows.train_test_split(test_size=0.05, seed=2357, shuffle=True)["test"]["row"]
    assert_prepared(tmp_path / "out", texts, list(test))  # in nanoGPT's order


def test_hash_split_does_not_depend_on_order(tmp_path: Path, texts: list[str]) -> None:
    validation = []
    shuffled = random.Random(1).sample(texts, len(texts))
    for name, documents in (("a", texts), ("b", shuffled), ("c", shuffled[:200])):
        files = str(write_jsonl(tmp_path / f"{name}.jsonl", documents))
        main(["--dataset", "json", "--data_files", files, "--out_dir", str(tmp_path / name), "--val_fraction", "0.1"])
        text = gpt2_encoding().decode(read(tmp_path / name, "val")[0])
        validation.append(sorted(text.split("<|endoftext|>")))
    assert validation[0] == validation[1]
    assert set(validation[2]) <= set(validation[0])


def test_hash_rule_is_fair_and_seeded() -> None:
    texts = pa.array(map(str, range(20_000)), pa.large_string())
    chosen = [set(np.flatnonzero(hash_rule(0.1, seed)(0, texts)).tolist()) for seed in (0, 1)]
    for part in chosen:
        assert abs(len(part) - 2000) < 200  # more than four standard deviations of √(20000 · 0.1 · 0.9) = 42
    assert abs(len(chosen[0] & chosen[1]) - 200) < 60


def test_surrogates_and_any_batching_give_tiktokens_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = ["a\ud800b", "\udfff", "", "x" * 50, "yes", "no"] * 5
    monkeypatch.setattr(streams, "BATCH_DOCUMENTS", 7)
    files = f"--dataset json --data_files {write_jsonl(tmp_path / 'a.jsonl', documents)}"
    main(f"{files} --out_dir {tmp_path}/out --val_fraction 0.5 --split nanogpt --num_proc 2".split())
    ids = [*read(tmp_path / "out", "train")[0], *read(tmp_path / "out", "val")[0]]
    assert sorted(ids) == sorted(reference(documents, [])[0])


def test_null_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    files = f"--dataset json --data_files {tmp_path}/a.jsonl"
    main(f"{files} --out_dir {tmp_path} --val_fraction 0.5 --split nanogpt".split())
    assert sum(read(tmp_path, name)[1]["empty_documents"] for name in ("train", "val")) == 2


def test_overwrite(tmp_path: Path, texts: list[str]) -> None:
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in (("a", texts), ("b", texts[:50]))]
    out = tmp_path / "out"
    options = ["--dataset", "json", "--out_dir", str(out), "--val_fraction", "0.2"]
    main([*options, "--data_files", files[0]])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"train\.bin and .*val\.bin exist already: give --overwrite"):
        main([*options, "--data_files", files[1]])
    # A preparation that fails keeps what was there.
    with pytest.raises(UserError, match="no document for validation"):
        main([*options, "--data_files", files[1], "--overwrite", "--max_documents", "1"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    main([*options, "--data_files", files[1], "--overwrite"])
    assert_prepared(out, texts[:50], hash_validation(texts[:50], 0.2))


def test_a_full_disk_keeps_the_older_pair(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    files = f"--dataset json --data_files {write_jsonl(tmp_path / 'a.jsonl', texts)} --val_fraction 0.2"
    main(f"{files} --out_dir {out}".split())
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(self: TokenWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TokenWriter, "sync", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        main(f"{files} --out_dir {out} --seed 1 --overwrite".split())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_half_a_pair_is_completed_by_the_same_command(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_replace = Path.replace
    out = tmp_path / "out"

    def full_disk(self: Path, target: Path) -> Path:
        if target == out / "val.bin":
            raise OSError(28, "No space left on device")
        return real_replace(self, target)

    files = write_jsonl(tmp_path / "a.jsonl", texts)
    command = f"--dataset json --data_files {files} --out_dir {out} --val_fraction 0.2".split()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(
            UserError, match=r"cannot write to --out_dir .*: No space left on device; the same command"
        ):
            main(command)
    assert not (out / "val.bin").exists()
    main(command)
    assert_prepared(out, texts, hash_validation(texts, 0.2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--val_fraction 0", "--val_fraction: 0 must be above 0 and below 1"),
        ("--val_fraction 1", "--val_fraction: 1 must be above 0 and below 1"),
        ("--val_fraction nan", "--val_fraction: 'nan' is not a number"),
        ("--max_documents 0", "--max_documents: 0 must be at least 1"),
        ("--num_proc 0", "--num_proc: 0 must be at least 1"),
        ("--seed -1", "--seed: -1 must be at least 0"),
        ("--num_rows 5", "--num_rows 5 is for --split nanogpt"),
        (
            "--dataset wikitext",
            "--dataset wikitext is neither openwebtext, fineweb-edu, stdlib, text, json, parquet, csv nor.*owner/name",
        ),
        ("--dataset a/b/c", "--dataset a/b/c is neither"),
        ("--dataset text", "--dataset text reads files: name them with --data_files"),
        ("--dataset text --data_files nowhere/*.txt", r"--data_files nowhere/\*\.txt matches no file"),
        ("--dataset text --data_files .", r"--data_files \. matches no file: give the files in it, such as \./\*"),
        ("--data_files x.txt", "--data_files is not for --dataset stdlib"),
        ("--dataset json --data_files a.jsonl --revision v1", "--revision v1 is for datasets on the Hub"),
        (
            "--dataset json --data_files a.jsonl --text_column body",
            "no column body in the line.*: choose one.* from text, n",
        ),
        ("--dataset json --data_files a.jsonl --text_column n", "column n of --dataset json holds int, not text"),
        (
            "--dataset json --data_files bad.jsonl",
            r"line that begins '\{\"text\": \"a\"' in bad\.jsonl is not valid JSON",
        ),
        ("--dataset json --data_files empty.jsonl", r"has no documents: check empty\.jsonl"),
        ("--dataset parquet --data_files a.jsonl", "cannot read --dataset parquet as parquet files"),
        ("--dataset parquet --data_files none.parquet", r"has no documents: check none\.parquet"),
        (
            "--dataset json --data_files a.jsonl",
            r"--val_fraction 0\.0005 leaves no document for validation of 3 in all",
        ),
        ("--dataset json --data_files a.jsonl --val_fraction 0.99999", "no document for training of 3 in all: lower"),
        (
            "--dataset json --data_files a.jsonl --split nanogpt --num_rows 2",
            "more than the 2 documents",
        ),
        ("--dataset json --data_files a.jsonl --split nanogpt --num_rows 4", "ended after 3 documents.*--num_rows 3"),
        ("--dataset json --data_files a.jsonl --order nanogpt", "--order nanogpt is for --split nanogpt"),
        (
            "--dataset text --data_files http://h/b.txt",
            "--data_files http://h/b.txt matches no file: download it, or name",
        ),
        ("--dataset stdlib --subset x", "--subset x is for datasets on the Hub"),
        ("--out_dir a.jsonl", r"--out_dir a\.jsonl is a file"),
        ("--dataset openwebtext", "cannot reach the Hub for --dataset openwebtext .*Skylion007/openwebtext.*stdlib"),
        ("--dataset owner/name --revision v2", "cannot reach the Hub for --dataset owner/name at revision v2"),
    ],
)
def test_mistakes_are_sentences_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    # `datasets` read the environment when it was imported, which was before this test.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}", "n": {i}}}\n' for i in range(3)))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"\n')
    (tmp_path / "empty.jsonl").touch()
    write_parquet(tmp_path / "none.parquet", [])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=sentence):
        main(arguments.split())
    left = [path for path in tmp_path.rglob("*") if path not in before and path != tmp_path / "data"]
    assert left == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["--val_fraction", "7"],  # refused before anything is read
        ["--dataset", "json", "--data_files", "bad.jsonl"],  # while it is read
        ["--dataset", "openwebtext"],  # by the network
        ["--max_documents", "1"],  # when all is written
    ],
)
def test_exit_code_and_no_traceback(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"\n')
    result = run(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "data").glob("*"))


def test_help_teaches() -> None:
    result = run("--help")
    assert result.returncode == 0
    for word in (
        "stdlib",
        "openwebtext",
        "--dataset text",
        "--dataset json",
        "--dataset parquet",
        "owner/name",
        "2357",
    ):
        assert word in result.stdout


def test_a_json_that_is_no_sidecar_is_not_replaced(tmp_path: Path) -> None:
    source = tmp_path / "train.json"
    source.write_text('{"text": "mine"}\n' * 30)
    with pytest.raises(UserError, match="in the way of a sidecar"):
        main(["--dataset", "json", "--data_files", str(source), "--out_dir", str(tmp_path), "--val_fraction", "0.3"])
    assert source.read_text().startswith('{"text": "mine"}')
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
