"""`--verify` names every fault of a prepared folder in a sentence."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.preparations import prepare, preparing, refused, write_lines


def prepare_small(folder: Path, *words: str) -> Path:
    write_lines(folder / "a.jsonl", [f"document {i} of many " * (i % 9) for i in range(400)])
    source = ["--dataset=json", "--data_files=a.jsonl", "--val_fraction=0.2", "--out_dir=out"]
    prepare(*source, *words, cwd=folder)
    return folder / "out"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_small(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(good, tmp_path / "data"))


def verify(folder: Path) -> str:
    return refused("--verify", folder, cwd=folder.parent)


def rewrite(sidecar: Path, **values: Any) -> None:
    sidecar.write_text(json.dumps({**json.loads(sidecar.read_text()), **values}))


def rewrite_ids(path: Path, ids: np.ndarray) -> None:
    """With a sidecar that has the right length and digest, so that another fault is found."""
    ids.astype("<u2").tofile(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    rewrite(path.with_suffix(".json"), tokens=len(ids), sha256=digest)


def ids_of(path: Path) -> np.ndarray:
    return np.fromfile(path, dtype="<u2")


@pytest.mark.parametrize("words", [[], ["--split=nanogpt"], ["--split=nanogpt", "--order=nanogpt"]], ids=str)
def test_good_files(tmp_path: Path, words: list[str]) -> None:
    out = prepare_small(tmp_path, *words)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    done = prepare("--verify", out, cwd=tmp_path)
    for name in ("train", "val"):
        sidecar = json.loads((out / f"{name}.json").read_text())
        printed = done.stdout.replace(",", "")
        assert name in printed
        assert str(sidecar["tokens"]) in printed
        assert str(sidecar["documents"]) in printed
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "train.bin").read_bytes())
    content[1001] ^= 1
    (folder / "train.bin").write_bytes(content)


def cut(folder: Path) -> None:
    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[: len(content) // 2])


def cut_within_an_id(folder: Path) -> None:
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-1])


def append_an_id(folder: Path) -> None:
    with (folder / "val.bin").open("ab") as stream:
        stream.write(b"\x01\x00")


def put_an_id_out_of_range(folder: Path) -> None:
    ids = ids_of(folder / "train.bin")
    ids[7] = 60_000
    rewrite_ids(folder / "train.bin", ids)


def say_a_wrong_greatest_id(folder: Path) -> None:
    rewrite(folder / "train.json", max_token_id=50_255)


def drop_an_end_of_text(folder: Path) -> None:
    ids = ids_of(folder / "train.bin")
    ids[np.flatnonzero(ids == 50_256)[3]] = 11
    rewrite_ids(folder / "train.bin", ids)


def say_a_wrong_number_of_documents(folder: Path) -> None:
    rewrite(folder / "val.json", documents=json.loads((folder / "val.json").read_text())["documents"] + 1)


def say_a_wrong_number_of_rows(folder: Path) -> None:
    for name in ("train", "val"):
        rewrite(folder / f"{name}.json", rows=399)


def lose_a_sidecar(folder: Path) -> None:
    (folder / "val.json").unlink()


def lose_a_file(folder: Path) -> None:
    (folder / "train.bin").unlink()


def break_a_sidecar(folder: Path) -> None:
    (folder / "train.json").write_text("{")


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (flip_a_bit, ["train.bin", "SHA-256"]),
        (cut, ["train.bin", "tokens"]),
        (cut_within_an_id, ["val.bin", "bytes"]),
        (append_an_id, ["val.bin", "tokens"]),
        (put_an_id_out_of_range, ["train.bin", "60000"]),
        (say_a_wrong_greatest_id, ["train", "50255"]),
        (drop_an_end_of_text, ["train.bin", "<|endoftext|>"]),
        (say_a_wrong_number_of_documents, ["val", "documents"]),
        (say_a_wrong_number_of_rows, ["399", "400"]),
        (lose_a_sidecar, ["val.json"]),
        (lose_a_file, ["train.bin"]),
        (break_a_sidecar, ["train.json"]),
    ],
)
def test_each_fault_is_named(folder: Path, harm: Callable[[Path], None], named: list[str]) -> None:
    harm(folder)
    said = verify(folder).replace(",", "")
    for word in named:
        assert word in said


def test_several_faults_are_several_sentences(folder: Path) -> None:
    flip_a_bit(folder)
    append_an_id(folder)
    done = prepare("--verify", folder, cwd=folder.parent, check=False)
    assert done.returncode == 2
    assert "train.bin" in done.stderr
    assert "val.bin" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("other", ["--seed=1", "--max_documents=300", "--split=nanogpt"])
def test_a_validation_file_of_another_preparation(folder: Path, tmp_path: Path, other: str) -> None:
    another = prepare_small(tmp_path, other)
    for name in ("val.bin", "val.json"):
        shutil.copy(another / name, folder / name)
    said = verify(folder)
    assert "preparation" in said
    assert "train" in said
    assert "val" in said


def test_no_such_folder_and_an_unfinished_one(tmp_path: Path) -> None:
    assert "nowhere" in refused("--verify", "nowhere", cwd=tmp_path)
    write_lines(tmp_path / "a.jsonl", ["text " * 100] * 20_000)
    words = ["--dataset=json", "--data_files=a.jsonl", "--val_fraction=0.2", "--seed=0", "--out_dir=out"]
    with preparing(*words, "--split=nanogpt", cwd=tmp_path) as process:
        while not (tmp_path / "out" / ".preparing" / "journal.json").exists():
            assert process.poll() is None
        process.kill()
        process.wait()
    said = refused("--verify", tmp_path / "out", cwd=tmp_path)
    assert "train.bin" in said or "not finished" in said or "under way" in said


def test_bare_files_of_nanogpt_have_nothing_to_be_held_against(folder: Path) -> None:
    for name in ("train", "val"):
        (folder / f"{name}.json").unlink()
    said = verify(folder)
    assert "train.json" in said
