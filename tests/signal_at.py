"""Trains, and sends itself a signal at one place: `python -m tests.signal_at PLACE SIGNAL CALL FLAGS...`.

PLACE is a function, as `train.run.loop:load_model` or `train.engines.base:Engine.train_step`: the signal comes when
it is called for the CALL-th time, or, with `/backward` after its name, when the gradient of what that call returned is
computed; or a module, and it comes when that is imported. With `@1` at the end, only rank 1 gets it.
"""

import os
import signal
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from typing import Any

from train.__main__ import main
from train.utils.command import run_command


class AtImport(MetaPathFinder):
    def __init__(self, module: str, number: signal.Signals) -> None:
        self.module, self.number = module, number

    def find_spec(self, name: str, *_: Any) -> None:
        if name == self.module:
            os.kill(os.getpid(), self.number)


def at_call(place: str, number: signal.Signals, call: int) -> None:
    place, _, backward = place.partition("/")
    module, path = place.split(":")
    *outer, name = path.split(".")
    owner = import_module(module)
    for each in outer:
        owner = getattr(owner, each)
    function, calls = getattr(owner, name), 0

    def signalled(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not backward:
            os.kill(os.getpid(), number)
        returned = function(*arguments, **named)
        if calls == call and backward:
            returned.register_hook(lambda _: os.kill(os.getpid(), number))
        return returned

    setattr(owner, name, signalled)


if __name__ == "__main__":
    place, number, call = sys.argv[1], signal.Signals[sys.argv[2]], int(sys.argv[3])
    del sys.argv[1:4]
    place, _, rank = place.partition("@")
    if rank not in ("", os.environ.get("RANK")):
        pass
    elif ":" in place:
        at_call(place, number, call)
    else:
        sys.meta_path.insert(0, AtImport(place, number))
    run_command(main)
