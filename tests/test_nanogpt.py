"""nanoGPT's checkpoints, held against a reading of the format that knows nothing of ours."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import losses, train
from tests.test_benchmark_train_step import STAND_IN
from train.checkpoints import nanogpt
from train.checkpoints.loading import load_for_inference
from train.data.tokenizer import gpt2_vocab_and_merges
from train.export import __main__ as export
from train.utils.errors import UserError

CHECKOUT = os.environ.get("NANOGPT")


@pytest.fixture(scope="module")
def stand_in() -> dict:
    names: dict = {"__name__": "nanogpt_stand_in"}
    sys.modules["nanogpt_stand_in"] = type(sys)("nanogpt_stand_in")  # where dataclasses look their module up
    exec(STAND_IN, names)
    del sys.modules["nanogpt_stand_in"]
    return names


def open_as_nanogpt(file: Path, stand_in: dict) -> tuple[dict, torch.nn.Module, torch.optim.AdamW]:
    """What `train.py --init_from=resume` makes of a checkpoint."""
    content = torch.load(file, weights_only=True)
    known = {key: value for key, value in content["model_args"].items() if key not in ("bias", "dropout")}
    model = stand_in["GPT"](stand_in["GPTConfig"](**known))
    model.load_state_dict(content["model"])
    optimizer = model.configure_optimizers(0.5, 1.0, (0.5, 0.5), "cpu")  # all of it comes out of the checkpoint
    optimizer.load_state_dict(content["optimizer"])
    return content, model, optimizer


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nanogpt") / "out"
    export.main([str(finished), str(folder), "--format", "nanogpt"])
    return folder / "ckpt.pt"


def test_a_checkpoint_is_as_nanogpt_writes_it(exported: Path, finished: Path, stand_in: dict) -> None:
    content, model, _ = open_as_nanogpt(exported, stand_in)
    assert content.keys() == {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert content["model_args"] == {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64, "vocab_size": 50257, "bias": True, "dropout": 0.0,
    }  # fmt: skip
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert content["iter_num"] == 8
    assert content["best_val_loss"] == min(record["val_loss"] for record in records if "val_loss" in record)
    assert (content["config"]["batch_size"], content["config"]["learning_rate"]) == (4, 1e-2)
    assert content["model"].keys() == model.state_dict().keys()
    ours = load_for_inference(finished, "float32", device="cpu")
    ours.config.activation_function = "gelu"
    for block in ours.transformer.h:
        block.mlp.act = torch.nn.GELU()  # exact, as nanoGPT has it
    ids = torch.randint(50257, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, _ = model(ids, ids)
        torch.testing.assert_close(logits, ours(ids).logits, rtol=0, atol=1e-5)


def test_the_optimizer_resumes_as_ours_would(exported: Path, finished: Path, stand_in: dict) -> None:
    from safetensors.torch import load_file

    _, model, optimizer = open_as_nanogpt(exported, stand_in)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all((group["lr"], group["betas"]) == (1e-2, (0.9, 0.95)) for group in optimizer.param_groups)
    moments = load_file(finished / "step-8" / "optimizer.safetensors")
    assert len(optimizer.state) == len(moments) / 2 == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 8
        for key in ("exp_avg", "exp_avg_sq"):
            kept = moments[f"{key}.{name}"]
            turned = "h." in name and kept.dim() == 2
            assert torch.equal(state[key], kept.T if turned else kept)


@pytest.mark.parametrize("bias", [True, False])
def test_there_and_back(exported: Path, finished: Path, tmp_path: Path, bias: bool) -> None:
    content = torch.load(exported, weights_only=True)
    file = tmp_path / "ckpt.pt"
    if not bias:  # as nanoGPT's default is, and compiled, which prefixes the names
        weights = {f"_orig_mod.{name}": value for name, value in content["model"].items() if "bias" not in name}
        content |= {"model": weights, "model_args": {**content["model_args"], "bias": False}}
    torch.save(content, file)
    export.main([str(file), str(tmp_path / "gpt2")])
    again = load_for_inference(tmp_path / "gpt2", "float32", device="cpu")
    assert again.config.activation_function == "gelu"
    for name, parameter in load_for_inference(finished, "float32", device="cpu").named_parameters():
        found = again.get_parameter(name)
        assert torch.equal(found, parameter if bias or "bias" not in name else torch.zeros_like(parameter)), name


@pytest.mark.slow
def test_training_starts_from_a_checkpoint(exported: Path, flags: list[str], stand_in: dict, tmp_path: Path) -> None:
    from train.data.batches import TrainBatches
    from train.data.token_file import open_tokens

    data = next(flag.split("=")[1] for flag in flags if flag.startswith("--train_data_path"))
    start = [*flags, f"--model={exported}", "--max_steps=2", f"--checkpoint_path={tmp_path}"]
    train(*start, cwd=tmp_path)
    batch = TrainBatches(open_tokens(data, 50257), 32, 4, 1337).micro_batch(0, 0, 0, 1, 4)
    _, model, _ = open_as_nanogpt(exported, stand_in)
    _, loss = model(batch["input_ids"], batch["shift_labels"])
    assert losses(tmp_path / "baseline")[0] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file, content: file.unlink(), "there is no such file"),
        (lambda file, content: file.write_bytes(b"123"), "is not a checkpoint of nanoGPT that can be read"),
        (lambda file, content: torch.save({**content, "spy": Path()}, file), "without running its code"),
        (lambda file, content: torch.save({"weights": 1}, file), "has no model and model_args"),
        (lambda file, content: torch.save({**content, "model_args": {"n_layer": 2}}, file), "model_args are"),
        (lambda file, content: torch.save({**content, "model": [1]}, file), "has no model and model_args"),
        (lambda file, content: content["model_args"].update(n_head=3), "n_embd=16 cannot be split over n_head=3"),
        (lambda file, content: content["model"].pop("transformer.h.1.attn.c_attn.weight"), "c_attn.weight is missing"),
        (lambda file, content: content["model"].pop("transformer.h.1.ln_1.bias"), "ln_1.bias is missing"),
        (lambda file, content: content["model_args"].update(block_size=65), r"wpe.weight is \[64, 16\]"),
        (lambda file, content: content["model"].update({"lm_head.weight": torch.ones(50257, 16)}), "not tied"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_refused(exported: Path, tmp_path: Path, damage, message: str) -> None:
    content = torch.load(exported, weights_only=True)
    file = tmp_path / "ckpt.pt"
    torch.save(content, file)
    before = file.stat().st_mtime_ns
    damage(file, content)
    if file.exists() and file.stat().st_mtime_ns == before:
        torch.save(content, file)
    with pytest.raises(UserError, match=message):
        load_for_inference(file, "float32", device="cpu")


def test_a_model_that_nanogpt_would_compute_differently_is_refused(finished: Path) -> None:
    config = load_for_inference(finished, "float32", device="cpu").config
    nanogpt.check_writable(config)
    config.n_inner = 48
    with pytest.raises(UserError, match="n_inner=48"):
        nanogpt.check_writable(config)
    config.n_inner, config.activation_function = 64, "relu"
    with pytest.raises(UserError, match="activation_function='relu'"):
        nanogpt.check_writable(config)


def test_without_a_training_state_the_optimizer_has_no_state(
    small_model: Path, stand_in: dict, tmp_path: Path
) -> None:
    export.main([str(small_model), str(tmp_path / "out"), "--format", "nanogpt", "--dtype", "bfloat16"])
    content, model, optimizer = open_as_nanogpt(tmp_path / "out" / "ckpt.pt", stand_in)
    assert (content["iter_num"], content["best_val_loss"], len(optimizer.state)) == (0, 1e9, 0)
    assert content["model"]["lm_head.weight"].dtype == torch.bfloat16
    ids = torch.arange(10)[None]
    model(ids, ids)[1].backward()
    optimizer.step()


@pytest.mark.skipif(CHECKOUT is None, reason="NANOGPT names no checkout of nanoGPT")
def test_a_real_checkout_resumes_and_samples(exported: Path, corpus: Path, tmp_path: Path) -> None:
    place = tmp_path / "nanoGPT"
    shutil.copytree(str(CHECKOUT), place, ignore=shutil.ignore_patterns(".git"))
    (place / "data" / "ours").mkdir()
    (place / "out").mkdir()
    for name in ("train.bin", "val.bin"):
        np.tile(np.fromfile(corpus / name, np.uint16), 2).tofile(place / "data" / "ours" / name)
    shutil.copy(exported, place / "out")
    settings = ["--device=cpu", "--dtype=float32", "--compile=False", "--out_dir=out"]
    steps = ["--dataset=ours", "--init_from=resume", "--block_size=64", "--batch_size=2", "--max_iters=11",
             "--eval_interval=10", "--eval_iters=1", "--gradient_accumulation_steps=1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "train.py", *settings, *steps], cwd=place, capture_output=True, text=True, check=True
    )
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("iter ")] == [
        "iter 8", "iter 9", "iter 10", "iter 11",
    ]  # fmt: skip
    assert torch.load(place / "out" / "ckpt.pt", weights_only=False)["iter_num"] == 10
    assert load_for_inference(place / "out" / "ckpt.pt", "float32", device="cpu").config.n_positions == 64

    vocab, merges = gpt2_vocab_and_merges()  # where tiktoken would put what it downloads
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    texts = {
        "encoder.json": json.dumps(vocab),
        "vocab.bpe": "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges),
    }
    for name, text in texts.items():
        (place / hashlib.sha1(f"{address}{name}".encode()).hexdigest()).write_text(text)
    argv = [sys.executable, "sample.py", *settings, "--num_samples=1", "--max_new_tokens=5", "--start=def "]
    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(place)}
    done = subprocess.run(argv, cwd=place, env=environment, capture_output=True, text=True, check=True)
    assert "def " in done.stdout
