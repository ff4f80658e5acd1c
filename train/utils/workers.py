"""Work shared out among threads, its results in the order of what was asked."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with its result, in the items' order; a few are read ahead, so that no worker waits.

    Where the items break off with an error, it comes behind the results of all that there were.
    """
    pending: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers)
    broken = None
    try:
        iterator = iter(items)
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                break
            except Exception as error:
                broken = error
                break
            pending.append((item, pool.submit(function, item)))
            if len(pending) > workers + 2:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
        if broken is not None:
            raise broken
    finally:
        pool.shutdown(cancel_futures=True)
