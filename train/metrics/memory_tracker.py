"""Where the memory of a step goes: every storage of a tensor from its first operator to its end, by category.

What a storage is, is said when it is known: a tensor that outlives the forward pass was an activation from its birth,
one that becomes a parameter's gradient was a gradient. Tensors are counted, not what an allocator or the operating
system keeps around them, so a CPU and a GPU that run the same operators say the same.
"""

import weakref
from collections.abc import Callable, Iterable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_gpt2flash.loss import ALIGNMENT
from train.metrics.annotations import PHASES
from train.utils.files import write_json

SCHEMA = 1
"""Version of the layout of memory.json."""

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "logits", "workspace")
POINTS = 200  # of the curve over a step
Holdings = Callable[[], Iterable[tuple[str, Tensor]]]


class Holding:
    """One storage: its category, and the events at which it was born and died, again for each size that it had."""

    def __init__(self, storage: torch.UntypedStorage, born: int, category: str) -> None:
        self.category = category
        self.spans: list[tuple[int, int | None, int]] = [(born, None, storage.nbytes())]
        # Of a tensor that no operator in sight has made: it was there before if it stays beyond the step, as DDP's
        # buckets do, and else is a communication's that came in just before it was seen.
        self.found: int | None = None

    @property
    def lives(self) -> bool:
        return self.spans[-1][1] is None

    def end(self, event: int) -> None:
        born, _, size = self.spans[-1]
        if self.found is not None and len(self.spans) == 1:
            born = self.found
        self.spans[-1] = born, event, size


class MemoryTracker(TorchDispatchMode):
    """A context in which every operator's tensors are followed.

    Args:
        holdings: the tensors whose category is known, as (category, tensor). Asked at the start, and again whenever a
            region (`train.metrics.annotations`) ends: gradients come and go.
        vocabulary: tensors with so many columns, or that rounded up as `modeling_gpt2flash.loss` does, are logits.
        device_type: whose tensors are counted: what is offloaded is not, beside a GPU.
    """

    def __init__(self, holdings: Holdings, vocabulary: int, device_type: str) -> None:
        super().__init__()
        self.holdings = holdings
        self.device_type = device_type
        self.logit_columns = (vocabulary, -(-vocabulary // ALIGNMENT) * ALIGNMENT)
        self.event = 1
        self.known: weakref.WeakKeyDictionary[torch.UntypedStorage, Holding] = weakref.WeakKeyDictionary()
        self.all: list[Holding] = []
        self.ends: list[weakref.finalize] = []
        self.phases: list[tuple[int, str]] = [(0, "step")]
        self.regions: list[str] = []
        self.began_forward = 0
        self.recomputed: list[Holding] = []

    def __enter__(self) -> "MemoryTracker":
        self._resize = torch.UntypedStorage.resize_
        tracker = self

        @wraps(self._resize)
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # how FSDP2 lets go of gathered parameters
            result = tracker._resize(storage, size)
            if (holding := tracker.known.get(storage)) is not None:
                tracker._end(holding)
                holding.spans.append((tracker.event, None, size))
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        self._mark_known()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self._mark_known()
        for end in self.ends:
            end.detach()  # what lives on is followed no further

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as operators on the shards
        kwargs = kwargs or {}
        if func is torch.ops.profiler._record_function_enter_new.default:
            self._enter_region(args[0])
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (holding := self._see(tensor, 0)):
                holding.found = self.event
        recomputing = self.regions[-1:] == ["backward"] and torch.is_grad_enabled()
        if self.recomputed and not recomputing:
            self._keep(self.recomputed)
            self.recomputed = []
        found = func(*args, **kwargs)
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and (holding := self._see(tensor, self.event)) and recomputing:
                self.recomputed.append(holding)
        if func is torch.ops.profiler._record_function_exit._RecordFunction:
            self._leave_region()
        return found

    def _see(self, tensor: Tensor, born: int) -> Holding | None:
        """The holding of a tensor whose storage was not known before."""
        tensor = _local(tensor)
        if tensor.device.type != self.device_type:
            return None
        storage = tensor.untyped_storage()
        if storage in self.known:
            return None
        wide = tensor.ndim > 1 and tensor.shape[-1] in self.logit_columns
        holding = Holding(storage, born, "logits" if wide else "workspace")
        self.known[storage] = holding
        self.all.append(holding)
        self.ends.append(weakref.finalize(storage, self._end, holding))
        self.ends[-1].atexit = False
        self.event += 1
        return holding

    def _end(self, holding: Holding) -> None:
        holding.end(self.event)
        self.event += 1

    def _mark_known(self) -> None:
        for category, tensor in self.holdings():
            self._see(tensor, 0)
            if (holding := self.known.get(_local(tensor).untyped_storage())) is not None:
                holding.category = category

    def _keep(self, holdings: Iterable[Holding]) -> None:
        for holding in holdings:
            if holding.lives and holding.category == "workspace":
                holding.category = "activations"

    def _enter_region(self, name: str) -> None:
        self.regions.append(name if name in PHASES else (self.regions or ["step"])[-1])
        if name in PHASES:
            self.phases.append((self.event, name))
        if name == "forward":
            self.began_forward = self.event

    def _leave_region(self) -> None:
        if not self.regions:
            return  # it had begun before the tracking
        left = self.regions.pop()
        now = (self.regions or ["step"])[-1]
        if now != left:
            if left == "forward":
                self._keep(holding for holding in self.all if holding.spans[0][0] >= self.began_forward)
            self._mark_known()
            self.phases.append((self.event, now))

    def curves(self) -> np.ndarray:
        """(events, categories): bytes held of each category after each event."""
        changes = np.zeros((self.event + 1, len(CATEGORIES)), dtype=np.int64)
        for holding in self.all:
            column = CATEGORIES.index(holding.category)
            for born, died, size in holding.spans:
                changes[born, column] += size
                if died is not None:
                    changes[died, column] -= size
        return changes.cumsum(axis=0)

    def summary(self) -> dict[str, Any]:
        """What memory.json holds."""
        held = self.curves()
        total = held.sum(axis=1)
        peak = int(total.argmax())
        starts = [event for event, _ in self.phases]
        points = []
        for first, last in pairwise(np.linspace(0, len(held), min(POINTS, len(held)) + 1).astype(int)):
            highest = int(first + total[first:last].argmax())
            phase = self.phases[int(np.searchsorted(starts, highest, side="right")) - 1][1]
            points.append({"phase": phase, "event": highest, **_named(held[highest])})
        return {"schema": SCHEMA, "peak_bytes": int(total[peak]), "at_peak": _named(held[peak]), "over_step": points}

    def write(self, file: Path) -> None:
        write_json(file, self.summary())


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _named(held: np.ndarray) -> dict[str, int]:
    return dict(zip(CATEGORIES, map(int, held), strict=True))
