"""Every recipe is parsed, and trains with its own flags where those that only its size needs are replaced."""

from pathlib import Path

import pytest

from tests.conftest import ROOT, losses, ranks
from train.checkpoints.loading import SIZES, default_learning_rate
from train.config import packaged
from train.config.run_config import parse
from train.run.setup import resolve
from train.utils.errors import UserError

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = [recipe.stem for recipe in RECIPES]
PROCESSES = {"gpt2_124m_8_gpus": 8, "gpt2_xl_pipeline_data_parallel": 8}


def shrunk(flags: list[str], folder: Path) -> list[str]:
    """Flags that come after the recipe's: a tiny model, two steps, and no compiler."""
    return [*flags, "--train_micro_batch_size_per_gpu=2", "--gradient_accumulation_steps=2", "--max_steps=2",
            "--eval_interval=0", "--save_interval=0", "--torch_compile=false", "--profile=false", "--warmup_steps=1",
            f"--checkpoint_path={folder}", "--overwrite=false"]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_is_complete_and_grouped(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = parse([f"--config={recipe}"])
    monkeypatch.chdir(tmp_path)
    assert parse([f"--config=recipes/{recipe.name}"]) == config, "found from any folder"
    assert config.learning_rate is not None
    assert None not in (config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps)
    if config.model in SIZES and config.model != "tiny":
        assert config.learning_rate == default_learning_rate(config.model)
    header = recipe.read_text().partition("\n\n")[0]
    assert "-m train" in header, "says how it is started"
    assert f"recipes/{recipe.name}" in header
    assert (config.pipeline_stages or 1) <= PROCESSES.get(recipe.stem, 1)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("gpt2_124m_one_gpu", 491_520), ("gpt2_124m_8_gpus", 491_520), ("gpt2_xl_pipeline_data_parallel", 1_048_576)],
)
def test_the_tokens_of_a_step_are_those_of_the_comment(name: str, tokens: int) -> None:
    config = parse([f"--config={ROOT}/recipes/{name}.yaml"])
    assert config.train_micro_batch_size_per_gpu is not None
    assert config.gradient_accumulation_steps is not None
    assert config.block_size is not None
    data_parallel = PROCESSES.get(name, 1) // (config.pipeline_stages or 1)
    sequences = config.train_micro_batch_size_per_gpu * config.gradient_accumulation_steps * data_parallel
    assert sequences * config.block_size == tokens


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_a_recipe_resolves(recipe: Path, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = PROCESSES.get(recipe.stem, 1)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    run = resolve(parse([f"--config={recipe}", *shrunk(flags, tmp_path)]))
    written = parse([f"--config={recipe}"])
    for name in ("lr_schedule", "min_learning_rate_ratio", "weight_decay", "adam_beta2", "dropout"):
        assert getattr(run.config, name) == getattr(written, name)
    assert run.train.global_batch_size == 2 * 2 * processes // (run.config.pipeline_stages or 1)
    assert (run.partition is not None) == (run.config.pipeline_stages != 1)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES[:3], RECIPES[-1]], ids=[*NAMES[:3], NAMES[-1]])
def test_a_recipe_trains(recipe: Path, flags: list[str], tmp_path: Path) -> None:
    own = [f"--config={recipe}", *shrunk(flags, tmp_path)]
    config = parse(own)
    two_stages = ["--pipeline_stages=2"] if config.pipeline_stages else []
    ranks(*own, *two_stages, cwd=tmp_path, processes=min(2, PROCESSES.get(recipe.stem, 1)))
    assert len(losses(config.run_folder)) == 2


def test_the_default_learning_rate_of_a_new_model_is_gpt3s(tmp_path: Path) -> None:
    rates = {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4, "tiny": 6e-4}
    assert {name: default_learning_rate(name) for name in SIZES} == rates
    assert default_learning_rate("openai-community/gpt2") == 5e-5


def test_recipes_are_listed_with_the_configurations() -> None:
    assert {recipe.name for recipe in RECIPES} <= {file.name for file in packaged.configurations()}
    with pytest.raises(UserError, match="did you mean finetune_gpt2"):
        packaged.find("finetune_gpt")
