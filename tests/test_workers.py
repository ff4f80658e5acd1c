import threading
from collections.abc import Iterator

import pytest

from train.data.workers import in_parallel


def test_results_keep_the_order_and_little_is_read_ahead() -> None:
    read = []

    def items() -> Iterator[int]:
        for item in range(50):
            read.append(item)
            yield item

    for done, (item, result) in enumerate(in_parallel(lambda item: item * item, items(), workers=3)):
        assert (item, result) == (done, done * done)
        assert len(read) <= done + 3 + 3
    assert done == 49


def test_what_was_read_before_a_fault_comes_before_it() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("broken")

    results = in_parallel(str, items(), workers=4)
    assert [next(results) for _ in range(5)] == [(item, str(item)) for item in range(5)]
    with pytest.raises(ValueError, match="broken"):
        next(results)


def test_a_fault_in_a_worker_arrives_and_no_thread_stays() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(in_parallel(lambda item: 1 // item, [2, 1, 0, 1, 2], workers=2))
    assert threading.active_count() == before
