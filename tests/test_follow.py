"""Batches of a file that is still being prepared: their order, what is waited for and refused, and real runs."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import LOSS_TOLERANCE, ROOT, losses, python, records
from tests.jobs import Job, job, launcher
from train.preprocess_data import follow
from train.preprocess_data.follow import FollowingBatches, GrowingTokens, segment_order
from train.preprocess_data.preparation import Chunk, Preparation, locked, read_journal
from train.preprocess_data.streams import BEGINNING
from train.utils.errors import UserError

BLOCK, SEGMENT, BATCH = 4, 8, 6  # a batch is no part of a segment: some lie across a border
WAIT_SECONDS = 60


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "SEGMENT_WINDOWS", SEGMENT)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)


class Prepared:
    """A preparation by hand; token t of train.bin is 100 + t."""

    def __init__(self, preparation: Preparation) -> None:
        self.preparation = preparation
        self.tokens = 0

    def grow_to(self, windows: int, more: int = 1) -> None:
        """So many windows' tokens are whole, the token behind them, and `more` - 1 of the next window."""
        end = windows * BLOCK + more
        ids = np.arange(100 + self.tokens, 100 + end)
        train, val = (Chunk(part, 1, 0, 0, len(part)) for part in (ids, ids[:2]))
        self.preparation.append([train, val], 2, BEGINNING)
        self.preparation.commit()
        self.tokens = end

    def finish(self) -> None:
        self.preparation.finish({"train": None, "val": None})


@contextmanager
def preparing(folder: Path, order: str = "source", overwrite: bool = False) -> Iterator[Prepared]:
    request = {"dataset": "by hand", "order": order}
    with locked(folder), Preparation(folder, request, overwrite) as preparation:
        yield Prepared(preparation)


def following(folder: Path, seed: int = 1) -> FollowingBatches:
    return FollowingBatches(GrowingTokens(folder / "train.bin", 50257), BLOCK, BATCH, seed)


def finished_file(folder: Path, windows: int, more: int = 1) -> Path:
    folder.mkdir()
    with preparing(folder) as prepared:
        prepared.grow_to(windows, more)
        prepared.finish()
    return folder


def steps_of(batches: FollowingBatches, steps: int) -> list[list[int]]:
    """Of each step the windows, as the data itself tells them."""
    rows = (batches.micro_batch(step, 0, 0, 1, BATCH)["input_ids"][:, 0] for step in range(steps))
    return [((row - 100) // BLOCK).tolist() for row in rows]


def test_the_order_is_the_documented_function(tmp_path: Path) -> None:
    # Resuming relies on it: neither we nor a newer NumPy may change this order unnoticed.
    windows = 2 * SEGMENT + 5
    batches = following(finished_file(tmp_path / "data", windows), seed=7)
    sequence = [window for step in steps_of(batches, 10) for window in step]
    segments = [np.random.default_rng([7, 0, n]).permutation(size) + n * SEGMENT for n, size in enumerate([8, 8, 5])]
    later = [np.random.default_rng([7, epoch]).permutation(windows) for epoch in (1, 2)]
    assert sequence == np.concatenate([*segments, *later])[:60].tolist()
    assert sequence[:8] == [0, 6, 7, 2, 4, 5, 1, 3]
    assert segment_order(7, 3, 8).tolist() == np.random.default_rng([7, 0, 3]).permutation(8).tolist()
    assert batches.steps_per_epoch == windows / BATCH
    assert batches.epochs(7) == 7 * BATCH / windows


def test_each_window_once_an_epoch(tmp_path: Path) -> None:
    windows = 3 * SEGMENT
    batches = following(finished_file(tmp_path / "data", windows, more=BLOCK))
    for epoch in np.array(steps_of(batches, 12)).reshape(3, windows):
        assert sorted(epoch.tolist()) == list(range(windows))


def test_a_growing_file_gives_what_the_finished_one_gives(tmp_path: Path) -> None:
    windows = 2 * SEGMENT + 3
    expected = steps_of(following(finished_file(tmp_path / "whole", windows, more=3)), 8)
    (tmp_path / "data").mkdir()
    found: list[list[int]] = []
    with preparing(tmp_path / "data") as prepared:
        prepared.grow_to(SEGMENT + 2)
        batches = following(tmp_path / "data")
        assert batches.steps_per_epoch is batches.epochs(1) is None
        found += steps_of(batches, 1)
        prepared.grow_to(2 * SEGMENT)
        found += steps_of(batches, 2)[1:]
        identity = batches.identity(2)
        assert identity["tokens"] == 2 * SEGMENT * BLOCK + 1
        prepared.grow_to(windows, more=3)
        assert steps_of(batches, 2) == found, "what was given stays"
        prepared.finish()
    assert steps_of(batches, 8) == expected
    assert found == expected[:2]
    assert steps_of(following(tmp_path / "data"), 8) == expected
    assert batches.identity(2) == identity == following(tmp_path / "data").identity(2)
    assert batches.identity(8)["tokens"] == windows * BLOCK + 1
    assert batches.steps_per_epoch == windows / BATCH
    assert batches.tokens.sidecar is not None
    assert batches.tokens.sidecar["tokens"] == windows * BLOCK + 3


def test_the_identity_is_that_of_the_tokens_seen(tmp_path: Path) -> None:
    one = following(finished_file(tmp_path / "one", 3 * SEGMENT))
    longer = following(finished_file(tmp_path / "longer", 5 * SEGMENT))
    for step in (0, 1, 2, 4):  # 24 samples, three segments
        assert one.identity(step) == longer.identity(step)
    assert one.identity(0) == one.identity(1), "before the first step, that of what it will see"
    assert one.identity(1)["tokens"] == SEGMENT * BLOCK + 1
    assert one.identity(5) != longer.identity(5)
    other = tmp_path / "other"
    other.mkdir()
    with preparing(other) as prepared:
        prepared.tokens = 1  # each token is off by one
        prepared.grow_to(3 * SEGMENT, more=2)
        prepared.finish()
    assert following(other).identity(1) != one.identity(1)


def test_a_step_waits_for_its_tokens_and_no_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with preparing(tmp_path) as prepared:
        prepared.grow_to(SEGMENT)
        batches = following(tmp_path)
        found: list[int] = []
        reader = threading.Thread(target=lambda: found.extend(batches.window_indices(1).tolist()))
        reader.start()
        reader.join(0.2)
        assert reader.is_alive()
        prepared.grow_to(2 * SEGMENT, more=0)
        reader.join(0.2)
        assert reader.is_alive(), "the last window's last label is missing"
        prepared.grow_to(2 * SEGMENT)
        reader.join(WAIT_SECONDS)
    said = capsys.readouterr().err
    assert said == f"waiting for the preparation of {tmp_path}/train.bin: 33 of 65 tokens are there\n"
    orders = [segment_order(1, 0, SEGMENT), SEGMENT + segment_order(1, 1, SEGMENT)]
    assert found == np.concatenate(orders)[BATCH : 2 * BATCH].tolist()


def test_stopping_ends_a_wait(tmp_path: Path) -> None:
    with preparing(tmp_path) as prepared:
        prepared.grow_to(SEGMENT)
        batches = following(tmp_path)
        waiting = threading.Timer(0.1, batches.stop)
        waiting.start()
        with pytest.raises(RuntimeError, match="nobody waits"):
            batches.window_indices(1)
        waiting.join()


def test_a_short_file_is_trained_on_when_it_is_finished(tmp_path: Path) -> None:
    with preparing(tmp_path) as prepared:
        prepared.grow_to(3)
        begun = threading.Timer(0.2, prepared.finish)
        begun.start()
        batches = following(tmp_path)
        begun.join()
    assert batches.windows == 3
    assert sorted(steps_of(batches, 1)[0]) == [0, 0, 1, 1, 2, 2]


def test_a_bare_file_can_be_followed(tmp_path: Path) -> None:
    np.arange(100, 100 + SEGMENT * BLOCK + 1, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert sorted(steps_of(following(tmp_path), 4)[0] + steps_of(following(tmp_path), 4)[1][:2]) == list(range(8))


def test_a_killed_preparation_that_goes_on_is_followed_on(tmp_path: Path) -> None:
    with preparing(tmp_path) as prepared:
        prepared.grow_to(SEGMENT)
        batches = following(tmp_path)
        with (tmp_path / ".preparing" / "train.bin").open("ab") as file:
            file.write(b"behind the journal")  # a kill leaves it, and the next run cuts it off
    with preparing(tmp_path) as again:
        again.tokens = prepared.tokens
        again.grow_to(2 * SEGMENT)
        assert len(steps_of(batches, 2)) == 2
        again.finish()
    assert steps_of(batches, 3) == steps_of(following(tmp_path), 3)


def test_a_preparation_begun_anew_is_refused(tmp_path: Path) -> None:
    with preparing(tmp_path) as prepared:
        prepared.grow_to(SEGMENT)
        batches = following(tmp_path)
    with preparing(tmp_path, order="other", overwrite=True) as other:
        other.grow_to(2 * SEGMENT)
        with pytest.raises(UserError, match=r"train\.bin is not the one any more that was followed.*--overwrite"):
            batches.window_indices(1)
        other.finish()
    with pytest.raises(UserError, match="is not the one any more"):
        batches.window_indices(1)


def test_a_file_that_will_be_put_in_order_is_refused(tmp_path: Path) -> None:
    with preparing(tmp_path, order="nanogpt") as prepared:
        prepared.grow_to(2 * SEGMENT)
        with pytest.raises(UserError, match=r"--order nanogpt.*--order source"):
            following(tmp_path)


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with preparing(tmp_path) as prepared:
        prepared.grow_to(SEGMENT)
        with pytest.raises(UserError, match="holds token id 132, but the model's vocab_size is 132"):
            FollowingBatches(GrowingTokens(tmp_path / "train.bin", 132), BLOCK, BATCH, 1)


def test_waiting_ends_when_nothing_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "START_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"there is no .*train\.bin, and none is being prepared in .*preprocess_data"):
        following(tmp_path)
    monkeypatch.setattr(follow, "PATIENCE_SECONDS", 0.05)
    with preparing(tmp_path) as prepared:
        with pytest.raises(UserError, match="has had 0 tokens"):
            following(tmp_path)
        prepared.grow_to(SEGMENT)
        batches = following(tmp_path)
        with pytest.raises(UserError, match=r"has had 33 tokens for .* 65 are needed.*process \d+ on .*--resume"):
            batches.window_indices(1)


# Real runs: `preprocess_data`, suspended as soon as some tokens are whole, and `train --follow` beside it.


@pytest.fixture(scope="module")
def preprocess(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command, but for --out_dir, over text that takes it seconds: its first 1,024 documents are a segment."""
    file = tmp_path_factory.mktemp("text") / "documents.jsonl"
    words = Path(subprocess.__file__).read_text().split()
    starts = np.random.default_rng(0).integers(0, len(words) - 8, 200_000)
    file.write_text("".join(json.dumps({"text": " ".join(words[start : start + 8])}) + "\n" for start in starts))
    source = ["--dataset=json", f"--data_files={file}", "--val_fraction=0.02"]
    return [sys.executable, "-m", "train.preprocess_data", *source, "--num_proc=1", "--tokenizer=tiktoken"]


def suspend_at_the_first_tokens(preparation: Job, data: Path) -> None:
    preparation.until(lambda: "train" in ((read_journal(data) or {}).get("parts") or {}))
    preparation.process.suspend()
    journal = read_journal(data)
    assert journal is not None
    assert journal["phase"] == "reading"


def followed(flags: list[str], data: Path, *more: str) -> list[str]:
    """32 steps a segment: 32 sequences of 16 tokens."""
    own = [f"--train_data_path={data}/train.bin", f"--val_data_path={data}/val.bin", "--follow", "--max_steps=72"]
    own += ["--block_size=16", "--loss_chunk_size=256", "--save_interval=8", "--eval_interval=24", "--eval_steps=2"]
    return [*flags, *own, "--mixed_precision=no", "--save_total_limit=2", *more]


def until_it_waits(training: Job, run_folder: Path) -> None:
    training.until_step(32, run_folder)
    training.until(lambda: "tokens are there" in training.said())


@pytest.mark.slow
def test_training_follows_a_preparation_and_goes_on_after_a_kill(
    flags: list[str], preprocess: list[str], tmp_path: Path
) -> None:
    data, train = tmp_path / "data", [sys.executable, "-m", "train"]
    prepare = [*preprocess, f"--out_dir={data}"]
    one = ["--train_micro_batch_size_per_gpu=32"]
    words = followed(flags, data, *one, f"--checkpoint_path={tmp_path}/beside")
    with job(*prepare, cwd=tmp_path) as preparation:
        suspend_at_the_first_tokens(preparation, data)
        with job(*train, *words, cwd=tmp_path) as training:
            until_it_waits(training, tmp_path / "beside" / "baseline")
            assert "no validation until" in training.said()
            training.process.kill()
        with job(*train, *words, "--resume_from_checkpoint", cwd=tmp_path) as training:
            training.until(lambda: "tokens are there" in training.said())
            preparation.process.kill()
            preparation.process.wait()
            assert not (data / "train.bin").exists()
            python(*prepare[1:], cwd=tmp_path)  # the same command goes on
            assert training.end() == 0, training.said()
    beside = records(tmp_path / "beside" / "baseline")
    assert [line["step"] for line in beside] == list(range(1, 73))
    assert beside[0]["epoch"] is None
    assert "val_loss" not in beside[23]
    assert "val_loss" in beside[71]
    summary = json.loads((tmp_path / "beside" / "baseline" / "metrics.json").read_text())
    assert summary["data"]["val"]["sha256"] == json.loads((data / "val.json").read_text())["sha256"]

    words = followed(flags, data, *one, f"--checkpoint_path={tmp_path}/after")
    python("-m", "train", *words, cwd=tmp_path)
    after = records(tmp_path / "after" / "baseline")
    assert [line["loss"] for line in beside] == [line["loss"] for line in after]
    assert beside[71]["val_loss"] == after[71]["val_loss"]

    # A run that followed goes on with the finished file, but neither without --follow nor with other data.
    half = [f"--resume_from_checkpoint={tmp_path}/beside/baseline/step-64", f"--checkpoint_path={tmp_path}/half"]
    unfollowed = [word for word in words if word != "--follow"]
    refused = python("-m", "train", *unfollowed, *half, cwd=tmp_path, check=False)
    assert "was trained with follow True, this run has False" in refused.stderr
    shutil.copytree(data, tmp_path / "other")
    ids = np.memmap(tmp_path / "other" / "train.bin", dtype=np.uint16, mode="r+")
    ids[1000] += 1
    ids.flush()
    refused = python("-m", "train", *followed(flags, tmp_path / "other", *one), *half, cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "was trained with train_data" in refused.stderr
    python("-m", "train", *words, *half, cwd=tmp_path)
    assert losses(tmp_path / "half" / "baseline") == losses(tmp_path / "after" / "baseline")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "pipeline"])
def test_two_processes_follow_together(flags: list[str], preprocess: list[str], tmp_path: Path, kind: str) -> None:
    """One of them sees all files with a delay, so they wait at different times."""
    data = tmp_path / "data"
    (tmp_path / "late.py").write_text(LATE)
    two = ["--train_micro_batch_size_per_gpu=16", f"--checkpoint_path={tmp_path}/beside"]
    if kind == "pipeline":
        two += ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/pipeline.json", "--pipeline_stages=2"]
        two += ["--gradient_accumulation_steps=2"]
    run_folder = tmp_path / "beside" / ("optimized" if kind == "pipeline" else "baseline")
    with job(*preprocess, f"--out_dir={data}", cwd=tmp_path) as preparation:
        suspend_at_the_first_tokens(preparation, data)
        with job(*launcher("torchrun"), "late.py", *followed(flags, data, *two), cwd=tmp_path) as training:
            until_it_waits(training, run_folder)
            preparation.process.resume()
            assert preparation.end() == 0, preparation.said()
            assert training.end() == 0, training.said()
            assert training.said().count("tokens are there") == 1, "the main process speaks for all"
    one = ["--train_micro_batch_size_per_gpu=32", f"--checkpoint_path={tmp_path}/after"]
    python("-m", "train", *followed(flags, data, *one), cwd=tmp_path)
    # After 72 steps rounding has grown; a single other window would show in the third decimal.
    assert losses(run_folder) == pytest.approx(losses(tmp_path / "after" / "baseline"), abs=10 * LOSS_TOLERANCE)
    assert "val_loss" in records(run_folder)[-1]


LATE = """
import os, time
from pathlib import Path
from train.preprocess_data import follow
from train import __main__ as command
from train.utils.command import run_command

if os.environ["RANK"] == "1":
    read_now, exists_now, seen = follow.read_journal, Path.exists, {}

    def late(key, value):
        history = seen.setdefault(key, [])
        history.append((time.monotonic(), value))
        return next((old for moment, old in reversed(history) if moment < time.monotonic() - 1.5), history[0][1])

    follow.read_journal = lambda folder: late(folder, read_now(folder))
    Path.exists = lambda path, **how: (late if path.suffix == ".bin" else lambda _, now: now)(path, exists_now(path))
run_command(command.main)
"""
