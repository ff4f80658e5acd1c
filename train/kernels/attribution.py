"""Where an event of a trace belongs: its step's phase, its module, and the category of its work.

An operator belongs to the module whose region it ran in. A backward node belongs to the module of the operator that
left it, by torch's own links; the accumulation of a gradient to the node that computed it, which runs right before.
"""

import re
from bisect import bisect_left, bisect_right
from typing import NamedTuple

from train.kernels.traces import Event, Thread, Trace, ancestors
from train.metrics.annotations import PHASES, module_of

CATEGORIES = (
    "attention", "matrix products", "normalisation and elementwise", "loss", "optimizer", "communication", "copies",
    "idle and launch gaps", "other",
)  # fmt: skip

COMMUNICATION = re.compile(
    r"c10d::|gloo:|nccl|mpi:|record_param_comms|deepspeed_comm|all_?reduce|all_?gather|reduce_scatter"
)
ATTENTION = re.compile(r"scaled_dot_product|flash_attn|_flash_attention|_efficient_attention|_cudnn_attention|fmha")
PRODUCTS = re.compile(r"(aten|mkl|mkldnn)::_?(\w*mm(_out|_|_activation)?|\w*linear\w*|matmul)$|gemm|cutlass|cublas")
COPIES = re.compile(
    r"aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|_foreach_copy_|pin_memory|_pin_memory|item|"
    r"_local_scalar_dense)$|Memcpy|Memset|fsdp::"
)
# Operators that make or look at tensors without touching their numbers, and autograd's own bookkeeping.
BOOKKEEPING = re.compile(
    r"aten::(view|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|as_strided|expand|slice|select|split|"
    r"split_with_sizes|narrow|chunk|unsqueeze|squeeze|alias|detach|detach_|empty\w*|new_\w+|resize_|resolve_conj|"
    r"resolve_neg|result_type|set_|unbind|unflatten|flatten|is_nonzero|lift_fresh|requires_grad_|set_data)$|"
    r"autograd::|torch::autograd::|detach|\w*Backward\d*$|Optimizer"
)


class Place(NamedTuple):
    """`phase` is one of `regions.PHASES`, "recompute" (forward work inside of backward), or empty outside of all."""

    phase: str
    module: str


NOWHERE = Place("", "")


class Places:
    """The place of every event of a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._places: dict[Event, Place] = {}
        self._starts: list[float] = []
        self._phases: list[str] = []
        self._find({})
        self._index_main()
        by_start = {(event.thread, event.start): event for own in trace.threads.values() for event in own}
        linked: dict[Event, str] = {}
        for node, operator in trace.links.items():
            if node in by_start and operator in by_start:
                event, module = by_start[node], self[by_start[operator]].module
                linked[event] = module
                if event.parent is not None and "evaluate_function" in event.parent.name:
                    linked[event.parent] = module
        self._find(linked)

    def __getitem__(self, event: Event) -> Place:
        return self._places[event]

    def phase_at(self, time: float) -> str:
        """The phase that the main thread is in."""
        index = bisect_right(self._starts, time) - 1
        return self._phases[index] if index >= 0 else ""

    def phase_changes(self, start: float, end: float) -> list[float]:
        """The times between `start` and `end` at which the main thread's phase changes."""
        return self._starts[bisect_right(self._starts, start) : bisect_left(self._starts, end)]

    def _find(self, linked: dict[Event, str]) -> None:
        for thread, events in self.trace.threads.items():
            latest = ""
            for event in events:
                if event in linked:
                    latest = linked[event]
                place = self._places[event.parent] if event.parent is not None else self._outermost(thread, event)
                self._places[event] = self._step_into(event, place, linked.get(event), latest)

    def _outermost(self, thread: Thread, event: Event) -> Place:
        """Autograd runs the backward pass of a GPU in a thread of its own, which knows no phase."""
        return NOWHERE if thread == self.trace.main else Place(self.phase_at(event.start), "")

    @staticmethod
    def _step_into(event: Event, around: Place, linked: str | None, latest: str) -> Place:
        if event.kind == "region":
            if event.name in PHASES:
                return Place(event.name, "")
            if event.name.startswith("Optimizer."):
                return Place("optimizer", "")
            module = module_of(event.name)
            if module is not None:
                return Place("recompute" if around.phase == "backward" else around.phase, module)
        elif linked is not None:
            return Place(around.phase, linked)
        elif event.name.endswith("evaluate_function: torch::autograd::AccumulateGrad"):
            return Place(around.phase, latest)
        return around

    def _index_main(self) -> None:
        """The main thread's phase as a function of time, a step at each change."""
        changes: list[tuple[float, str]] = []
        for event in self.trace.threads[self.trace.main]:
            phase = self._places[event].phase
            outside = self._places[event.parent].phase if event.parent is not None else ""
            if event.kind == "region" and phase != outside:
                changes += [(event.end, outside), (event.start, phase)]
        for time, phase in sorted(changes, key=lambda change: change[0]):
            self._starts.append(time)
            self._phases.append(phase)


def categorise(name: str, place: Place, event: Event | None) -> str:
    """The category of an operator or kernel `name` at `place`; `event` is what launched or is it."""
    names = [name, *(above.name for above in ancestors(event) if above.kind == "op")]
    if place.phase == "communication" or any(map(COMMUNICATION.search, names)):
        return "communication"
    if place.phase == "optimizer":
        return "optimizer"
    if place.module.endswith(".attn") or any(map(ATTENTION.search, names)):
        return "attention"
    operators = [found for found in names if not BOOKKEEPING.match(found)]
    if PRODUCTS.search(name) or (operators and PRODUCTS.search(operators[0])):
        return "matrix products"
    if place.module == "loss":
        return "loss"
    if COPIES.search(name):
        return "copies"
    if BOOKKEEPING.match(name):
        return "other"
    return "normalisation and elementwise"
