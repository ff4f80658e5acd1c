"""TRL's SFTTrainer on our model: packed sequences do not see each other, and steps are plain ones on each alone."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import command
from tests.tiny_gpt2 import make_pair, sgd_losses
from train.checkpoints.loading import own_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SIZES = {"vocab_size": 300, "n_positions": 64}
MAX_LENGTH = 48
LEARNING_RATE = 0.05
TEXTS = [f"x{n} = {'y' * n}\n" for n in range(1, 9)]  # 7 to 14 tokens each, in two rows when packed


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    """TRL reports each trainer to its makers unless the Hub is off, which was asked before conftest could say so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def tokenizer(tuned_from: Path) -> PreTrainedTokenizerBase:
    found = own_tokenizer(str(tuned_from), n_positions=64)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def documents(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The texts as TRL trains on them: each with an end."""
    return [tokenizer(text + tokenizer.eos_token).input_ids for text in TEXTS]


def make_trainer(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, own: dict, **more: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        str(folder / "out"),
        **{
            "packing": True,
            "max_length": MAX_LENGTH,
            "max_steps": 4,
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        }
        | own,
    )
    data = Dataset.from_dict({"text": TEXTS})
    return SFTTrainer(model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer, **more)


def mean_loss(model: nn.Module, documents: list[list[int]]) -> torch.Tensor:
    """Over all tokens but each document's first, each document seen alone."""
    rows = [torch.tensor(ids) for ids in documents]
    logits = torch.cat([model(row[None]).logits[0, :-1] for row in rows])
    return F.cross_entropy(logits, torch.cat([row[1:] for row in rows]))


def logged(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_packed_sequences_do_not_see_each_other(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, documents: list[list[int]]
) -> None:
    _, ours = make_pair(tmp_path, **SIZES)
    trainer = make_trainer(tmp_path, ours, tokenizer, {"per_device_train_batch_size": 2})
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch.pop("labels")
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert batch["input_ids"].shape[0] == 1
    assert len(starts) == len(TEXTS)
    assert (labels[0, starts] == -100).all()

    logits = ours.eval()(**batch).logits[0]
    for start, stop in zip(starts, [*starts[1:], len(logits)], strict=True):
        document = batch["input_ids"][:, start:stop]
        assert document[0].tolist() in documents
        torch.testing.assert_close(logits[start:stop], ours(document).logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_steps_are_those_of_documents_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, documents: list[list[int]], packing: bool
) -> None:
    stock, ours = make_pair(tmp_path, **SIZES)
    expected = sgd_losses(stock, lambda: mean_loss(stock, documents), 4, LEARNING_RATE)

    # All documents in each step, so that their order is nothing.
    rows = 2 if packing else len(TEXTS)
    batches = {"packing": packing, "per_device_train_batch_size": rows // 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, ours, tokenizer, batches)
    assert len(trainer.train_dataset) == rows
    trainer.train()
    assert logged(trainer) == pytest.approx(expected, rel=1e-4)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, stock.get_parameter(name), rtol=1e-3, atol=1e-4, msg=name)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_loss(stock, documents).item(), rel=1e-3)


def test_an_adapter_on_a_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from peft import LoraConfig, PeftModel

    _, ours = make_pair(tmp_path, **SIZES)
    ours.save_pretrained(tmp_path / "ours")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=4)
    faster = {"learning_rate": 1e-2, "optim": "adamw_torch", "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, str(tmp_path / "ours"), tokenizer, faster, peft_config=lora)
    assert type(trainer.model.get_base_model()) is GPT2FlashForCausalLM
    trainer.train()
    losses = logged(trainer)
    assert losses[-1] < losses[0]
    trainer.save_model(tmp_path / "adapter")

    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    loaded = PeftModel.from_pretrained(ours, tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)


def test_the_copy_of_the_hub(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, ours = make_pair(tmp_path, **SIZES)
    for saved in (ours, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    program = f"""
import sys
sys.modules["modeling_gpt2flash"] = None  # not installed
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
settings = SFTConfig(
    "out", packing=True, max_length={MAX_LENGTH}, max_steps=1, logging_steps=1, trust_remote_code=True, bf16=False,
    use_cpu=True, report_to=[], save_strategy="no",
)
trainer = SFTTrainer("model", settings, train_dataset=Dataset.from_dict({{"text": {TEXTS}}}))
assert type(trainer.model).__module__.startswith("transformers_modules.model."), type(trainer.model)
trainer.train()
print(trainer.state.log_history[0]["loss"])
"""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", "")
    done = command(sys.executable, "-c", program, cwd=tmp_path)
    assert float(done.stdout.split()[-1]) == pytest.approx(mean_loss(stock, documents).item(), rel=1e-4)
