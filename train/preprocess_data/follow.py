"""Training on text that is still being prepared (`--follow`).

1. A preparation appends to OUT/.preparing/train.bin, and its journal says how many of the tokens there are whole.
   Those are mapped; when all is read, the same file gets its place at OUT/train.bin, with a sidecar.
2. Samples come from consecutive segments of `SEGMENT_WINDOWS` windows, one segment after another, each permuted in an
   order of its own that belongs to (seed, 0, segment). So a sample of the first epoch needs no token behind its
   segment, and which window it is depends on nothing but (seed, index), whether or not the file is finished: a run
   that followed has computed what a run on the finished file computes. The last segment is as long as the file leaves
   it, and later epochs are permuted as a whole; both need the finished file.
3. A process that needs tokens that are not whole yet waits for them by itself, between collectives: the others wait
   for their own, or at the next collective for this one. All see the same files, if not at the same time.
"""

import hashlib
import math
import os
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from train.data.batches import TrainBatches
from train.data.token_file import TokenFile, check_vocabulary, open_tokens
from train.preprocess_data.preparation import WORK_FOLDER, read_journal
from train.utils import processes
from train.utils.errors import UserError

SEGMENT_WINDOWS = 1024  # 1 Mi tokens in blocks of 1024; another number is another order of the data
POLL_SECONDS = 1.0
SAY_SECONDS = 60.0  # between two lines that say what is waited for
START_SECONDS = 60.0  # for a preparation to begin
PATIENCE_SECONDS = 600.0  # without a new token
DIGEST_TOKENS = 1 << 24  # hashed at once: 32 MiB


class GrowingTokens:
    """A token file in place, or what is whole of it so far.

    `file` maps the tokens that were whole when they were last asked for, its sidecar the journal's account of them;
    it is replaced when there are more. `finished`: the file is in place, and no more will come.

    Args:
        path: where the file is or will be.
        vocab_size: the model's.
    """

    def __init__(self, path: str | Path, vocab_size: int) -> None:
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.file: TokenFile | None = None
        self.finished = False
        self._stream: BinaryIO | None = None  # of the growing file, whatever becomes of its name
        self._stopped = threading.Event()
        self._said = -math.inf

    def __len__(self) -> int:
        return len(self.file) if self.file else 0

    def wait_for(self, count: int) -> None:
        """Return when the first `count` tokens are whole, or the file is finished with fewer.

        Raises:
            UserError: no token has come for a long while, or the file is not the one that was followed any more.
        """
        since = time.monotonic()
        while len(self) < count and not self.finished:
            if self._look():
                since = time.monotonic()
                continue
            journal = read_journal(self.path.parent)
            under_way = journal is not None or self._stream is not None
            if time.monotonic() - since > (PATIENCE_SECONDS if under_way else START_SECONDS):
                raise UserError(self._without_hope(count, journal) if under_way else self._nothing_there())
            if time.monotonic() - self._said > SAY_SECONDS and processes.rank() == 0:
                there = f"{len(self):,} of {count:,} tokens are there"
                tqdm.write(f"waiting for the preparation of {self.path}: {there}", file=sys.stderr)
                self._said = time.monotonic()
            if self._stopped.wait(POLL_SECONDS):
                raise RuntimeError("nobody waits for these tokens any more")

    def stop(self) -> None:
        """Let a `wait_for` in another thread fail now."""
        self._stopped.set()

    def _look(self) -> bool:
        """Take up what has become whole; whether there was something."""
        journal = read_journal(self.path.parent)
        if journal is None or (self._stream is None and self.path.exists() and journal["phase"] == "reading"):
            return self.path.exists() and self._take_finished()
        if journal["request"]["order"] == "nanogpt":
            raise UserError(
                f"--follow: {self.path} is prepared with --order nanogpt, so its tokens will lie in another order in "
                "the end: train when it is finished, or prepare with --order source"
            )
        if journal["phase"] != "reading":
            return False  # it is on the way to its place
        return self._take_whole(journal["parts"].get(self.path.stem))

    def _take_finished(self) -> bool:
        if self._stream is not None:
            self._check_same(self._stream, self.path)
            self._stream.close()
        self.file = open_tokens(self.path, self.vocab_size)
        self.finished = True
        return True

    def _take_whole(self, account: dict[str, Any] | None) -> bool:
        if account is None or not account["tokens"]:
            return False
        growing = self.path.parent / WORK_FOLDER / self.path.name
        try:
            self._stream = self._stream or growing.open("rb")
            self._check_same(self._stream, growing)
        except FileNotFoundError:
            return False  # it was on the way to its place when the journal was read
        if account["tokens"] <= len(self):
            return False
        check_vocabulary(self.path, account["max_token_id"], self.vocab_size)
        dtype = np.dtype(account["dtype"]).newbyteorder("<")
        ids = np.memmap(self._stream, dtype=dtype, mode="r", shape=(account["tokens"],))
        self.file = TokenFile(self.path, ids, account)
        return True

    def _check_same(self, stream: BinaryIO, path: Path) -> None:
        if not os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            raise UserError(
                f"--follow: {self.path} is not the one any more that was followed, its preparation was begun anew: "
                "begin this run anew too, with --overwrite"
            )

    def _nothing_there(self) -> str:
        return (
            f"--follow: there is no {self.path}, and none is being prepared in {self.path.parent}: start "
            "python -m train.preprocess_data, with this folder as --out_dir"
        )

    def _without_hope(self, count: int, journal: dict[str, Any] | None) -> str:
        owner = f" (process {journal['owner']['pid']} on {journal['owner']['host']})" if journal else ""
        return (
            f"--follow: {self.path} has had {len(self):,} tokens for {PATIENCE_SECONDS / 60:.0f} minutes, and "
            f"{count:,} are needed: see to its preparation{owner}, the same command goes on where it was; then go on "
            "with --resume_from_checkpoint"
        )


def whole_segments(samples: int) -> int:
    """Windows of the segments that the first `samples` samples lie in, were there enough for them."""
    return math.ceil(samples / SEGMENT_WINDOWS) * SEGMENT_WINDOWS


@lru_cache(maxsize=2)  # two, for a batch at the border of a segment needs both sides
def segment_order(seed: int, segment: int, windows: int) -> np.ndarray:
    """(windows,) int64: the order inside one segment of epoch 0."""
    order = np.random.default_rng([seed, 0, segment]).permutation(windows)
    order.flags.writeable = False
    return order


class FollowingBatches(TrainBatches):
    """Training data of a file that may still grow; see the module's docstring for the order.

    It is made when there are tokens for a step, or the file is finished. `tokens` are those that are mapped so far.
    """

    def __init__(
        self,
        growing: GrowingTokens,
        block_size: int,
        global_batch_size: int,
        seed: int,
        document_mask: bool = False,
    ) -> None:
        growing.wait_for(whole_segments(global_batch_size) * block_size + 1)
        assert growing.file is not None
        super().__init__(growing.file, block_size, global_batch_size, seed, document_mask)
        self.growing = growing
        self._digest = hashlib.sha256()
        self._digested = 0

    @property
    def steps_per_epoch(self) -> float | None:
        return super().steps_per_epoch if self.growing.finished else None

    def order_from(self, position: int) -> np.ndarray:
        segment, start = divmod(position, SEGMENT_WINDOWS)
        first = segment * SEGMENT_WINDOWS
        self.growing.wait_for(whole_segments(position + 1) * self.block_size + 1)
        assert self.growing.file is not None
        self.tokens = self.growing.file
        if position >= self.windows:  # so the file is finished
            return super().order_from(position)
        windows = min(SEGMENT_WINDOWS, self.windows - first)
        return first + segment_order(self.seed, segment, windows)[start:]

    def identity(self, step: int) -> dict[str, Any]:
        """Of the tokens that `step` steps, at least one, can have seen: they are the same while the file grows."""
        windows = min(whole_segments(max(step, 1) * self.global_batch_size), self.windows)
        count = windows * self.block_size + 1
        if count < self._digested:
            self._digest, self._digested = hashlib.sha256(), 0
        while self._digested < count:
            ids = self.tokens.ids[self._digested : min(self._digested + DIGEST_TOKENS, count)]
            self._digest.update(ids.tobytes())
            self._digested += len(ids)
        return {"tokens": count, "sha256": self._digest.hexdigest()}

    def stop(self) -> None:
        self.growing.stop()
