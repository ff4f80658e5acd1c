"""Which kernel is chosen, and what is said when it cannot be had."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_gpt2flash import ATTENTION_NAMES, GPT2FlashConfig, GPT2FlashForCausalLM, attention, choose_attention
from tests.flash_stubs import FLASH, install, make_flash
from tests.tiny_gpt2 import TINY, gradients, make_ours, pad, tokens

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
    assert choose_attention(name, "cpu", torch.float32, 64) == (name, f"{name}, as requested.")


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


# ---- in the model ----


def test_names_from_a_folder_choose_no_code(tmp_path: Path) -> None:
    make_ours().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        (tmp_path / "config.json").write_text(json.dumps(fields | {key: "someone/kernel"}))
        with pytest.raises(ValueError, match=r'^Specified `attn_implementation="someone/kernel"` is not'):
            GPT2FlashForCausalLM.from_pretrained(tmp_path)


def test_kernels_of_this_process_are_taken(tmp_path: Path) -> None:
    """With whatever arguments they take."""
    passed: list[dict[str, Any]] = []

    def kernel(module: torch.nn.Module, query: torch.Tensor, *others: Any, **arguments: Any) -> Any:
        passed.append(arguments)
        return sdpa_attention_forward(module, query, *others, **arguments)

    ids = tokens()
    expected = make_ours()(ids).logits
    make_ours().save_pretrained(tmp_path)
    AttentionInterface.register("counting", kernel)
    AttentionMaskInterface.register("counting", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        ours = GPT2FlashForCausalLM.from_pretrained(tmp_path, attn_implementation="counting").eval()
        torch.testing.assert_close(ours(ids, own_argument=3).logits, expected)
        assert passed[-1]["own_argument"] == 3
    finally:
        del AttentionInterface._global_mapping["counting"]
        del AttentionMaskInterface._global_mapping["counting"]
    with pytest.raises(ValueError, match='attn_implementation="counting"` is not supported'):
        GPT2FlashForCausalLM.from_pretrained(tmp_path, attn_implementation="counting")


def test_auto_is_understood_when_loading(tmp_path: Path) -> None:
    make_ours().save_pretrained(tmp_path)
    if not torch.cuda.is_available():
        loaded = GPT2FlashForCausalLM.from_pretrained(tmp_path, attn_implementation="auto")
        assert loaded.config._attn_implementation == "sdpa"
    built = AutoModelForCausalLM.from_config(GPT2FlashConfig(**TINY), attn_implementation="auto")
    assert built.config._attn_implementation == "sdpa"  # fp32 weights
    built.set_attn_implementation("eager")
    built.set_attn_implementation("auto")
    assert built.config._attn_implementation == "sdpa"


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> GPT2FlashForCausalLM:
    """A model on FlashAttention's code path, with dense attention where the kernel would be."""
    calls = install(monkeypatch)
    ours = make_flash("flash_attention_3")
    ours.kernel_calls = calls
    return ours


def test_flash_without_padding(flash: GPT2FlashForCausalLM) -> None:
    ids, reference = tokens(), make_ours().bfloat16()
    expected = reference(ids).logits
    torch.testing.assert_close(flash.bfloat16()(ids).logits, expected, rtol=3e-2, atol=3e-2)
    assert [call.name for call in flash.kernel_calls] == ["three"] * 2  # one a layer
    cache = flash(ids[:, :9], use_cache=True).past_key_values
    torch.testing.assert_close(flash(ids[:, 9:], past_key_values=cache).logits, expected[:, 9:], rtol=3e-2, atol=5e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_with_padding(flash: GPT2FlashForCausalLM, side: str) -> None:
    ids, mask = pad(tokens(3), [0, 4, 9], side)
    with torch.autocast("cpu", torch.bfloat16):
        expected = make_ours()(ids, attention_mask=mask).logits
        got = flash(ids, attention_mask=mask).logits
    assert [call.name for call in flash.kernel_calls] == ["three_varlen"] * 2
    torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=3e-2, atol=5e-2)


def test_flash_trains_under_autocast(flash: GPT2FlashForCausalLM) -> None:
    ids, reference = tokens(), make_ours().train()
    flash.train()
    for model in (flash, reference):
        with torch.autocast("cpu", torch.bfloat16):
            model(ids, labels=ids).loss.backward()
    for name, gradient in gradients(flash).items():
        scale = reference.get_parameter(name).grad.abs().max().item()
        torch.testing.assert_close(gradient, reference.get_parameter(name).grad, rtol=0, atol=0.05 * scale + 1e-4)


def test_flash_in_full_precision_gets_a_sentence(flash: GPT2FlashForCausalLM) -> None:
    with pytest.raises(ValueError, match="fp16 or bf16 and got float32"):
        flash(tokens())


# ---- on a GPU ----

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("padded", [False, True])
def test_flash_is_as_near_to_fp32_as_sdpa(kernel: str, padded: bool) -> None:
    try:
        choose_attention(kernel, "cuda", torch.bfloat16, 32)
    except ValueError as error:
        pytest.skip(str(error))
    sizes = {"n_embd": 128, "n_head": 4, "n_positions": 256}
    ids = tokens(4, 200).cuda()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :50], mask[2, :120] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    results = {}
    for name, dtype in (("exact", torch.float32), ("sdpa", torch.bfloat16), (kernel, torch.bfloat16)):
        model = make_ours(**sizes, attn_implementation="sdpa" if name == "exact" else name).cuda().train()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            out = model(ids, attention_mask=mask, labels=labels, skip_logits=False)
        out.loss.backward()
        results[name] = [out.logits[mask == 1].float(), *gradients(model).values()]
    for exact, sdpa, ours in zip(results["exact"], results["sdpa"], results[kernel], strict=True):
        assert (ours - exact).abs().max() <= 2 * (sdpa - exact).abs().max() + 1e-5
