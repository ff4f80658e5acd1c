"""PEFT's LoRA on our model: trained, saved, put on the model again, merged; stock GPT-2 takes the same adapter."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import command
from tests.tiny_gpt2 import make_ours, make_pair, tokens

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

TARGETS = {
    "attention": ["c_attn"],  # what PEFT takes for GPT-2
    "every matrix": "all-linear",
    "head": ["c_attn", "lm_head"],
    "embeddings": ["c_attn", "wte"],
}


def adapt(model: Any, targets: Any, **own: Any) -> Any:
    """The model with a LoRA that changes its outputs from the start."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4, init_lora_weights=False, **own)
    return get_peft_model(model, config)


def train(model: Any, steps: int = 3) -> list[float]:
    """The losses of some steps on one batch; the model is in evaluation mode afterwards."""
    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.1)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(seed=2)).logits


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_trained_saved_loaded_and_merged(tmp_path: Path, targets: Any) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel

    stock, ours = make_pair(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    ours = GPT2FlashForCausalLM.from_pretrained(tmp_path / "ours").eval()
    before = logits(ours)
    adapted = adapt(ours, targets)
    losses = train(adapted)
    assert losses[2] < losses[0]
    expected = logits(adapted)
    assert not torch.allclose(expected, before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before), "the model itself has not changed"

    adapted.save_pretrained(tmp_path / "adapter")
    bare = GPT2FlashForCausalLM.from_pretrained(tmp_path / "ours")
    bare.load_adapter(str(tmp_path / "adapter"))  # transformers' own way
    for loaded in (
        PeftModel.from_pretrained(GPT2FlashForCausalLM.from_pretrained(tmp_path / "ours"), tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        bare,
        PeftModel.from_pretrained(stock, tmp_path / "adapter"),
    ):
        assert torch.equal(logits(loaded.eval()), expected)

    if targets == TARGETS["head"] or targets == TARGETS["embeddings"]:
        return  # one of two tied weights would be merged: PEFT itself says not to
    merged = adapted.merge_and_unload()
    assert type(merged) is GPT2FlashForCausalLM
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    for cls in (AutoModelForCausalLM, GPT2LMHeadModel):
        assert torch.equal(logits(cls.from_pretrained(tmp_path / "merged").eval()), logits(merged))


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_the_training_loss_is_that_of_the_adapted_logits(targets: Any) -> None:
    adapted = adapt(make_ours(loss_chunk_size=5), targets)
    ids = tokens()
    expected = F.cross_entropy(adapted(input_ids=ids).logits[:, :-1].reshape(-1, 61), ids[:, 1:].reshape(-1))
    wanted = torch.autograd.grad(expected, [each for each in adapted.parameters() if each.requires_grad])
    out = adapted.train()(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.loss, expected)
    got = torch.autograd.grad(out.loss, [each for each in adapted.parameters() if each.requires_grad])
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_targets_that_are_documented() -> None:
    adapted = adapt(make_ours(), "all-linear")
    chosen = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    base = make_ours()
    assert chosen == {
        f"base_model.model.{name}" for name, module in base.named_modules() if isinstance(module, Conv1D)
    }
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        adapt(make_ours(), None)


def test_the_copy_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_ours().save_pretrained(tmp_path / "model")
    program = """
import sys, torch
sys.modules["modeling_gpt2flash"] = None  # not installed
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
ids = torch.arange(1, 11)[None]
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.model.")
adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], init_lora_weights=False))
optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], 0.1)
losses = []
for _ in range(3):
    loss = adapted.train()(input_ids=ids, labels=ids).loss
    losses.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[2] < losses[0], losses
expected = adapted.eval()(input_ids=ids).logits
adapted.save_pretrained("adapter")
loaded = AutoPeftModelForCausalLM.from_pretrained("adapter", trust_remote_code=True).eval()
assert torch.equal(loaded(input_ids=ids).logits, expected)
merged = loaded.merge_and_unload()
assert type(merged) is type(model)
torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
merged.save_pretrained("merged")
again = AutoModelForCausalLM.from_pretrained("merged", trust_remote_code=True).eval()
assert torch.equal(again(ids).logits, merged(ids).logits)
"""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", "")
    command(sys.executable, "-c", program, cwd=tmp_path)
