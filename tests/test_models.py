"""Training that starts from weights: whose tokenizer, which learning rate, and from where."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from tests.conftest import losses, python
from train.checkpoints.loading import load_for_inference, own_tokenizer, pretrained_arguments
from train.config.run_config import parse
from train.data.token_file import write_token_file
from train.data.tokenizer import gpt2_tokenizer
from train.run.setup import ResolvedRun, resolve
from train.utils.errors import UserError


def resolved(flags: list[str], *more: str) -> ResolvedRun:
    return resolve(parse([*(flag for flag in flags if not flag.startswith("--learning_rate")), *more]))


def test_weights_are_tuned_at_a_lower_rate_than_fresh_ones(flags: list[str]) -> None:
    assert resolved(flags, "--model=tiny").config.learning_rate == 6e-4
    assert resolved(flags).config.learning_rate == 5e-5
    assert resolved(flags, "--learning_rate=1e-3").config.learning_rate == 1e-3


def test_weights_bring_their_tokenizer(flags: list[str], tuned_from: Path) -> None:
    data = [f"--{split}_data_path={tuned_from}/train.bin" for split in ("train", "val")]
    tokenizer = resolved(flags, f"--model={tuned_from}", *data).tokenizer
    assert tokenizer is not None
    assert (len(tokenizer), tokenizer.pad_token, tokenizer.model_max_length) == (300, "<|endoftext|>", 64)


def test_where_there_is_none_it_is_gpt2s(flags: list[str], small_model: Path) -> None:
    assert own_tokenizer(str(small_model), 64) is None
    tokenizer = resolved(flags).tokenizer
    assert tokenizer is not None
    assert tokenizer.get_vocab() == gpt2_tokenizer().get_vocab()


def test_a_damaged_tokenizer_is_a_sentence(tuned_from: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned_from, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        own_tokenizer(str(tmp_path / "model"), 64)


def test_data_of_another_tokenizer_is_refused(flags: list[str], tuned_from: Path, tmp_path: Path) -> None:
    gpt2s = write_of(tmp_path / "train.bin", {"tokenizer": "gpt2"})
    with pytest.raises(UserError, match=r"train\.bin: holds GPT-2's tokens, and .* has a tokenizer of its own"):
        resolved(flags, f"--model={tuned_from}", gpt2s)
    resolved(
        flags,
        f"--model={tuned_from}",
        write_of(tmp_path / "others.bin", {"tokenizer": "its own"}),
        f"--val_data_path={tuned_from}/train.bin",
    )


def write_of(path: Path, says: dict[str, str]) -> str:
    write_token_file(path, [(np.arange(200) % 100, 1)], 300, says)
    return f"--train_data_path={path}"


def test_a_hub_id_may_be_pinned(tmp_path: Path) -> None:
    assert pretrained_arguments("owner/name") == {"pretrained_model_name_or_path": "owner/name"}
    assert pretrained_arguments("owner/name@1a2b") == {
        "pretrained_model_name_or_path": "owner/name",
        "revision": "1a2b",
    }
    (tmp_path / "a@b").mkdir()
    assert pretrained_arguments(f"{tmp_path}/a@b") == {"pretrained_model_name_or_path": f"{tmp_path}/a@b"}


def test_missing_weights_are_refused_and_foreign_ones_reported(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_model, tmp_path / "model")
    weights = load_file(small_model / "model.safetensors")
    save_file(weights | {"score.weight": torch.ones(2)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    load_for_inference(tmp_path / "model")
    assert capsys.readouterr().err.endswith("ignoring 1 tensors that GPT-2 does not have, score.weight first\n")
    weights.pop("transformer.h.0.attn.c_attn.weight")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^--checkpoint .*: 1 weights are missing, transformer\.h\.0\.attn\.c_attn"):
        load_for_inference(tmp_path / "model")


@pytest.mark.slow
def test_tuning_from_a_hub_id(
    flags: list[str], tuned_from: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of the Hub's cache, laid here by hand: the weights move a little, the tokenizer stays."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tuned_from, tmp_path / "models--owner--name" / "snapshots" / revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    own = [f"--{split}_data_path={tuned_from}/train.bin" for split in ("train", "val")]
    own += [f"--model=owner/name@{revision}", "--max_steps=2", f"--checkpoint_path={tmp_path}/tuned"]
    rate = [flag for flag in flags if not flag.startswith("--learning_rate")]
    python("-m", "train", *rate, *own, cwd=tmp_path)
    run = tmp_path / "tuned" / "baseline"
    summary = json.loads((run / "metrics.json").read_text())
    assert summary["config"]["learning_rate"] == 5e-5
    assert summary["sample"]["text"].startswith("def ")
    stock = GPT2LMHeadModel.from_pretrained(tuned_from)
    assert len(losses(run)) == 2
    assert losses(run)[0] == pytest.approx(np.log(300), abs=0.5)
    before, after = AutoTokenizer.from_pretrained(tuned_from), AutoTokenizer.from_pretrained(run)
    text = "import os\n" * 3
    assert after(text).input_ids == before(text).input_ids
    assert after.pad_token == "<|endoftext|>"
    tuned = GPT2LMHeadModel.from_pretrained(run)
    for name, parameter in stock.named_parameters():
        # AdamW's steps are of the learning rate's size: the weights are the old ones, moved a little.
        torch.testing.assert_close(tuned.get_parameter(name), parameter, rtol=0, atol=3e-4)
