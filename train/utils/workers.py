"""Parallel work in threads, with the results in the order of the items."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, in order. At most `workers` + 3 items are read ahead.

    If the iterable raises, the error is raised after the results of all items before it.
    """
    pending: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers)
    iterator = iter(items)
    error = None
    try:
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception as raised:
                error = raised
                break
            pending.append((item, pool.submit(function, item)))
            if len(pending) > workers + 2:
                first, future = pending.popleft()
                yield first, future.result()
        for item, future in pending:
            yield item, future.result()
        if error is not None:
            raise error
    finally:
        pool.shutdown(cancel_futures=True)
