"""Which kernel is chosen, and what is said when it cannot be had."""

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_gpt2flash import ATTENTION_NAMES, attention, choose_attention

FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
AMPERE, HOPPER, BLACKWELL, TURING = (8, 0), (9, 0), (10, 0), (7, 5)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A pretended GPU with pretended packages."""

    def pretend(capability: tuple[int, int], *installed: str) -> None:
        monkeypatch.setattr(attention, "_cuda_capability", lambda: capability)
        monkeypatch.setattr(attention, "_installed", lambda name: name in installed)

    return pretend


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        (HOPPER, FLASH, "flash_attention_4"),
        (HOPPER, FLASH[:2], "flash_attention_3"),
        (HOPPER, FLASH[:1], "flash_attention_2"),
        (HOPPER, (), "sdpa"),
        (BLACKWELL, FLASH, "flash_attention_4"),
        (BLACKWELL, FLASH[:2], "flash_attention_2"),
        (AMPERE, FLASH, "flash_attention_2"),
        (AMPERE, FLASH[1:], "sdpa"),
        (TURING, FLASH, "sdpa"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_auto_takes_the_newest_that_runs(machine, capability, installed, expected, dtype) -> None:
    machine(capability, *installed)
    name, reason = choose_attention("auto", "cuda", dtype, 64)
    assert name == expected
    assert reason.startswith(expected)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_auto_without_cuda_or_half_precision_is_sdpa(machine, device, dtype) -> None:
    machine(HOPPER, *FLASH)
    name, reason = choose_attention("auto", device, dtype, 64)
    assert name == "sdpa"
    assert f"{str(dtype).removeprefix('torch.')} on {device}" in reason


def test_auto_minds_the_head_and_dropout(machine) -> None:
    machine(HOPPER, *FLASH)
    assert choose_attention("auto", "cuda", torch.bfloat16, 256)[0] == "flash_attention_3"
    assert choose_attention("auto", "cuda", torch.bfloat16, 60)[0] == "sdpa"
    assert choose_attention("auto", "cuda", torch.bfloat16, 64, dropout=0.1)[0] == "flash_attention_2"


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_what_always_runs_is_taken_as_asked(name: str) -> None:
    assert choose_attention(name, "cpu", torch.float32, 64) == (name, f"{name}, as asked for.")


def test_a_flash_kernel_that_runs_is_taken_as_asked(machine) -> None:
    machine(HOPPER, *FLASH)
    for name in FLASH:
        assert choose_attention(name, "cuda", torch.bfloat16, 64)[0] == name


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "capability", "installed", "message"),
    [
        ("flash_attention_2", "cuda", torch.bfloat16, 64, HOPPER, (), "flash-attn is not installed.*pip install"),
        ("flash_attention_3", "cuda", torch.bfloat16, 64, HOPPER, (), "flash-attn-3 is not installed"),
        ("flash_attention_4", "cuda", torch.bfloat16, 64, HOPPER, (), "flash-attn-4 is not installed"),
        ("flash_attention_2", "cpu", torch.bfloat16, 64, HOPPER, FLASH, "runs on CUDA devices and this is cpu"),
        ("flash_attention_2", "cuda", torch.float32, 64, HOPPER, FLASH, "not in float32.*bf16 mixed precision"),
        ("flash_attention_3", "cuda", torch.bfloat16, 64, AMPERE, FLASH, "capability 9.0 only.*has 8.0"),
        ("flash_attention_4", "cuda", torch.bfloat16, 64, AMPERE, FLASH, "capability 9.0 or later.*has 8.0"),
        ("flash_attention_2", "cuda", torch.bfloat16, 60, AMPERE, FLASH, "multiples of 8 up to 256 wide, not 60"),
    ],
)
def test_an_order_that_cannot_be_carried_out(
    machine, name, device, dtype, head_dim, capability, installed, message
) -> None:
    machine(capability, *installed)
    with pytest.raises(ValueError, match=message):
        choose_attention(name, device, dtype, head_dim)


def test_dropout_is_not_dropped_silently(machine) -> None:
    machine(HOPPER, *FLASH)
    with pytest.raises(ValueError, match=r"no attention dropout and attn_pdrop is 0\.1: set attn_pdrop to 0"):
        choose_attention("flash_attention_3", "cuda", torch.bfloat16, 64, dropout=0.1)


@pytest.mark.parametrize("name", ["", "flash", "flex_attention", "someone/kernel", "someone/flash_attention_2"])
def test_unknown_names_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(ValueError, match=", ".join(ATTENTION_NAMES)):
        choose_attention(name, "cpu", torch.float32, 64)


def test_every_name_but_auto_and_eager_is_transformers_own() -> None:
    assert set(ATTENTION_NAMES) - {"auto", "eager"} <= set(ALL_ATTENTION_FUNCTIONS.valid_keys())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eager_attention_is_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 5, 8, dtype=dtype)
    mask = torch.full((5, 5), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    output, weights = attention.eager_attention_forward(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3).transpose(1, 2)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=dtype), **close)
    assert weights.triu(1).abs().max() == 0


def test_full_precision_without_autocast_is_refused() -> None:
    query = torch.randn(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"fp16 or bf16 and got float32.*dtype=torch.bfloat16.*autocast.*sdpa"):
        attention.check_flash_dtype(query)
    attention.check_flash_dtype(query.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        attention.check_flash_dtype(query)
