import threading
from contextlib import closing

import pytest
import torch

from train.data.prefetch import Batch, read_ahead

CPU = torch.device("cpu")
WAIT_SECONDS = 60


def batch_of(step: int) -> list[Batch]:
    return [{"input_ids": torch.full((1, 2), step)}]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_steps_come_in_order_and_once() -> None:
    asked = []

    def read(step: int) -> list[Batch]:
        asked.append(step)
        return batch_of(step)

    steps = [int(batch["input_ids"][0, 0]) for [batch] in read_ahead(read, range(3, 9), CPU)]
    assert steps == asked == [3, 4, 5, 6, 7, 8]
    assert readers() == []


def test_the_next_step_is_read_while_this_one_runs_and_no_further_one() -> None:
    read_steps = [threading.Event() for _ in range(4)]
    threads = set()

    def read(step: int) -> list[Batch]:
        threads.add(threading.current_thread())
        read_steps[step].set()
        return batch_of(step)

    with closing(read_ahead(read, range(4), CPU)) as data:
        next(data)
        assert read_steps[1].wait(WAIT_SECONDS), "nobody has asked for step 1 yet"
        next(data)
        assert read_steps[2].wait(WAIT_SECONDS)
        assert not read_steps[3].is_set()
        assert threading.current_thread() not in threads
        assert len(threads) == 1
    assert readers() == []


def test_no_steps_read_nothing() -> None:
    assert list(read_ahead(lambda step: pytest.fail("read"), range(5, 5), CPU)) == []


def test_an_error_comes_at_its_step() -> None:
    def read(step: int) -> list[Batch]:
        if step == 1:
            raise OSError("the disk is gone")
        return batch_of(step)

    data = read_ahead(read, range(3), CPU)
    assert next(data)[0]["input_ids"][0, 0] == 0
    with pytest.raises(OSError, match="the disk is gone"):
        next(data)
    assert readers() == []


def test_an_error_of_the_loop_ends_the_reader() -> None:
    def step_that_fails() -> None:
        with closing(read_ahead(batch_of, range(3), CPU)) as data:
            next(data)
            raise RuntimeError("a step failed")

    with pytest.raises(RuntimeError, match="a step failed"):
        step_that_fails()
    assert readers() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_for_a_gpu_the_tensors_are_pinned() -> None:
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        for step, [batch] in enumerate(read_ahead(batch_of, range(3), torch.device("cuda"))):
            assert batch["input_ids"].is_pinned()
            moved = batch["input_ids"].to("cuda", non_blocking=True)
            assert moved.device.index == last
            assert (moved == step).all()
