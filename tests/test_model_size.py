"""Models that no memory here can hold are refused before anything is built."""

import json
import shutil
from pathlib import Path

import psutil
import pytest

from tests.conftest import train
from train.checkpoints.loading import check_size, load_config
from train.engines.pipeline.partition import parameter_count
from train.generate.__main__ import main as generate
from train.plan.__main__ import main as plan
from train.utils.errors import UserError


def resized(model: Path, folder: Path, **sizes: int) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **sizes}))
    return folder


@pytest.mark.parametrize("sizes", [{"n_layer": 10**9}, {"n_embd": 10**7}, {"vocab_size": 10**13}], ids=str)
def test_a_model_beyond_all_memory(sizes: dict[str, int], small_model: Path, flags: list[str], tmp_path: Path) -> None:
    model = resized(small_model, tmp_path / "model", **sizes)
    with pytest.raises(UserError, match=r"^--checkpoint .*model: the weights alone take [\d,.]+ GiB in bf16, and"):
        generate(["--checkpoint", str(model)])
    if "n_layer" in sizes:
        with pytest.raises(UserError, match=r"^--model .*: has 1,000,000,000 layers; a plan is made for 10,000"):
            plan(["--model", str(model)])
        done = train(*flags, f"--model={model}", f"--checkpoint_path={tmp_path}", cwd=tmp_path, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: --model {model}: the weights alone take ")
        assert list(tmp_path.iterdir()) == [model]


def test_what_several_machines_can_hold_together_is_not_refused(small_model: Path, tmp_path: Path) -> None:
    there_is = psutil.virtual_memory().total + psutil.swap_memory().total
    config = load_config(str(small_model))
    per_layer = parameter_count(load_config(str(small_model), n_layer=1001)) - parameter_count(
        load_config(str(small_model), n_layer=1)
    )
    config.n_layer = int(1.5 * there_is / 2 / (per_layer / 1000))
    assert 2 * parameter_count(config) > there_is
    with pytest.raises(UserError, match="the weights alone take"):
        check_size("model", config)
    check_size("model", config, machines=2)


@pytest.mark.parametrize("name", ["tiny", "gpt2"])
def test_the_size_is_that_of_the_model(name: str) -> None:
    import torch

    from modeling_gpt2flash import GPT2FlashForCausalLM

    config = load_config(name)
    with torch.device("meta"):
        assert parameter_count(config) == GPT2FlashForCausalLM(config).num_parameters()


def test_a_folder_without_a_configuration(small_model: Path, tmp_path: Path) -> None:
    shutil.copy(small_model / "model.safetensors", tmp_path)
    with pytest.raises(UserError, match=r"^--model .*: has no config\.json; name a step-N folder"):
        load_config(str(tmp_path))
