"""torchao's int8 weights: GPT-2's own names and shapes, a quarter of the bytes, and the products of what is left."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel, TorchAoConfig

from modeling_gpt2flash import GPT2FlashForCausalLM
from modeling_gpt2flash.projection import Projection
from tests.tiny_gpt2 import make_pair, tokens

pytestmark = pytest.mark.integration
PROJECTIONS = r"re:transformer\.h\..*\.c_(attn|proj|fc)\.weight"
WIDE = {"n_embd": 96, "n_layer": 3}  # of the bytes, the projections have most


def int8() -> TorchAoConfig:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, PerRow

    return TorchAoConfig(FqnToConfig({PROJECTIONS: Int8WeightOnlyConfig(granularity=PerRow(0))}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    make_pair(folder, **WIDE)
    return folder


@pytest.fixture(scope="module")
def full(folder: Path) -> GPT2FlashForCausalLM:
    return GPT2FlashForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def quantized(folder: Path) -> GPT2FlashForCausalLM:
    return GPT2FlashForCausalLM.from_pretrained(folder, quantization_config=int8()).eval()


def projections(model: torch.nn.Module) -> dict[str, Projection]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Projection)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def test_every_projection_is_rounded_output_by_output(
    full: GPT2FlashForCausalLM, quantized: GPT2FlashForCausalLM
) -> None:
    from torchao.quantization import Int8Tensor

    assert list(quantized.state_dict()) == list(full.state_dict())
    assert len(projections(quantized)) == 4 * WIDE["n_layer"]
    for name, module in projections(quantized).items():
        weight, exact = module.weight, full.get_submodule(name).weight
        assert isinstance(weight, Int8Tensor)
        assert (weight.shape, weight.qdata.dtype) == (exact.shape, torch.int8)
        step = exact.abs().amax(dim=0) / 127.5
        assert ((weight.dequantize() - exact).abs() <= 0.51 * step).all(), name


def test_the_logits_are_those_of_the_rounded_weights(
    folder: Path, full: GPT2FlashForCausalLM, quantized: GPT2FlashForCausalLM
) -> None:
    rounded = GPT2FlashForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for name, module in projections(quantized).items():
            rounded.get_submodule(name).weight.copy_(module.weight.dequantize())
    found, expected = logits(quantized), logits(full)
    torch.testing.assert_close(found, logits(rounded), rtol=0, atol=1e-5)
    apart = (found - expected).norm() / expected.norm()
    assert 1e-4 < apart < 0.03
    written = [model.generate(tokens(), max_new_tokens=8, do_sample=False) for model in (quantized, rounded)]
    assert torch.equal(*written)


def test_the_folder_is_a_quarter_and_opens_again(
    full: GPT2FlashForCausalLM, quantized: GPT2FlashForCausalLM, tmp_path: Path
) -> None:
    for name, model in (("full", full), ("int8", quantized)):
        model.save_pretrained(tmp_path / name)
    bytes_of = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "int8")}
    assert bytes_of["int8"] < 0.35 * bytes_of["full"]
    again = GPT2FlashForCausalLM.from_pretrained(tmp_path / "int8").eval()
    assert torch.equal(logits(again), logits(quantized))


def test_what_is_not_quantized_trains_on_top(quantized: GPT2FlashForCausalLM, full: GPT2FlashForCausalLM) -> None:
    ids = tokens()
    for model in (quantized, full):
        model.zero_grad()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("ln_" in name)
        model(ids, labels=ids, skip_logits=True).loss.backward()
    for name, parameter in quantized.named_parameters():
        if "ln_" in name:
            expected = full.get_parameter(name).grad
            assert (parameter.grad - expected).norm() < 0.1 * expected.norm(), name


def test_the_head_too(folder: Path, full: GPT2FlashForCausalLM) -> None:
    """What torchao does unasked: of a GPT-2's layers it knows the head, as the one nn.Linear."""
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

    model = GPT2FlashForCausalLM.from_pretrained(folder)
    quantize_(model, Int8WeightOnlyConfig())
    assert isinstance(model.lm_head.weight, Int8Tensor)
    assert not any(isinstance(module.weight, Int8Tensor) for module in projections(model).values())
    ids = tokens()
    loss = full(ids, labels=ids).loss.item()
    assert model.eval()(ids, labels=ids, skip_logits=True).loss.item() == pytest.approx(loss, rel=0.01)


def test_stock_gpt2_cannot(folder: Path) -> None:
    """The day it can, docs/integrations.md has a sentence too many."""
    stock = GPT2LMHeadModel.from_pretrained(folder, quantization_config=int8()).eval()
    with pytest.raises(NotImplementedError, match="addmm"):
        logits(stock)
