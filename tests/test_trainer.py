"""transformers' Trainer on our model: losses, gradients and weights are those of plain steps on rows by themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from tests.conftest import torchrun
from tests.tiny_gpt2 import NO_DROPOUT, make_ours, make_pair, sgd_losses, tokens
from train.data.tokenizer import gpt2_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

LEARNING_RATE = 0.2
PROMPTS = ((12, 1), (5, 2), (9, 6), (12, 4))  # tokens of a row, and how many of them are no targets: 11, 3, 3, 8 are


def rows() -> list[dict[str, list[int]]]:
    """Rows of unequal lengths and numbers of targets."""
    made = []
    for seed, (length, prompt) in enumerate(PROMPTS):
        ids = tokens(1, length, seed=seed)[0].tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def padded(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    ids, labels = ([torch.tensor(row[name]) for row in batch] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


COLLATORS = {
    "padded": padded,
    "in one row": DataCollatorWithFlattening(),
    "with bounds": DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
}


def mean_loss(model: nn.Module, data: list[dict[str, list[int]]], smoothing: float = 0.0) -> Tensor:
    """Over all targets of the rows, each of which the model sees alone."""
    logits, targets = [], []
    for row in data:
        logits.append(model(torch.tensor([row["input_ids"]])).logits[0, :-1])
        targets.append(torch.tensor(row["labels"][1:]))
    return F.cross_entropy(torch.cat(logits), torch.cat(targets), label_smoothing=smoothing)


def plain_steps(model: nn.Module, data: list[dict[str, list[int]]]) -> list[float]:
    """The losses of three steps of SGD."""
    return sgd_losses(model, lambda: mean_loss(model, data), 3, LEARNING_RATE)


def settings(folder: Path, **own: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        **{
            "max_steps": 3,
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "per_device_train_batch_size": len(PROMPTS),
            "per_device_eval_batch_size": len(PROMPTS),
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        }
        | own,
    )


def logged(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS)
@pytest.mark.parametrize(("rows_at_once", "recompute"), [(4, False), (2, True), (1, False)])
def test_accumulated_micro_batches_are_one_batch(
    tmp_path: Path, collator: Any, rows_at_once: int, recompute: bool
) -> None:
    stock, ours = make_pair(tmp_path)
    ours.config.loss_chunk_size = 5
    data = rows()
    expected = plain_steps(stock, data)

    accumulation = {
        "per_device_train_batch_size": rows_at_once,
        "gradient_accumulation_steps": len(data) // rows_at_once,
        "gradient_checkpointing": recompute,
    }
    trainer = Trainer(ours, settings(tmp_path, **accumulation), collator, train_dataset=data)
    trainer.train()
    assert logged(trainer) == pytest.approx(expected, rel=1e-5)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, stock.get_parameter(name), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_processes_share_the_rows_out(tmp_path: Path) -> None:
    stock, _ = make_pair(tmp_path / "stock")
    (tmp_path / "train_in_two.py").write_text("""
import json, sys
from pathlib import Path
from transformers import Trainer
from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.test_trainer import logged, padded, rows, settings

folder = Path(sys.argv[1])
model = GPT2FlashForCausalLM.from_pretrained(folder / "stock")
own = settings(folder, per_device_train_batch_size=1, gradient_accumulation_steps=2, ddp_backend="gloo")
trainer = Trainer(model, own, padded, train_dataset=rows())
assert own.world_size == 2
trainer.train()
trainer.save_model(folder / "trained")
if trainer.is_world_process_zero():
    (folder / "losses.json").write_text(json.dumps(logged(trainer)))
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()  # or gloo's threads, of the process that is done first, end in an abort
""")
    torchrun(tmp_path / "train_in_two.py", tmp_path, cwd=tmp_path)
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(plain_steps(stock, rows()), rel=1e-5)
    for name, parameter in GPT2LMHeadModel.from_pretrained(tmp_path / "trained").named_parameters():
        torch.testing.assert_close(parameter, stock.get_parameter(name), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("collator", COLLATORS.values(), ids=COLLATORS)
def test_evaluation_gives_the_loss(tmp_path: Path, collator: Any) -> None:
    stock, ours = make_pair(tmp_path)
    evaluated = Trainer(ours, settings(tmp_path), collator, eval_dataset=rows()).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(mean_loss(stock, rows()).item(), rel=1e-5)


def test_metrics_are_computed_from_the_logits(tmp_path: Path) -> None:
    stock, ours = make_pair(tmp_path)
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"right": float(right.sum())}

    trainer = Trainer(ours, settings(tmp_path), padded, eval_dataset=rows(), compute_metrics=metrics)
    assert trainer.evaluate().keys() >= {"eval_loss", "eval_right"}
    batch = padded(rows())
    assert torch.equal(torch.from_numpy(seen[0].label_ids), batch.pop("labels"))
    expected = stock(**batch).logits.detach()
    tokens_only = batch["attention_mask"].bool()  # at padding there is nothing to agree on
    assert torch.equal(torch.from_numpy(seen[0].predictions)[tokens_only], expected[tokens_only])


def test_smoothed_labels_are_shifted(tmp_path: Path) -> None:
    stock, ours = make_pair(tmp_path)
    one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    smoothed = settings(tmp_path, max_steps=1, label_smoothing_factor=0.2, **one_by_one)
    trainer = Trainer(ours, smoothed, padded, train_dataset=rows())
    trainer.train()
    assert logged(trainer) == pytest.approx([mean_loss(stock, rows(), smoothing=0.2).item()], rel=1e-5)


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    dropped = dict.fromkeys(NO_DROPOUT, 0.2)
    often = {
        "max_steps": 4,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,  # in the midst of an epoch of 2
    }
    ends = []
    for start in (None, str(tmp_path / "checkpoint-3")):
        ours = make_ours(**dropped)
        trainer = Trainer(ours, settings(tmp_path, **often), padded, train_dataset=rows(), eval_dataset=rows())
        trainer.train(resume_from_checkpoint=start)
        ends.append((ours.eval(), logged(trainer)))
    (whole, losses), (resumed, losses_again) = ends
    assert len(set(losses)) == 4
    assert losses_again == losses
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name

    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert torch.equal(saved(tokens()).logits, whole(tokens()).logits)


def test_the_best_checkpoint_is_found_by_its_loss(tmp_path: Path) -> None:
    ours = make_ours()
    too_fast = {
        "max_steps": 2,
        "learning_rate": 100.0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    trainer = Trainer(ours, settings(tmp_path, **too_fast), padded, train_dataset=rows(), eval_dataset=rows())
    trainer.train()
    figures = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min((1, 2), key=lambda step: figures[step])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(figures[best])


def test_a_folder_with_our_tokenizer_trains_on_text(tmp_path: Path) -> None:
    make_ours(vocab_size=50257, bos_token_id=50256, eos_token_id=50256).save_pretrained(tmp_path / "model")
    gpt2_tokenizer(32).save_pretrained(tmp_path / "model")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = ["import os", "def f(x):\n    return x", "class A:\n    pass", "x = 1"]
    data = [tokenizer(text) for text in texts]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, settings(tmp_path, max_steps=2), collator, train_dataset=data)
    trainer.train()
    losses = logged(trainer)
    assert losses[1] < losses[0]
