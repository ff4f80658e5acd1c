"""A preparation that is killed, disturbed or doubled comes out as one that was left alone, or not at all."""

import itertools
import json
import platform
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.preparations import (
    check_pairs,
    contents,
    fork_prepare,
    pieces_of_the_standard_library,
    prepare,
    preparing,
    refused,
    write_lines,
)
from train.utils import lock

SPLITS = {
    "hash": ["--split=hash", "--val_fraction=0.05"],
    "nanogpt": ["--split=nanogpt", "--order=nanogpt", "--val_fraction=0.05"],
}


@dataclass(frozen=True)
class Corpus:
    """JSON lines in `folder`, and what one undisturbed pass makes of them under each split."""

    folder: Path
    whole: dict[str, dict[str, Any]]
    seconds: dict[str, float]  # that the pass took

    @staticmethod
    def make(folder: Path, texts: list[str], parts: int) -> "Corpus":
        size = -(-len(texts) // parts)
        for part in range(parts):
            suffix = ".gz" if part == 1 else ""
            write_lines(folder / f"part{part}.jsonl{suffix}", texts[part * size : (part + 1) * size])
        whole, seconds = {}, {}
        for split in SPLITS:
            start = time.monotonic()
            prepare(*words(split, folder / split), cwd=folder)
            seconds[split] = time.monotonic() - start
            whole[split] = contents(folder / split)
            assert set(whole[split]) == {"train.bin", "train.json", "val.bin", "val.json"}
        return Corpus(folder, whole, seconds)


def words(split: str, out: Path | str, *more: str) -> list[str]:
    source = ["--dataset=json", "--data_files", "part*.jsonl*", "--tokenizer=tiktoken", "--num_proc=1"]
    return [*source, *SPLITS[split], f"--out_dir={out}", *more]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """11 MB, some seconds."""
    return Corpus.make(tmp_path_factory.mktemp("library"), pieces_of_the_standard_library(), parts=5)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """3,000 short documents, in three batches of rows."""
    rng = random.Random(4)
    texts = [f"{rng.random()} " * rng.randrange(12) for _ in range(3000)]
    return Corpus.make(tmp_path_factory.mktemp("small"), texts, parts=3)


def journal(out: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads((out / ".preparing" / "journal.json").read_bytes())
    except FileNotFoundError:
        return None
    return value


def until_journal(out: Path, process: subprocess.Popen[str]) -> dict[str, Any]:
    for _ in range(60_000):
        if (found := journal(out)) and found["rows"]:
            return found
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    raise AssertionError(f"no journal in {out}")


def killed(corpus: Corpus, out: Path, *more: str, split: str = "hash") -> tuple[int, dict[str, Any]]:
    """Kill a preparation once it has a journal; return its process number and the journal it left."""
    with preparing(*words(split, out, *more), cwd=corpus.folder) as process:
        until_journal(out, process)
        process.kill()
        process.wait()
    left = journal(out)
    assert left, "it was finished before it was killed"
    return process.pid, left


@pytest.mark.parametrize("kills", [3, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("split", SPLITS)
def test_killed_at_random_moments(library: Corpus, tmp_path: Path, split: str, kills: int) -> None:
    """One preparation is killed again and again; when it comes through, another begins, until all kills are spent."""
    rng = random.Random(f"{split} {kills}")
    for number in itertools.count():
        out = tmp_path / str(number)
        while kills:
            with preparing(*words(split, out), cwd=library.folder) as process:
                try:
                    process.communicate(timeout=rng.uniform(0, library.seconds[split]))
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills -= 1
        prepare(*words(split, out), cwd=library.folder)
        assert contents(out) == library.whole[split]
        if not kills:
            return


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("split", "overwrite"), [("hash", ["--overwrite"]), ("nanogpt", [])])
def test_killed_before_every_third_change_of_the_disk(
    small: Corpus, tmp_path: Path, split: str, overwrite: list[str]
) -> None:
    """And the process that goes on is killed as well, at a random change; the third finishes."""
    rng = random.Random(split)
    prepare(*words(split, tmp_path / "older", "--seed=1"), cwd=small.folder)
    for n in itertools.count(1, 3):
        folder = tmp_path / str(n)
        folder.mkdir()
        for part in small.folder.glob("part*"):
            (folder / part.name).symlink_to(part)
        if overwrite:
            shutil.copytree(tmp_path / "older", folder / "out")
        command = words(split, "out", *overwrite)
        code, said = fork_prepare(command, folder, change=n)
        assert code in (0, -signal.SIGKILL), said
        check_pairs(folder / "out") if (folder / "out").exists() else None
        if code == 0:
            assert contents(folder / "out") == small.whole[split]
            assert n > 10
            return
        code, said = fork_prepare(command, folder, change=rng.randrange(1, n + 1))
        assert code in (0, -signal.SIGKILL), f"killed before change {n}, then\n{said}"
        check_pairs(folder / "out") if (folder / "out").exists() else None
        code, said = fork_prepare(command, folder)
        assert code == 0, f"killed before change {n}, then\n{said}"
        assert contents(folder / "out") == small.whole[split], f"killed before change {n}"


def test_a_second_run_is_refused_while_the_first_lives(library: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with preparing(*words("hash", out), cwd=library.folder) as first:
        until_journal(out, first)
        first.send_signal(signal.SIGSTOP)
        for more in ([], ["--seed=1"], ["--overwrite"]):
            said = refused(*words("hash", out, *more), cwd=library.folder)
            assert str(first.pid) in said
            assert platform.node() in said
        first.send_signal(signal.SIGCONT)
        printed, _ = first.communicate()
        assert first.returncode == 0, printed
    assert contents(out) == library.whole["hash"]


def test_a_dead_run_is_explained(library: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pid, left = killed(library, out)
    assert left["owner"].startswith(f"process {pid} on {platform.node()}, started ")
    done = prepare(*words("hash", out), cwd=library.folder)
    line = next(line for line in done.stderr.splitlines() if "resuming from row" in line)
    assert f"process {pid} " in line
    assert platform.node() in line
    assert f"resuming from row {left['rows']}" in line.replace(",", "")
    assert contents(out) == library.whole["hash"]


def test_another_command_does_not_go_on(library: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(library, out)
    before = contents(out / ".preparing")
    for key, more in (
        ("seed", "--seed=1"),
        ("val_fraction", "--val_fraction=0.5"),
        ("max_documents", "--max_documents=9"),
    ):
        said = refused(*words("hash", out, more), cwd=library.folder)
        assert key in said
        assert "--overwrite" in said
    assert "split" in refused(*words("nanogpt", out), cwd=library.folder)
    assert contents(out / ".preparing") == before
    prepare(*words("nanogpt", out, "--overwrite"), cwd=library.folder)
    assert contents(out) == library.whole["nanogpt"]


@pytest.mark.parametrize("change", ["longer", "other bytes", "gone", "one more file"])
def test_a_source_that_changed_since_is_refused(small: Corpus, tmp_path: Path, change: str) -> None:
    texts = pieces_of_the_standard_library()[:3000]
    parts = [write_lines(tmp_path / f"part{i}.jsonl", texts[i::3]) for i in range(3)]
    other = Corpus(tmp_path, {}, {})
    out = tmp_path / "out"
    killed(other, out)
    before = contents(out / ".preparing")
    if change == "longer":
        with parts[1].open("a") as stream:
            stream.write('{"text": "one more"}\n')
    elif change == "other bytes":
        content = parts[2].read_bytes()
        time.sleep(0.01)  # a file system's clock may be coarse
        parts[2].write_bytes(content.replace(b"import", b"IMPORT"))
    elif change == "gone":
        parts[2].unlink()
    else:
        write_lines(tmp_path / "part3.jsonl", ["one more"])
    said = refused(*words("hash", out), cwd=tmp_path)
    assert "--overwrite" in said
    assert contents(out / ".preparing") == before


def test_tokens_after_the_journal_are_cut_off(library: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(library, out)
    for name in ("train.bin", "val.bin"):
        with (out / ".preparing" / name).open("ab") as stream:
            stream.write(b"half a batch of another life")
    prepare(*words("hash", out), cwd=library.folder)
    assert contents(out) == library.whole["hash"]


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "gone", "journal cut"])
def test_damage_to_what_is_kept_is_noticed(library: Corpus, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    killed(library, out)
    kept = out / ".preparing" / ("journal.json" if damage == "journal cut" else "train.bin")
    content = bytearray(kept.read_bytes())
    if damage == "a flipped bit":
        content[1000] ^= 1
        kept.write_bytes(content)
    elif damage == "gone":
        kept.unlink()
    else:
        kept.write_bytes(content[:100])
    said = refused(*words("hash", out), cwd=library.folder)
    assert kept.name in said
    assert "--overwrite" in said
    prepare(*words("hash", out, "--overwrite"), cwd=library.folder)
    assert contents(out) == library.whole["hash"]


def test_a_finished_folder(small: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(*words("hash", out), cwd=small.folder)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    done = prepare(*words("hash", out), cwd=small.folder)
    assert "already prepared" in done.stdout + done.stderr
    assert "exist already" in refused(*words("hash", out, "--seed=1"), cwd=small.folder)
    assert "exist already" in refused(*words("nanogpt", out), cwd=small.folder)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    prepare(*words("hash", out, "--overwrite"), cwd=small.folder)
    assert contents(out) == small.whole["hash"]
    assert all(path.stat().st_mtime_ns > before[path.name] for path in out.iterdir())
    prepare(*words("nanogpt", out, "--overwrite"), cwd=small.folder)
    assert contents(out) == small.whole["nanogpt"]


@pytest.mark.parametrize("name", ["train.bin", "train.json", "val.bin", "val.json"])
def test_a_finished_folder_that_lacks_a_file_is_not_prepared(small: Corpus, tmp_path: Path, name: str) -> None:
    out = Path(shutil.copytree(small.folder / "hash", tmp_path / "out"))
    (out / name).unlink()
    assert "exist already" in refused(*words("hash", out), cwd=small.folder)


def test_an_older_pair_stays_until_the_new_one_is_whole(library: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(*words("hash", out, "--max_documents=500"), cwd=library.folder)
    before = contents(out)
    killed(library, out, "--overwrite")
    now = contents(out)
    assert {name: now[name] for name in before} == before
    assert set(now) - set(before) <= {".preparing", lock.LOCK}
    done = prepare(*words("hash", out, "--overwrite"), cwd=library.folder, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out) == library.whole["hash"]
