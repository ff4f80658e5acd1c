"""The benchmark of attention kernels, on the two that need no GPU."""

import pytest
import torch

from benchmarks.attention import check_same, compare, make_side
from train.utils.errors import UserError


@pytest.fixture
def qkv() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 24, 3 * 128, requires_grad=True)


def test_kernels_are_compared(qkv: torch.Tensor) -> None:
    made = {name: make_side(name, "tiny", torch.float32, "cpu") for name in ("eager", "sdpa", "sdpa-flash")}
    assert made["sdpa"](qkv).shape == (2, 24, 128)
    rows = compare(made, qkv, rounds=2, repeats=1)
    assert [row[:2] for row in rows] == [["24", "eager"], ["24", "sdpa"], ["24", "sdpa-flash"]]
    assert {len(row) for row in rows} == {8}
    assert rows[0][4] == rows[0][7] == "1.00 (1.00 to 1.00)"


def test_a_kernel_that_computes_something_else_is_not_timed(qkv: torch.Tensor) -> None:
    eager = make_side("eager", "tiny", torch.float32, "cpu")
    right = torch.ones_like(qkv[..., :128])
    check_same({"eager": eager, "the same": lambda given: eager(given)}, qkv, right)
    with pytest.raises(SystemExit, match=r"scaled's output is 1.0e-03 of its norm off eager's"):
        check_same({"eager": eager, "scaled": lambda given: 1.001 * eager(given)}, qkv, right)


def test_a_flash_kernel_needs_its_gpu() -> None:
    with pytest.raises(UserError, match=r"--sides flash_attention_2: .* runs on CUDA devices"):
        make_side("flash_attention_2", "tiny", torch.bfloat16, "cpu")
