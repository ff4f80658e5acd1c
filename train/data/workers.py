"""Parallel work in threads, with the results in the order of the items."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_parallel(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    ahead: int | None = None,
    initializer: Callable[[], None] | None = None,
) -> Generator[tuple[Item, Result]]:
    """Yield each item with its result, in order; the items are read in the calling thread.

    `ahead` of them (by default `workers` + 2) are read before the result of the first one is yielded. An error of the
    iterable is raised after the results of all items before it. `initializer` is called at the start of each thread.
    """
    ahead = workers + 2 if ahead is None else ahead
    pool = ThreadPoolExecutor(workers, "read-ahead", initializer)

    def submitted() -> Iterator[tuple[Any, Future[Result]]]:
        try:
            for item in items:
                yield item, pool.submit(function, item)
        except Exception as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            yield None, failed

    pending: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for pair in submitted():
            pending.append(pair)
            if len(pending) > ahead:
                item, future = pending.popleft()
                yield item, future.result()
        for item, future in pending:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
