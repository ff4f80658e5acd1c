"""Runs of `python -m train` in processes of their own, as people start them."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import ROOT, losses, records
from tests.conftest import train as train_in_fork
from train.config.run_config import parse
from train.metrics.hardware import versions
from train.run.setup import resolve
from train.utils.errors import UserError


def run(flags: list[str], folder: Path, *more: str, check: bool = True):
    return train_in_fork(*flags, f"--checkpoint_path={folder}", *more, cwd=folder, check=check)


def test_a_finished_run_is_complete(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "attention.py", "config.json", "configuration_gpt2flash.py", "documents.py", "generation_config.json",
        "latest", "loss.py", "metrics.json", "metrics.jsonl", "model.safetensors", "modeling_gpt2flash.py",
        "positions.py", "projection.py", "step-4", "step-8", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (finished / "latest").read_text() == "step-8\n"
    lines = records(finished)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8]
    assert [line["tokens"] for line in lines] == [step * 4 * 32 for step in range(1, 9)]
    for line in lines:
        assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "step_time_seconds"} <= line.keys()
        assert 0 <= line["data_seconds"] <= line["step_time_seconds"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5


def test_the_summary_sums_up_the_lines(finished: Path) -> None:
    summary, lines = json.loads((finished / "metrics.json").read_text()), records(finished)
    assert summary["val_loss"] == lines[-1]["val_loss"]
    assert summary["perplexity"] == pytest.approx(math.exp(lines[-1]["val_loss"]))
    assert summary["training_time_seconds"] == pytest.approx(sum(line["step_time_seconds"] for line in lines))
    waits, times = (sum(line[key] for line in lines[1:]) for key in ("data_seconds", "step_time_seconds"))
    assert summary["data_share"] == pytest.approx(waits / times)
    for key in ("time_per_epoch_seconds", "tokens_per_second", "inference_latency_seconds",
                "inference_tokens_per_second", "peak_memory_bytes"):  # fmt: skip
        assert summary[key] > 0
    for percentiles in summary["inference_percentiles"].values():
        assert 0 < percentiles["p50"] <= percentiles["p95"]
    assert summary["attn_implementation"] == "eager"
    assert summary["config"]["gradient_accumulation_steps"] == 1, "defaults are resolved"
    assert summary["sample"]["text"].startswith("def ")


@pytest.mark.torch_version
def test_the_summary_records_the_build_of_torch(finished: Path) -> None:
    summary = json.loads((finished / "metrics.json").read_text())
    assert summary["versions"]["torch"] == versions()["torch"]
    assert summary["versions"]["torch"].startswith(torch.__version__)


def test_the_validation_loss_is_that_of_stock_gpt2_over_the_whole_file(finished: Path, corpus: Path) -> None:
    import numpy as np

    stock = GPT2LMHeadModel.from_pretrained(finished / "step-8").eval()
    ids = torch.from_numpy(np.fromfile(corpus / "val.bin", dtype=np.uint16).astype(np.int64))
    nll, block = 0.0, 32
    with torch.no_grad():
        for start in range(0, len(ids) - 1, block):
            window = ids[start : start + block + 1]
            logits = stock(window[None, :-1]).logits[0]
            nll += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert records(finished)[-1]["val_loss"] == pytest.approx(nll / (len(ids) - 1), abs=1e-5)


@pytest.mark.parametrize("folder", ["", "step-4"])
def test_run_and_step_folders_open_in_ours_and_in_stock(finished: Path, folder: str) -> None:
    ours = GPT2FlashForCausalLM.from_pretrained(finished / folder).eval()
    stock = GPT2LMHeadModel.from_pretrained(finished / folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / folder)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length) == (50256, ours.config.n_positions)
    ids = tokenizer("import os\n", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=0, atol=1e-6)
    assert ours.dtype == torch.float32


def test_the_run_folder_holds_the_latest_weights(finished: Path) -> None:
    latest, run_folder = (load_file(finished / name / "model.safetensors") for name in ("step-8", ""))
    assert latest.keys() == run_folder.keys()
    assert all(torch.equal(latest[name], run_folder[name]) for name in latest)
    earlier = load_file(finished / "step-4" / "model.safetensors")
    assert not torch.equal(earlier["transformer.wte.weight"], latest["transformer.wte.weight"])


def test_the_first_loss_is_that_of_stock_gpt2_on_the_same_windows(
    finished: Path, small_model: Path, corpus: Path
) -> None:
    from train.data.batches import TrainBatches
    from train.data.token_file import open_tokens

    batch = TrainBatches(open_tokens(corpus / "train.bin", 50257), 32, 4, 1337).micro_batch(0, 0, 0, 1, 4)
    logits = GPT2LMHeadModel.from_pretrained(small_model).eval()(batch["input_ids"]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert losses(finished)[0] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "stage", "precision"),
    [
        ("baseline", 0, "no"),
        ("optimized", 2, "bf16"),
        pytest.param("optimized", 1, "no", marks=pytest.mark.slow),
        pytest.param("optimized", 3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_resuming_gives_bit_for_bit_the_uninterrupted_losses(
    flags: list[str], tmp_path: Path, kind: str, stage: int, precision: str
) -> None:
    flags = [*flags, f"--run_type={kind}", "--gradient_accumulation_steps=2", "--dropout=0.1", "--save_interval=4",
             "--train_micro_batch_size_per_gpu=2", "--mixed_precision=no"]  # fmt: skip
    if kind == "optimized":
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        flags.append(f"--deepspeed_config={tmp_path}/ds.json")
    run(flags, tmp_path)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    run(flags, resumed, f"--resume_from_checkpoint={tmp_path}/{kind}/step-4")
    for a, b in zip(records(tmp_path / kind), records(resumed / kind), strict=True):
        assert (a["step"], a["loss"], a["grad_norm"]) == (b["step"], b["loss"], b["grad_norm"])
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(tmp_path / kind / "step-8" / file), load_file(resumed / kind / "step-8" / file)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_two_run_types_compute_the_same_numbers_in_fp32(flags: list[str], finished: Path, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    split = ["--train_micro_batch_size_per_gpu=1", "--gradient_accumulation_steps=4", "--mixed_precision=no"]
    run(flags, tmp_path, "--run_type=optimized", f"--deepspeed_config={tmp_path}/ds.json", *split)
    assert losses(tmp_path / "optimized") == pytest.approx(losses(finished), abs=1e-5)


def test_accumulation_is_the_same_as_a_larger_batch(flags: list[str], finished: Path, tmp_path: Path) -> None:
    run(flags, tmp_path, "--train_micro_batch_size_per_gpu=1", "--gradient_accumulation_steps=4")
    assert losses(tmp_path / "baseline") == pytest.approx(losses(finished), abs=1e-5)


def test_checkpointing_and_chunks_change_no_number(flags: list[str], finished: Path, tmp_path: Path) -> None:
    run(flags, tmp_path, "--activation_checkpointing=full", "--attn_implementation=sdpa", "--loss_chunk_size=17")
    assert losses(tmp_path / "baseline") == pytest.approx(losses(finished), abs=1e-5)


def test_a_run_already_there_is_refused_continued_or_replaced(flags: list[str], tmp_path: Path) -> None:
    first = run(flags, tmp_path, "--max_steps=2")
    assert "Warning" not in first.stderr
    again = run(flags, tmp_path, "--max_steps=2", check=False)
    assert again.returncode == 2
    assert "finished run" in again.stderr
    assert "--overwrite" in again.stderr
    assert "--resume_from_checkpoint" in again.stderr
    done = run(flags, tmp_path, "--max_steps=2", "--resume_from_checkpoint", check=False)
    assert done.returncode == 2
    assert "has done all 2 steps" in done.stderr
    (tmp_path / "baseline" / "metrics.json").unlink()  # as if killed while it was summed up
    run(flags, tmp_path, "--max_steps=2", "--resume_from_checkpoint")
    assert json.loads((tmp_path / "baseline" / "metrics.json").read_text())["steps"] == 2
    longer = ["--max_steps=3", "--resume_from_checkpoint", "--save_total_limit=1"]
    refused = run(flags, tmp_path, *longer, check=False)
    assert refused.returncode == 2
    assert "--allow_changes" in refused.stderr
    run(flags, tmp_path, *longer, "--allow_changes")
    assert [line["step"] for line in records(tmp_path / "baseline")] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "baseline").glob("step-*")] == ["step-3"]
    run(flags, tmp_path, "--max_steps=1", "--overwrite")
    assert [line["step"] for line in records(tmp_path / "baseline")] == [1]


def test_a_failed_start_leaves_the_run_that_was_there(flags: list[str], finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "baseline")
    (tmp_path / "broken").mkdir()
    shutil.copy(finished / "config.json", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"123")
    done = run(flags, tmp_path, f"--model={tmp_path}/broken", "--overwrite", check=False)
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
    elsewhere = run(flags, tmp_path, f"--resume_from_checkpoint={finished}/step-4", check=False)
    assert elsewhere.returncode == 2
    assert "already holds a finished run" in elsewhere.stderr
    assert losses(tmp_path / "baseline") == losses(finished)
    assert (tmp_path / "baseline" / "metrics.json").exists()


def test_a_checkpoint_of_another_run_is_refused(flags: list[str], finished: Path, tmp_path: Path) -> None:
    done = run(flags, tmp_path, "--seed=1", f"--resume_from_checkpoint={finished}/step-4", check=False)
    assert done.returncode == 2
    assert "seed 1337" in done.stderr
    assert "--model" in done.stderr
    assert not (tmp_path / "baseline").exists()


def test_a_checkpoint_of_another_optimizer_is_refused(flags: list[str], finished: Path, tmp_path: Path) -> None:
    there = [f"--resume_from_checkpoint={finished}/step-4", f"--checkpoint_path={tmp_path}"]
    with pytest.raises(UserError, match=r"was trained with optimizer adamw, and this run has muon.*--model"):
        resolve(parse([*flags, "--optimizer=muon", *there]))


def write_tokens(path: Path, ids: list[int]) -> None:
    import numpy as np

    np.array(ids, dtype=np.uint16).tofile(path)


@pytest.mark.parametrize(
    ("flag", "make", "names"),
    [
        ("--train_data_path", None, ["bad.bin"]),
        ("--train_data_path", b"", ["bad.bin", "empty"]),
        ("--train_data_path", b"123", ["bad.bin", "3"]),
        ("--train_data_path", [1, 2, 3], ["bad.bin", "3 tokens", "32"]),
        ("--train_data_path", [60000] * 100, ["bad.bin", "60000", "50257"]),
        ("--val_data_path", [60000] * 100, ["bad.bin", "60000", "50257"]),
        ("--val_data_path", [1], ["bad.bin"]),
    ],
    ids=["missing", "empty", "odd", "short", "id", "val id", "val short"],
)
def test_bad_tokens_are_a_sentence_and_nothing_is_written(
    flags: list[str], tmp_path: Path, flag: str, make: object, names: list[str]
) -> None:
    bad = tmp_path / "bad.bin"
    if isinstance(make, bytes):
        bad.write_bytes(make)
    elif isinstance(make, list):
        write_tokens(bad, make)
    before = sorted(tmp_path.iterdir())
    done = run(flags, tmp_path, f"{flag}={bad}", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert all(name in done.stderr for name in names), done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_path_that_is_a_file_is_a_sentence(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = train_in_fork(*flags, f"--checkpoint_path={tmp_path}/file", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(flags: list[str], finished: Path, tmp_path: Path) -> None:
    run(flags, tmp_path, "--torch_compile")
    assert losses(tmp_path / "baseline") == pytest.approx(losses(finished), abs=1e-5)


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["--block_size=65"], ["--block_size 65", "64"]),
        (["--model=gpt3"], ["gpt3", "gpt2-medium"]),
        (["--run_type=optimized"], ["--deepspeed_config", "ds_configs/zero2.json"]),
        (["--attn_implementation=flash_attention_2"], ["flash_attention_2", "CUDA"]),
        (["--attn_implementation=flashy"], ["flashy", "sdpa"]),
        (["--report_to=wandb"], ["wandb", "pip install"]),
        (["--resume_from_checkpoint=step-2"], ["step-2 does not exist"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_cannot_be_is_a_sentence(flags: list[str], tmp_path: Path, more: list[str], names: list[str]) -> None:
    done = run(flags, tmp_path, *more, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert all(name in done.stderr for name in names), done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("engine", ["baseline", "zero1", "zero2", "zero3", "zero3_offload"])
def test_a_run_and_its_resume_on_a_gpu(flags: list[str], tmp_path: Path, engine: str) -> None:
    """bf16 with the best attention there is; a resumed run goes on as the uninterrupted one to bf16's rounding."""
    run_type = "baseline" if engine == "baseline" else "optimized"
    own = [*flags, "--model=tiny", f"--run_type={run_type}", "--mixed_precision=bf16", "--attn_implementation=auto"]
    if run_type == "optimized":
        own += [f"--deepspeed_config={ROOT}/ds_configs/{engine}.json", "--activation_checkpointing=full"]
    run(own, tmp_path / "whole", "--save_interval=4")
    whole = tmp_path / "whole" / run_type
    summary = json.loads((whole / "metrics.json").read_text())
    assert summary["peak_memory_kind"] == "cuda_allocated"
    assert losses(whole)[-1] < losses(whole)[0] - 0.5
    run(own, tmp_path / "half", f"--resume_from_checkpoint={whole}/step-4")
    assert losses(tmp_path / "half" / run_type) == pytest.approx(losses(whole), abs=5e-3)
    GPT2LMHeadModel.from_pretrained(whole)
