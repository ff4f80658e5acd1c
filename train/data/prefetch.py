"""Read the next step's batches, and pin them for an accelerator, while the current step runs."""

from collections.abc import Callable, Generator
from contextlib import closing

import torch

from train.data.workers import in_parallel
from train.utils.devices import thread_initializer

Batch = dict[str, torch.Tensor]


def read_ahead(read: Callable[[int], list[Batch]], steps: range, device: torch.device) -> Generator[list[Batch]]:
    """Yield `read(step)` for each of the `steps`, read in a thread one step ahead of the caller.

    For an accelerator the tensors are in pinned memory, from which copies are asynchronous. An error of `read` is
    raised at the step that it belongs to. Close the generator if it may not be exhausted: that ends the thread.
    """

    def fetch(step: int) -> list[Batch]:
        batches = read(step)
        if device.type != "cpu":
            batches = [{key: value.pin_memory() for key, value in batch.items()} for batch in batches]
        return batches

    # On device 0, where a thread starts, pinning for another device would take memory.
    with closing(in_parallel(fetch, steps, 1, ahead=1, initializer=thread_initializer(device))) as reader:
        for _, batches in reader:
            yield batches
