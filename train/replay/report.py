"""What a replayed step has shown, in sentences."""

from collections.abc import Iterator

import torch

from train.checkpoints.loading import load_tokenizer
from train.replay.rebuild import MicroBatch, Replay
from train.replay.search import Found, ValueSearch

BEFORE, AFTER = 48, 16  # tokens of the text that are shown around a position


def report(replay: Replay, search: ValueSearch) -> Iterator[str]:
    if search.first is not None:
        yield f"the first value that is not finite: {search.first}"
        yield from place(replay, search.first)
        yield "the largest values before it:"
    else:
        yield "every value is finite; the largest:"
    for found in search.largest:
        yield f"  {found}"
    if search.first is None:
        losses = torch.stack(replay.engine.losses)
        highest = int(losses.argmax())
        micro_batch = replay.micro_batches(replay.step)[highest]
        yield f"the highest loss of a micro-batch: {losses[highest]:.6g}, {name_of(micro_batch)}"
        for row in range(len(micro_batch.offsets)):
            yield from text_of(replay, micro_batch, row, None)


def place(replay: Replay, found: Found) -> Iterator[str]:
    """The micro-batch of a value, and its text, if the value belongs to a sequence."""
    micro_batch = replay.micro_batches(replay.step)[found.micro_batch]
    yield name_of(micro_batch)
    row, position = sequence_of(found, *micro_batch.tensors["input_ids"].shape)
    rows = range(len(micro_batch.offsets)) if row is None else [row]
    for each in rows:
        yield from text_of(replay, micro_batch, each, position)


def name_of(micro_batch: MicroBatch) -> str:
    return f"rank {micro_batch.rank}, micro-batch {micro_batch.number + 1}"


def sequence_of(found: Found, sequences: int, length: int) -> tuple[int | None, int | None]:
    """(sequence, position in it) of a value, by the shape of the output; None where the shape does not tell."""
    shape, index = found.shape, found.index
    if shape[:1] == (sequences * length,):
        return divmod(index[0], length)
    if shape[:1] != (sequences,):
        return None, None
    if shape[1:2] == (length,):
        return index[0], index[1]
    return index[0], index[2] if len(shape) == 4 and shape[2] == length else None  # (sequences, heads, length, ...)


def text_of(replay: Replay, micro_batch: MicroBatch, row: int, position: int | None) -> Iterator[str]:
    """A sequence, or the part of it around a position, with where it is in the token file."""
    offset, ids = micro_batch.offsets[row], micro_batch.tensors["input_ids"][row].tolist()
    where = f"sequence {row + 1}: tokens {offset:,} to {offset + len(ids) - 1:,} of {replay.data.tokens.path}"
    yield where if position is None else f"{where}, at token {offset + position:,}"
    start = 0 if position is None else max(0, position - BEFORE)
    end = min(len(ids), BEFORE + AFTER if position is None else position + AFTER)
    tokenizer = load_tokenizer(replay.checkpoint.folder, replay.engine.module.config)
    shown = ids[start:end]
    yield f"  {str(shown) if tokenizer is None else repr(tokenizer.decode(shown))}"
