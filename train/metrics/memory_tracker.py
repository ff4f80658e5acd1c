"""Where the memory of a step goes: every tensor's storage from its first operator to its release, by category.

The category of a storage is often known only later: a tensor that outlives the forward pass was an activation from the
start, one that becomes a parameter's gradient was a gradient. Tensors are counted, not what an allocator or the
operating system holds around them, so that a CPU and a GPU that run the same operators give the same figures.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_gpt2flash.loss import ALIGNMENT
from train.metrics.annotations import PHASES
from train.metrics.memory_profile import CATEGORIES, SCHEMA, CategoryBytes, MemoryProfile, Point

POINTS = 200  # of the curve over a step


@dataclass
class Storage:
    """A tracked storage."""

    category: str
    spans: list[tuple[int, int | None, int]]  # (allocated, released, bytes): the events between which it had a size
    # Of an input that no tracked operator created. If it stays beyond the step, as DDP's buckets do, it was there
    # before; otherwise communication allocated it, just before it was first seen.
    first_seen: int | None = None


class MemoryTracker(TorchDispatchMode):
    """Context manager that tracks the tensors of every operator.

    Args:
        named_tensors: returns the tensors whose category is known, as (category, tensor). It is called at the start
            and whenever an annotation (`train.metrics.annotations`) ends, since gradients come and go.
        vocab_size: tensors with so many columns, or with that number rounded up as `modeling_gpt2flash.loss` does,
            are logits.
        device_type: whose tensors are counted; on a GPU, what is offloaded to the host is not.
    """

    def __init__(
        self, named_tensors: Callable[[], Iterable[tuple[str, Tensor]]], vocab_size: int, device_type: str
    ) -> None:
        super().__init__()
        self.named_tensors = named_tensors
        self.device_type = device_type
        self.logit_columns = (vocab_size, -(-vocab_size // ALIGNMENT) * ALIGNMENT)
        self.event = 1
        self.tracked: weakref.WeakKeyDictionary[torch.UntypedStorage, Storage] = weakref.WeakKeyDictionary()
        self.storages: list[Storage] = []
        self.finalizers: list[weakref.finalize] = []
        self.phases: list[tuple[int, str]] = [(0, "step")]
        self.open_phases = ["step"]  # and of each annotation that is open, the phase that it is in
        self.forward_start = 0
        self.recomputed: list[Storage] = []

    def __enter__(self) -> "MemoryTracker":
        resize = self._resize = torch.UntypedStorage.resize_

        @wraps(resize)
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:  # how FSDP2 frees gathered parameters
            result = resize(storage, size)
            if (tracked := self.tracked.get(storage)) is not None:
                self._release(tracked)
                tracked.spans.append((self.event, None, size))
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        self._categorize_named_tensors()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self._categorize_named_tensors()
        for finalizer in self.finalizers:
            finalizer.detach()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is dispatched again as operators on the shards
        kwargs = kwargs or {}
        if func is torch.ops.profiler._record_function_enter_new.default:
            self._enter_annotation(args[0])
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (storage := self._track(tensor, 0)):
                storage.first_seen = self.event
        recomputing = self.open_phases[-1] == "backward" and torch.is_grad_enabled()
        if self.recomputed and not recomputing:
            self._mark_activations(self.recomputed)
            self.recomputed = []
        results = func(*args, **kwargs)
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and (storage := self._track(tensor, self.event)) and recomputing:
                self.recomputed.append(storage)
        if func is torch.ops.profiler._record_function_exit._RecordFunction:
            self._exit_annotation()
        return results

    def _track(self, tensor: Tensor, allocated: int) -> Storage | None:
        """Track a tensor's storage; None if it is tracked already."""
        tensor = _local(tensor)
        if tensor.device.type != self.device_type:
            return None
        storage = tensor.untyped_storage()
        if storage in self.tracked:
            return None
        is_logits = tensor.ndim > 1 and tensor.shape[-1] in self.logit_columns
        tracked = Storage("logits" if is_logits else "workspace", [(allocated, None, storage.nbytes())])
        self.tracked[storage] = tracked
        self.storages.append(tracked)
        self.finalizers.append(weakref.finalize(storage, self._release, tracked))
        self.finalizers[-1].atexit = False
        self.event += 1
        return tracked

    def _release(self, storage: Storage) -> None:
        allocated, _, size = storage.spans[-1]
        if storage.first_seen is not None and len(storage.spans) == 1:
            allocated = storage.first_seen
        storage.spans[-1] = allocated, self.event, size
        self.event += 1

    def _categorize_named_tensors(self) -> None:
        for category, tensor in self.named_tensors():
            self._track(tensor, 0)
            if (storage := self.tracked.get(_local(tensor).untyped_storage())) is not None:
                storage.category = category

    def _mark_activations(self, storages: Iterable[Storage]) -> None:
        for storage in storages:
            is_allocated = storage.spans[-1][1] is None
            if is_allocated and storage.category == "workspace":
                storage.category = "activations"

    def _enter_annotation(self, name: str) -> None:
        self.open_phases.append(name if name in PHASES else self.open_phases[-1])
        if name in PHASES:
            self.phases.append((self.event, name))
        if name == "forward":
            self.forward_start = self.event

    def _exit_annotation(self) -> None:
        if len(self.open_phases) == 1:
            return  # it was entered before the tracker
        ended = self.open_phases.pop()
        if ended == self.open_phases[-1]:
            return
        if ended == "forward":
            self._mark_activations(storage for storage in self.storages if storage.spans[0][0] >= self.forward_start)
        self._categorize_named_tensors()
        self.phases.append((self.event, self.open_phases[-1]))

    def curves(self) -> np.ndarray:
        """Return the bytes allocated in each category after each event, of shape (events, categories)."""
        changes = np.zeros((self.event + 1, len(CATEGORIES)), dtype=np.int64)
        for storage in self.storages:
            column = CATEGORIES.index(storage.category)
            for allocated, released, size in storage.spans:
                changes[allocated, column] += size
                if released is not None:
                    changes[released, column] -= size
        return changes.cumsum(axis=0)

    def profile(self) -> MemoryProfile:
        curves = self.curves()
        total = curves.sum(axis=1)
        peak = int(total.argmax())
        starts = [event for event, _ in self.phases]
        points = []
        for first, last in pairwise(np.linspace(0, len(curves), min(POINTS, len(curves)) + 1).astype(int)):
            highest = int(first + total[first:last].argmax())
            phase = self.phases[int(np.searchsorted(starts, highest, side="right")) - 1][1]
            allocated = dict(zip(CATEGORIES, curves[highest].tolist(), strict=True))
            points.append(Point(**allocated, phase=phase, event=highest))
        return MemoryProfile(SCHEMA, int(total[peak]), CategoryBytes(*curves[peak].tolist()), points)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
