"""Every tensor of a step is counted once, in the category that it turned out to have, until it is released."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from train.metrics.annotations import annotate
from train.metrics.memory_profile import CATEGORIES, SCHEMA, read_memory
from train.metrics.memory_tracker import MemoryTracker
from train.utils.files import write_json

KB = 1024


def kilobytes(amount: int) -> torch.Tensor:
    return torch.zeros(amount * KB, dtype=torch.uint8)


def tracked() -> MemoryTracker:
    return MemoryTracker(lambda: [], vocab_size=11, device_type="cpu")


def test_the_peak_is_of_tensors_that_are_allocated_together() -> None:
    with tracked() as tracker:
        first = kilobytes(3)
        view = first[KB:]
        del first
        second = kilobytes(4)
        del view
        third = kilobytes(2)
        del second, third
    found = tracker.profile()
    assert found.peak_bytes == 7 * KB
    assert asdict(found.at_peak) == dict.fromkeys(CATEGORIES, 0) | {"workspace": 7 * KB}
    assert tracker.curves()[-1].sum() == 0


def test_a_tensor_from_before_is_counted_from_the_beginning() -> None:
    before = kilobytes(5)
    unused = kilobytes(100)
    with tracked() as tracker:
        passing = kilobytes(1)
        del passing
        before.add_(1)
    assert tracker.profile().peak_bytes == 6 * KB
    assert unused.sum() == 0


def test_a_tensor_that_no_operator_allocated_is_counted_from_when_it_was_seen() -> None:
    """As ZeRO-3's gathered parameters do, which communication allocates."""
    with tracked() as tracker:
        passing = kilobytes(9)
        del passing
        with _disable_current_modes():
            came = kilobytes(4)
        came.add_(1)
        del came
    assert tracker.profile().peak_bytes == 9 * KB


def test_a_storage_that_shrinks_and_grows_is_followed() -> None:
    """As FSDP2 frees gathered parameters and gathers them again."""
    resize = torch.UntypedStorage.resize_
    gathered = kilobytes(8)
    with tracked() as tracker:
        gathered.add_(0)
        gathered.untyped_storage().resize_(0)
        other = kilobytes(6)
        del other
        gathered.untyped_storage().resize_(8 * KB)
    assert torch.UntypedStorage.resize_ is resize
    assert tracker.profile().peak_bytes == 8 * KB
    assert tracker.curves()[-1].sum() == 8 * KB


def test_an_annotation_entered_before_may_exit_within() -> None:
    entered = annotate("forward")
    entered.__enter__()
    with tracked() as tracker:
        kept = kilobytes(1)
        entered.__exit__(None, None, None)
    assert tracker.profile().at_peak.workspace == kept.nbytes


def test_an_error_removes_every_hook() -> None:
    resize = torch.UntypedStorage.resize_
    with pytest.raises(ValueError, match="no"), tracked():
        raise ValueError("no")
    assert torch.UntypedStorage.resize_ is resize
    assert _get_current_dispatch_mode() is None


def test_a_step_by_category(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, labels = torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)

    def step() -> float:
        with annotate("forward"):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        with annotate("backward"):
            loss.backward()
        with annotate("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def holdings() -> list[tuple[str, torch.Tensor]]:
        found = [("parameters", parameter.detach()) for parameter in model.parameters()]
        found += [("gradients", parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        return found + [("optimizer", value) for state in optimizer.state.values() for value in state.values()]

    step()
    with MemoryTracker(holdings, vocab_size=11, device_type="cpu") as tracker:
        step()
    (tmp_path / "profile").mkdir()
    write_json(tmp_path / "profile" / "memory.json", asdict(tracker.profile()))
    found = read_memory(tmp_path)
    assert found is not None
    elements = 8 * 16 + 16 + 16 * 11
    assert found.schema == SCHEMA
    most = {key: max(getattr(point, key) for point in found.over_step) for key in CATEGORIES}
    assert most["parameters"] == most["gradients"] == 4 * elements
    assert most["optimizer"] == 4 * (2 * elements + 3), "two moments, and the step of each of three"
    assert most["activations"] >= 4 * 4 * 16, "tanh's output"
    assert most["logits"] == 3 * 4 * 4 * 11, "in backward: log-softmax, its gradient and that of the logits"
    assert {point.phase for point in found.over_step} >= {"forward", "backward", "optimizer"}
    totals = [sum(getattr(point, key) for key in CATEGORIES) for point in found.over_step]
    assert max(totals) == found.peak_bytes == sum(asdict(found.at_peak).values())
    events = [point.event for point in found.over_step]
    assert events == sorted(set(events))
