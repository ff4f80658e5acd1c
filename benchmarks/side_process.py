"""A side of `benchmarks/sides.py` in a process of its own: some keep freed memory, and others do not."""

import resource
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context

import torch

from benchmarks import sides
from benchmarks.rounds import Round, measure
from benchmarks.sides import Case, Side, WarmedUp
from train.utils.third_party_warnings import silence_third_party_warnings


def side_process(threads: int, memory_limit: int | None = None) -> ProcessPoolExecutor:
    """A new process for the functions of one side, with that many threads and at most that many bytes of memory."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_prepare, initargs=(threads, memory_limit))


def first_steps(name: str, case: Case) -> WarmedUp:
    return sides.warm_up(_side(name, case), case)


def further_step(name: str, case: Case) -> Round:
    return measure(partial(_side(name, case).step, *case.tokens()))


@cache
def _side(name: str, case: Case) -> Side:
    return sides.build(name, case)


def _prepare(threads: int, memory_limit: int | None) -> None:
    silence_third_party_warnings()
    torch.set_num_threads(threads)
    if memory_limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, memory_limit))
