"""A run on its way to the Hub, which is a loopback one, through the real client, and back without the package."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import GPT2LMHeadModel

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import ROOT, accelerate, python
from tests.loopback_hub import LoopbackHub, loopback_hub
from train.checkpoints.run_folder import read_run
from train.export import __main__ as export
from train.hub.__main__ import main
from train.hub.card import card
from train.hub.upload import check
from train.utils.errors import UserError
from train.utils.units import in_unit


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def test_the_card_says_what_the_run_has_measured(finished: Path) -> None:
    written = card(read_run(finished, "small"), "owner/small")
    summary = json.loads((finished / "metrics.json").read_text())
    metadata = yaml.safe_load(written.content.split("---")[1])
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    (entry,) = metadata["model-index"]
    metrics = {metric["type"]: metric["value"] for result in entry["results"] for metric in result["metrics"]}
    assert metrics == {"loss": round(summary["val_loss"], 4), "perplexity": round(summary["perplexity"], 4)}
    for said in (
        "811,728 parameters",
        "8,000",
        "--max_steps=8",
        summary["hardware"]["cpu"],
        in_unit("rate", summary["tokens_per_second"]).split()[0],
        "trust_remote_code=True",
        "Apache-2.0",
        "training_loss.png",
    ):
        assert said in written.content, said
    assert re.search(r"\| learning_rate +\| +0\.01 \|", written.content)


def test_a_card_names_what_was_tuned_and_on_what(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    summary = json.loads((finished / "metrics.json").read_text())
    summary["config"]["model"] = "openai-community/gpt2@607a30d"
    summary["data"]["train"]["source"] = {
        "dataset": "fineweb-edu",
        "hub_id": "HuggingFaceFW/fineweb-edu",
        "subset": "a|b",
    }
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(summary))
    written = card(read_run(tmp_path / "run", "small"), "owner/small")
    assert (written.data.base_model, written.data.datasets) == ("openai-community/gpt2", ["HuggingFaceFW/fineweb-edu"])
    assert "started from the weights of `openai-community/gpt2@607a30d`" in written.content
    assert "HuggingFaceFW/fineweb-edu, a\\|b" in written.content


def test_a_message_names_what_was_typed() -> None:
    for named, ask in (("--push_to_hub", lambda: check("small")), ("OWNER/NAME", lambda: main(["run", "small"]))):
        with pytest.raises(UserError, match=f"^{named} small: write owner/name"):
            ask()


PROGRAM = """
import sys, torch
sys.modules["modeling_gpt2flash"] = None  # not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("owner/small", trust_remote_code=True).eval()
ids = AutoTokenizer.from_pretrained("owner/small", trust_remote_code=True)("import os", return_tensors="pt").input_ids
torch.save(model(ids).logits, "logits.pt")
"""


@pytest.mark.slow
def test_a_run_that_is_pushed_opens_without_the_package(hub: LoopbackHub, flags: list[str], tmp_path: Path) -> None:
    own = [*flags, "--max_steps=2", f"--checkpoint_path={tmp_path}", "--push_to_hub=owner/small"]
    assert f"{hub.address}/owner/small" in python("-m", "train", *own, cwd=tmp_path).stdout
    files = hub.repositories["owner/small"]
    assert {
        "README.md",
        "training_loss.png",
        "config.json",
        "model.safetensors",
        "modeling_gpt2flash.py",
    } <= files.keys()
    assert not {"metrics.json", "optimizer.safetensors", "training_state.json"} & files.keys()
    assert not any("/" in name for name in files)
    assert "--push_to_hub=owner/small" in files["README.md"].decode()
    assert ModelCard(files["README.md"].decode()).data.eval_results
    python("-c", PROGRAM, cwd=tmp_path)
    ours = GPT2FlashForCausalLM.from_pretrained(tmp_path / "baseline").eval()
    with torch.no_grad():
        expected = ours(torch.tensor([[11748, 28686]])).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, rtol=0, atol=1e-6)
    (example,) = re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)
    written = python("-c", f"import sys; sys.modules['modeling_gpt2flash'] = None\n{example}", cwd=tmp_path).stdout
    assert written.startswith("def ")
    files.clear()
    python("-m", "train.hub", tmp_path / "baseline", "owner/small", cwd=tmp_path)
    assert "model.safetensors" in files


@pytest.mark.slow
def test_the_whole_way_round(hub: LoopbackHub, flags: list[str], small_model: Path, tmp_path: Path) -> None:
    """Stock GPT-2, ours, a pipeline of two, the Hub, no package, exported, stock GPT-2: the same logits throughout."""
    ids = torch.tensor([[11748, 28686]])  # "import os"

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(ids).logits

    def same(one: torch.Tensor, other: torch.Tensor) -> None:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)

    stock = logits(GPT2LMHeadModel.from_pretrained(small_model))
    same(logits(GPT2FlashForCausalLM.from_pretrained(small_model)), stock)
    own = [*flags, "--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/pipeline.json",
           "--pipeline_stages=2", "--gradient_accumulation_steps=2", "--train_micro_batch_size_per_gpu=2",
           "--mixed_precision=no", "--max_steps=20", f"--checkpoint_path={tmp_path}",
           "--push_to_hub=owner/small"]  # fmt: skip
    accelerate(*own, cwd=tmp_path)
    trained = logits(GPT2FlashForCausalLM.from_pretrained(tmp_path / "optimized"))
    assert (trained - stock).abs().max() > 0.1
    python("-c", PROGRAM, cwd=tmp_path)
    same(torch.load(tmp_path / "logits.pt", weights_only=True), trained)
    export.main([str(tmp_path / "optimized"), str(tmp_path / "gpt2")])
    same(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")), trained)


def test_the_card_goes_with_the_weights_that_it_describes(hub: LoopbackHub, finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.copy(run / "step-4" / "model.safetensors", run)  # as a kill in the middle of a save leaves it
    words = ["-m", "train.hub", run, "owner/small"]
    python(*words, cwd=tmp_path)
    files = hub.repositories["owner/small"]
    assert files["model.safetensors"] == (finished / "step-8" / "model.safetensors").read_bytes()
    assert files["README.md"]
    assert not {"optimizer.safetensors", "training_state.json", "metrics.json"} & files.keys()
    files.clear()
    (run / "latest").write_text("step-4\n")
    done = python(*words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "metrics.json has 8 steps, and the latest checkpoint is step-4" in done.stderr
    assert not files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repo", "token", "says"),
    [
        ("small", "hf_loopback", "write owner/name"),
        ("a/b/c", "hf_loopback", "a/b/c"),
        ("owner/small", "hf_other", "hf auth login"),
    ],
)
def test_what_cannot_be_pushed_to_is_refused_before_training(
    hub: LoopbackHub,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    repo: str,
    token: str,
    says: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    words = ["-m", "train", *flags, f"--checkpoint_path={tmp_path}/run", f"--push_to_hub={repo}"]
    done = python(*words, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (tmp_path / "run").exists()
