"""The scope of each event in a trace (phase of the step, module of the model) and the category of its work.

An operator belongs to the module whose annotation it ran in. A backward node belongs to the module of the forward
operator that created it, by torch's own links; the accumulation of a gradient to the node that computed it, which runs
right before.
"""

import re
from bisect import bisect_left, bisect_right
from typing import NamedTuple

from train.kernels.traces import Event, Trace, ancestors
from train.metrics.annotations import PHASES, module_of

IDLE = "idle and launch gaps"
CATEGORIES = (
    "attention", "matmul", "normalization and elementwise", "loss", "optimizer", "communication", "copies", IDLE,
    "other",
)  # fmt: skip

COMMUNICATION = re.compile(
    r"c10d::|gloo:|ccl|mpi:|record_param_comms|deepspeed_comm|all_?reduce|all_?gather|reduce_scatter"
)
ATTENTION = re.compile(r"scaled_dot_product|flash_attn|_flash_attention|_efficient_attention|_cudnn_attention|fmha")
MATMUL = re.compile(r"(aten|mkl|mkldnn)::_?(\w*mm(_out|_|_activation)?|\w*linear\w*|matmul)$|gemm|cutlass|cublas")
COPIES = re.compile(
    r"aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|_foreach_copy_|pin_memory|_pin_memory|item|"
    r"_local_scalar_dense)$|Memcpy|Memset|fsdp::"
)
# Operators that create or view tensors without touching their elements, and autograd's own bookkeeping.
BOOKKEEPING = re.compile(
    r"aten::(view|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|as_strided|expand|slice|select|split|"
    r"split_with_sizes|narrow|chunk|unsqueeze|squeeze|alias|detach|detach_|empty\w*|new_\w+|resize_|resolve_conj|"
    r"resolve_neg|result_type|set_|unbind|unflatten|flatten|is_nonzero|lift_fresh|requires_grad_|set_data)$|"
    r"autograd::|torch::autograd::|detach|\w*Backward\d*$|Optimizer"
)


class Scope(NamedTuple):
    """`phase` is one of `annotations.PHASES`, "recompute" (forward inside of backward), or empty outside of all."""

    phase: str
    module: str


NO_SCOPE = Scope("", "")


class Scopes:
    """The scope of every event in a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._scopes: dict[Event, Scope] = {}
        self._starts: list[float] = []
        self._phases: list[str] = []
        self._assign({})
        self._index_main_phases()
        self._assign(self._modules_of_backward_nodes())

    def __getitem__(self, event: Event) -> Scope:
        return self._scopes[event]

    def phase_at(self, time: float) -> str:
        """Return the main thread's phase at a time."""
        index = bisect_right(self._starts, time) - 1
        return self._phases[index] if index >= 0 else ""

    def phase_changes(self, start: float, end: float) -> list[float]:
        """Return the times between `start` and `end` at which the main thread's phase changes."""
        return self._starts[bisect_right(self._starts, start) : bisect_left(self._starts, end)]

    def _assign(self, modules: dict[Event, str]) -> None:
        """Give every event its scope; `modules` are those of the backward nodes, once they are known."""
        for thread, events in self.trace.threads.items():
            latest = ""
            for event in events:
                latest = modules.get(event, latest)
                if event.parent is not None:
                    outer = self._scopes[event.parent]
                else:  # autograd runs the backward pass of a GPU in a thread of its own, which has no annotations
                    outer = NO_SCOPE if thread == self.trace.main else Scope(self.phase_at(event.start), "")
                self._scopes[event] = self._inner(event, outer, modules.get(event), latest)

    @staticmethod
    def _inner(event: Event, outer: Scope, module: str | None, latest: str) -> Scope:
        if event.kind == "annotation":
            if event.name in PHASES:
                return Scope(event.name, "")
            if event.name.startswith("Optimizer."):
                return Scope("optimizer", "")
            annotated = module_of(event.name)
            if annotated is not None:
                return Scope("recompute" if outer.phase == "backward" else outer.phase, annotated)
        elif module is not None:
            return Scope(outer.phase, module)
        elif event.name.endswith("evaluate_function: torch::autograd::AccumulateGrad"):
            return Scope(outer.phase, latest)
        return outer

    def _modules_of_backward_nodes(self) -> dict[Event, str]:
        by_start = {(event.thread, event.start): event for own in self.trace.threads.values() for event in own}
        modules: dict[Event, str] = {}
        for node, operator in self.trace.links.items():
            if node in by_start and operator in by_start:
                event, module = by_start[node], self[by_start[operator]].module
                modules[event] = module
                if event.parent is not None and "evaluate_function" in event.parent.name:
                    modules[event.parent] = module
        return modules

    def _index_main_phases(self) -> None:
        """Index the main thread's phase as a step function of time."""
        changes: list[tuple[float, str]] = []
        for event in self.trace.threads[self.trace.main]:
            phase = self._scopes[event].phase
            outer = self._scopes[event.parent].phase if event.parent is not None else ""
            if event.kind == "annotation" and phase != outer:
                changes += [(event.end, outer), (event.start, phase)]
        for time, phase in sorted(changes, key=lambda change: change[0]):
            self._starts.append(time)
            self._phases.append(phase)


def _names(name: str, event: Event | None) -> list[str]:
    return [name, *(above.name for above in ancestors(event) if above.kind == "op")]


def communicates(name: str, event: Event | None) -> bool:
    """Whether an operator or kernel is part of a collective; arguments as of `categorize`."""
    return any(map(COMMUNICATION.search, _names(name, event)))


def categorize(name: str, scope: Scope, event: Event | None) -> str:
    """Return the category of the operator or kernel `name`; `event` is the operator, or what launched the kernel."""
    names = _names(name, event)
    if scope.phase == "communication" or communicates(name, event):
        return "communication"
    if scope.phase == "optimizer":
        return "optimizer"
    if scope.module.endswith(".attn") or any(map(ATTENTION.search, names)):
        return "attention"
    operators = [found for found in names if not BOOKKEEPING.match(found)]
    if MATMUL.search(name) or (operators and MATMUL.search(operators[0])):
        return "matmul"
    if scope.module == "loss":
        return "loss"
    if COPIES.search(name):
        return "copies"
    if BOOKKEEPING.match(name):
        return "other"
    return "normalization and elementwise"
