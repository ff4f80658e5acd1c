"""A step's data is read, and on a GPU's machine pinned, while the step before it runs."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

import torch

from train.utils.devices import thread_initializer

Batch = dict[str, torch.Tensor]


def read_ahead(
    read: Callable[[int], list[Batch]],
    steps: range,
    device: torch.device,
) -> Generator[list[Batch]]:
    """`read(step)` of each of the `steps`, in a thread of its own and one step ahead of the caller.

    For an accelerator the tensors lie in pinned memory, from where they can be copied without waiting. What `read`
    raises is raised here, at the step that it belongs to. Close the iterator where it may not be read to its end: the
    thread ends with it.
    """

    def fetch(step: int) -> list[Batch]:
        batches = read(step)
        if device.type != "cpu":
            batches = [{key: value.pin_memory() for key, value in batch.items()} for batch in batches]
        return batches

    if not steps:
        return
    # On device 0, where a thread starts, pinning for another device would take memory.
    reader = ThreadPoolExecutor(1, "read-ahead", thread_initializer(device))
    try:
        ahead = reader.submit(fetch, steps.start)
        for step in steps:
            batches = ahead.result()
            if step + 1 in steps:
                ahead = reader.submit(fetch, step + 1)
            yield batches
    finally:
        reader.shutdown(cancel_futures=True)
