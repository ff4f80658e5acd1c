import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from train.data.batches import EvalBatches, TrainBatches
from train.data.token_file import TokenFile, open_tokens
from train.utils.errors import UserError

BLOCK = 4


def token_file(folder: Path, count: int) -> TokenFile:
    """Token t of the file is 100 + t, so that each batch shows where it comes from."""
    path = folder / "train.bin"
    np.arange(100, 100 + count, dtype=np.uint16).tofile(path)
    return open_tokens(path, 50257)


def train_batches(folder: Path, windows: int, global_batch_size: int, seed: int = 1) -> TrainBatches:
    return TrainBatches(token_file(folder, windows * BLOCK + 3), BLOCK, global_batch_size, seed)


def test_every_token_once_an_epoch_in_every_epoch(tmp_path: Path) -> None:
    windows, global_batch_size, epochs = 10, 4, 6  # 10 is not a multiple of 4: batches cross the borders
    batches = train_batches(tmp_path, windows, global_batch_size)
    assert batches.blocks == windows
    steps = batches.updates(epochs)
    assert steps == 15
    labels = [batches.micro_batch(step, 0, 0, 1, global_batch_size)["shift_labels"] for step in range(steps)]
    rows = torch.cat(labels).reshape(epochs, -1)
    for row in rows:
        assert sorted(row.tolist()) == list(range(101, 101 + windows * BLOCK))
    assert len({tuple(row.tolist()) for row in rows}) == epochs


def test_labels_are_the_next_tokens(tmp_path: Path) -> None:
    batch = train_batches(tmp_path, 10, 4).micro_batch(3, 0, 0, 1, 4)
    assert batch.keys() == {"input_ids", "shift_labels"}
    for tensor in batch.values():
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((4, BLOCK), torch.int64, True)
    assert torch.equal(batch["shift_labels"], batch["input_ids"] + 1)
    assert ((batch["input_ids"][:, 0] - 100) % BLOCK == 0).all()


def test_ids_beyond_uint16_arrive(tmp_path: Path) -> None:
    path, first = tmp_path / "train.bin", 70_000
    np.arange(first, first + 41, dtype="<u4").tofile(path)
    (tmp_path / "train.json").write_text(json.dumps({"dtype": "uint32", "tokens": 41, "max_token_id": first + 40}))
    tokens = open_tokens(path, 80_000)
    rows = TrainBatches(tokens, BLOCK, 10, 1).micro_batch(0, 0, 0, 1, 10)
    assert sorted(rows["input_ids"].flatten().tolist()) == list(range(first, first + 40))
    assert torch.equal(rows["shift_labels"], rows["input_ids"] + 1)
    assert EvalBatches(tokens, BLOCK).micro_batch(9, 0, 1, 1)["shift_labels"][0, -1] == first + 40


def test_windows_anywhere_can_be_announced(tmp_path: Path) -> None:
    (np.arange(100_000) % 50_000).astype(np.uint16).tofile(tmp_path / "train.bin")  # 49 pages
    tokens = open_tokens(tmp_path / "train.bin", 50257)
    for offsets in ([], [0], [99_990, 5, 2048, 0, 99_999]):
        tokens.will_need(np.array(offsets, dtype=np.int64), 10)
    assert (tokens.read(0, 100_000) == np.arange(100_000) % 50_000).all()


def test_every_layout_sees_the_same_global_batch(tmp_path: Path) -> None:
    batches = train_batches(tmp_path, 29, 12)
    for step in (0, 2, 7):
        expected = batches.micro_batch(step, 0, 0, 1, 12)["input_ids"]
        assert torch.equal(expected[:, 0], torch.from_numpy(100 + BLOCK * batches.block_indices(step)))
        for world_size in (1, 2, 3, 4, 6, 12):
            for micro in (size for size in (1, 2, 3, 4, 6, 12) if 12 % (size * world_size) == 0):
                parts = [
                    batches.micro_batch(step, micro_step, rank, world_size, micro)["input_ids"]
                    for micro_step in range(12 // (micro * world_size))
                    for rank in range(world_size)
                ]
                assert torch.equal(torch.cat(parts), expected)


def test_a_layout_beyond_the_global_batch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exceed the global batch"):
        train_batches(tmp_path, 10, 4).micro_batch(0, micro_step=1, rank=1, world_size=2, micro_batch_size=2)


def test_random_access_equals_reading_in_order(tmp_path: Path) -> None:
    steps = 30
    in_order = [train_batches(tmp_path, 10, 4).block_indices(step).tolist() for step in range(steps)]
    batches = train_batches(tmp_path, 10, 4)
    for step in np.random.default_rng(0).permutation(steps):
        assert batches.block_indices(int(step)).tolist() == in_order[step]


def test_the_order_is_the_documented_function(tmp_path: Path) -> None:
    # Resuming relies on it: neither we nor a newer NumPy may change this order unnoticed.
    batches = train_batches(tmp_path, 10, 4, seed=7)
    orders = [np.random.default_rng([7, epoch]).permutation(10) for epoch in range(2)]
    sequence = np.concatenate(orders).tolist()
    assert [i for step in range(5) for i in batches.block_indices(step)] == sequence
    assert sequence[:10] == [8, 0, 7, 1, 3, 6, 2, 4, 5, 9]
    assert batches.block_indices(0).dtype == np.int64


def test_seeds_give_orders_of_their_own(tmp_path: Path) -> None:
    orders = {tuple(train_batches(tmp_path, 50, 50, seed).block_indices(0)) for seed in range(5)}
    assert len(orders) == 5


def test_the_given_order_cannot_be_spoiled(tmp_path: Path) -> None:
    batches = train_batches(tmp_path, 10, 10)
    before = batches.block_indices(0).copy()
    batches.block_indices(0)[:] = 0
    assert np.array_equal(batches.block_indices(0), before)


def test_a_batch_larger_than_an_epoch(tmp_path: Path) -> None:
    indices = train_batches(tmp_path, 3, 8).block_indices(0).tolist()
    assert sorted(indices[:3]) == sorted(indices[3:6]) == [0, 1, 2]
    assert len(indices) == 8


def test_updates(tmp_path: Path) -> None:
    batches = train_batches(tmp_path, 30, 3)
    assert batches.steps_per_epoch == 10.0
    assert [batches.updates(epochs) for epochs in (0.1, 0.3, 0.31, 1, 1.0, 2.5)] == [1, 3, 4, 10, 10, 25]
    assert train_batches(tmp_path, 10, 4).updates(1) == 3
    assert train_batches(tmp_path, 100, 1).updates(0.07) == 7
    assert math.ceil(0.07 * 100) == 8  # what floats would have given


def test_too_short_for_a_block(tmp_path: Path) -> None:
    assert TrainBatches(token_file(tmp_path, 9), 8, 1, 0).blocks == 1
    with pytest.raises(UserError, match=r"train\.bin has 8 tokens.*block of 8.*smaller"):
        TrainBatches(token_file(tmp_path, 8), 8, 1, 0)
    with pytest.raises(UserError, match=r"train\.bin has 1 token,"):
        EvalBatches(token_file(tmp_path, 1), 8)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
@pytest.mark.parametrize("count", [2, 3, BLOCK + 1, 5 * BLOCK + 1, 7 * BLOCK - 1])
def test_evaluation_predicts_every_token_but_the_first_once(
    tmp_path: Path, world_size: int, micro_batch_size: int, count: int
) -> None:
    tokens = token_file(tmp_path, count)
    batches = EvalBatches(tokens, BLOCK)
    steps = batches.steps(world_size, micro_batch_size)
    assert steps == math.ceil(batches.blocks / (world_size * micro_batch_size))
    labels = []
    for step in range(steps):
        for rank in range(world_size):
            batch = batches.micro_batch(step, rank, world_size, micro_batch_size)
            for tensor in batch.values():
                assert (tensor.shape, tensor.dtype) == ((micro_batch_size, BLOCK), torch.int64)
            counted = batch["shift_labels"] != -100
            assert torch.equal(batch["input_ids"][counted] + 1, batch["shift_labels"][counted])
            assert (batch["input_ids"][~counted] == int(tokens.read(len(tokens) - 1, 1)[0])).all()
            labels.extend(batch["shift_labels"][counted].tolist())
    assert labels == list(range(101, 100 + count))
