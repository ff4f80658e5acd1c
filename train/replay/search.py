"""Which operator of a step is the first to make a number that is not finite, and which make the largest ones."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGEST = 5
# What they return is not computed: memory as it happens to be.
UNINITIALIZED = ("empty", "new_empty", "resize")


@dataclass(frozen=True)
class Found:
    """An output of an operator."""

    value: float  # NaN or infinity, or else the largest magnitude
    phase: str  # "forward" or "backward"
    module: str  # under its name in the model; "" is the model itself, whose forward computes the loss
    operator: str
    shape: tuple[int, ...]
    index: tuple[int, ...]  # of the value in the output
    micro_batch: int  # in the order in which they are computed

    def __str__(self) -> str:
        where = self.module or "the loss"
        return f"{self.value:g} in the {self.phase} pass of {where}: {self.operator}, output {list(self.shape)}"


class ValueSearch(TorchDispatchMode):
    """While it is entered, looks at the output of every operator.

    `first` is the first value that is not finite though all inputs of its operator are, None if there is none; minus
    infinity counts as finite, since attention masks with it. `largest` are the largest magnitudes until then, at most
    one of each module and phase.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first: Found | None = None
        self.by_place: dict[tuple[str, str], Found] = {}
        self.micro_batch = -1
        self.forward_modules = [""]
        self.backward_module = ""
        self.hooked: set[int] = set()  # outputs of modules; they are alive until the backward pass
        self.hooks = ExitStack()
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(partial(self._enter, name))
            leave = module.register_forward_hook(self._leave, always_call=True)
            self.hooks.callback(enter.remove)
            self.hooks.callback(leave.remove)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.hooks.close()

    def _enter(self, name: str, *_: Any) -> None:
        if not name:
            self.micro_batch += 1
            self.hooked.clear()
        self.forward_modules.append(name)

    def _leave(self, _module: nn.Module, _inputs: Any, outputs: Any) -> None:
        name = self.forward_modules.pop()
        for output in tree_leaves(outputs):
            # The output of a module may also be that of the modules around it.
            if isinstance(output, Tensor) and output.requires_grad and id(output) not in self.hooked:
                self.hooked.add(id(output))
                output.register_hook(partial(self._enter_backward, name))

    def _enter_backward(self, name: str, _gradient: Tensor) -> None:
        """The gradient of a module's output is there: what follows is the backward pass of that module."""
        self.backward_module = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadpacket._qualified_op_name
        inputs = tree_leaves((args, {key: value for key, value in kwargs.items() if key != "out"}))
        finite_inputs = self.first is None and not any(map(_has_non_finite, inputs))
        results = func(*args, **kwargs)
        if finite_inputs and not name.partition("::")[2].startswith(UNINITIALIZED):
            for output in tree_leaves(results):
                if isinstance(output, Tensor) and output.is_floating_point() and output.numel() > 0:
                    self._look(name, output)
        return results

    def _look(self, name: str, output: Tensor) -> None:
        in_backward = torch._C._current_autograd_node() is not None
        phase, module = ("backward", self.backward_module) if in_backward else ("forward", self.forward_modules[-1])
        found = partial(
            Found, phase=phase, module=module, operator=name, shape=tuple(output.shape), micro_batch=self.micro_batch
        )
        if _has_non_finite(output):
            if self.first is None:
                index = tuple((output.isnan() | (output == torch.inf)).nonzero()[0].tolist())
                self.first = found(value=float(output[index]), index=index)
            return
        is_mask = output <= torch.finfo(output.dtype).min  # what attention masks with, and minus infinity
        magnitude = output.abs().masked_fill(is_mask, 0)
        largest = magnitude.max()
        place = phase, module
        if place not in self.by_place or float(largest) > self.by_place[place].value:
            index = tuple((magnitude == largest).nonzero()[0].tolist())
            self.by_place[place] = found(value=float(largest), index=index)

    @property
    def largest(self) -> list[Found]:
        return sorted(self.by_place.values(), key=lambda found: -found.value)[:LARGEST]


def _has_non_finite(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return False
    return bool((value.isnan() | (value == torch.inf)).any())
