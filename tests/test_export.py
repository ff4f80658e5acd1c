"""Checkpoints as plain GPT-2 and as ONNX."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from tests.conftest import ROOT
from tests.tiny_gpt2 import make_ours
from train.checkpoints.loading import load_for_inference
from train.export import __main__ as export
from train.utils.errors import UserError

IDS = torch.arange(1, 31)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_transformers_own_gpt2_opens_it(finished: Path, tmp_path: Path, dtype: str, capsys) -> None:
    export.main([str(finished), str(tmp_path / "out"), "--dtype", dtype])
    printed = capsys.readouterr().out
    assert ("rounding to" in printed) == (dtype != "float32")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["n_ctx"]) == ("gpt2", ["GPT2LMHeadModel"], 64)
    assert not config.keys() & {"auto_map", "loss_chunk_size"}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock) is GPT2LMHeadModel
    assert (stock.dtype, stock.generation_config.eos_token_id) == (getattr(torch, dtype), 50256)
    ours = load_for_inference(finished, "float32", device="cpu").to(stock.dtype).float()
    torch.testing.assert_close(logits(stock.float()), logits(ours), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hello world").input_ids == [15496, 995]


def test_every_setting_of_the_model_is_kept(tmp_path: Path) -> None:
    ours = make_ours(scale_attn_by_inverse_layer_idx=True, n_inner=40, activation_function="relu", resid_pdrop=0.2)
    ours.save_pretrained(tmp_path / "ours")
    export.main([str(tmp_path / "ours"), str(tmp_path / "out")])
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock), logits(ours), rtol=0, atol=1e-5)
    assert stock.config.resid_pdrop == 0.2
    assert not (tmp_path / "out" / "tokenizer.json").exists(), "its 61 tokens are not GPT-2's"


def test_the_models_own_tokenizer_is_exported(tuned_from: Path, tmp_path: Path) -> None:
    export.main([str(tuned_from), str(tmp_path / "out")])
    text = "import os\n"
    there, here = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", tuned_from))
    assert there(text).input_ids == here(text).input_ids


def test_an_export_that_computes_something_else_is_deleted(finished: Path, tmp_path: Path, monkeypatch) -> None:
    save = GPT2LMHeadModel.save_pretrained

    def damaged(self: GPT2LMHeadModel, folder: Path, **options) -> None:
        with torch.no_grad():
            self.transformer.h[0].mlp.c_fc.weight.add_(1e-2)
        save(self, folder, **options)

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", damaged)
    with pytest.raises(RuntimeError, match="gives different results"):
        export.main([str(finished), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_any_other_refused(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export.main([str(finished / "step-4"), str(out)])
    assert (out / "model.safetensors").exists()
    with pytest.raises(UserError, match="is already there"):
        export.main([str(finished), str(out)])
    with pytest.raises(UserError, match="is already there"):
        export.main([str(finished), str(out / "config.json")])


def test_what_a_dtype_cannot_hold_is_refused(finished: Path, tmp_path: Path) -> None:
    ours = load_for_inference(finished, "float32", device="cpu")
    with torch.no_grad():
        ours.transformer.wte.weight[0, 0] = 1e5
    ours.save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match=r"--dtype float16: transformer\.wte\.weight"):
        export.main([str(tmp_path / "ours"), str(tmp_path / "out"), "--dtype", "float16"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [("nothing", "there is no such folder"), (".", r"has no config\.json"), ("gpt3.pt", "there is no such file")],
)
def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path, monkeypatch, checkpoint: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        export.main([checkpoint, "out"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_onnx_runtime_computes_the_same(finished: Path, tmp_path: Path, capsys) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from train.export.onnx_graph import run

    export.main([str(finished), str(tmp_path / "out"), "--format", "onnx"])
    ours = load_for_inference(finished, "float32", device="cpu")
    for rows, length, padding in ((1, 1, 0), (1, 64, 0), (3, 17, 5)):
        ids = torch.randint(50257, (rows, length), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        with torch.no_grad():
            expected = ours(ids, attention_mask=mask).logits
        found = run(tmp_path / "out" / "model.onnx", ids, mask)
        torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 50256


def test_onnx_without_its_packages_or_in_another_dtype_is_a_sentence(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(finished), str(tmp_path / "out"), "--format", "onnx"]
    monkeypatch.setattr("train.export.onnx_graph.PACKAGES", ("onyx",))
    with pytest.raises(UserError, match=r"needs onyx; pip install 'gpt2flash\[onnx\]'"):
        export.main(words)
    monkeypatch.setattr("train.export.onnx_graph.PACKAGES", ())
    with pytest.raises(UserError, match="--dtype float16: the graph is fp32"):
        export.main([*words, "--dtype", "float16"])


def test_what_a_killed_export_leaves_is_removed_by_the_next(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "[out]"  # brackets, which a pattern of file names takes for a set of characters
    with subprocess.Popen([sys.executable, "-m", "train.export", str(finished), str(out)], cwd=ROOT) as killed:
        while not list(tmp_path.iterdir()):
            assert killed.poll() is None
            time.sleep(0.001)
        killed.kill()
    (leftover,) = tmp_path.iterdir()
    assert leftover.suffix == ".tmp"
    export.main([str(finished), str(out)])
    assert list(tmp_path.iterdir()) == [out]
