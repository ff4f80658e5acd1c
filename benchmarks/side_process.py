"""A side of `benchmarks/sides.py` in a process of its own, which takes a step whenever it is asked to."""

import contextlib
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from benchmarks import sides
from benchmarks.rounds import Round, measure
from benchmarks.sides import Case, WarmedUp
from train.utils.third_party_warnings import silence_third_party_warnings


class SideProcess:
    """A context manager of the side's process. The side has taken its first steps when the constructor returns.

    Raises:
        BaseException: the error of the process, if the side cannot be built.
    """

    warmed_up: WarmedUp

    def __init__(self, name: str, case: Case, threads: int) -> None:
        spawn = get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, name, case, threads), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self.warmed_up = self._receive()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # ends the loop of the process
        self._process.join()

    def step(self) -> Round:
        """The cost of a step in the side's process."""
        with contextlib.suppress(BrokenPipeError):  # `_receive` reports it
            self._pipe.send("step")
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise SystemExit(f"the process of a side ended by itself with code {self._process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Connection, name: str, case: Case, threads: int) -> None:
    silence_third_party_warnings()
    torch.set_num_threads(threads)
    try:
        side = sides.build(name, case)
        step = partial(side.step, *case.tokens())
        pipe.send(sides.warm_up(side, case))
        while True:
            pipe.recv()
            pipe.send(measure(step))
    except EOFError:
        return
    except Exception as error:
        pipe.send(error)
