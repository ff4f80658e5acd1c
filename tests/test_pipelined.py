"""A pipeline computes what one process computes: real processes over gloo, DeepSpeed's real engine."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from tests.conftest import LOSS_TOLERANCE, ROOT, accelerate, command, free_port, losses, python, records
from train.build import settle
from train.config import parse
from train.errors import UserError

CLIPPED = 1.0  # the default --max_grad_norm


def layout(folder: Path, stages: int, processes: int, partition: Any = "uniform") -> list[str]:
    """Flags that train with `stages` stages, half of the `finished` run's global batch of 4 at a time."""
    settings = json.loads((ROOT / "ds_configs" / "pipeline.json").read_text())
    settings["pipeline"] = {"stages": stages, "partition": partition}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ds.json").write_text(json.dumps(settings))
    return [
        "--run_type=optimized",
        f"--deepspeed_config={folder}/ds.json",
        f"--train_micro_batch_size_per_gpu={2 * stages // processes}",
        "--gradient_accumulation_steps=2",
        "--mixed_precision=no",
        "--save_interval=4",
        "--eval_interval=4",
        f"--checkpoint_path={folder}",
    ]


def check_parity(run: Path, finished: Path) -> None:
    assert losses(run) == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    for ours, theirs in zip(records(run), records(finished), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert theirs["grad_norm"] > CLIPPED, "clipping has to bite to be tested"
        assert ours.get("val_loss") == pytest.approx(theirs.get("val_loss"), abs=LOSS_TOLERANCE)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, finished))
    assert list(weights) == list(expected)
    # Not the key biases: their gradient is zero but for rounding, which AdamW makes into steps of the learning rate.
    for name in weights:
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def two_stages(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run of two stages on two processes, and what it said."""
    folder = tmp_path_factory.mktemp("two_stages")
    done = accelerate(*flags, *layout(folder, 2, 2), cwd=folder)
    return folder / "optimized", done.stdout + done.stderr


def test_two_stages_compute_what_one_process_does(two_stages: tuple[Path, str], finished: Path) -> None:
    run, said = two_stages
    check_parity(run, finished)
    assert json.loads((run / "metrics.json").read_text())["world_size"] == 2
    assert "pipeline of 2 stages, partition uniform" in said
    assert said.count("embeddings ... block") == 1, "the partition is printed once"
    model, report = GPT2LMHeadModel.from_pretrained(run / "step-8", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(
        model.transformer.wte.weight.detach(), load_file(run / "model.safetensors")["transformer.wte.weight"]
    )


@pytest.mark.slow
def test_a_checkpoint_goes_from_a_pipeline_to_one_process_and_back(
    two_stages: tuple[Path, str], flags: list[str], finished: Path, tmp_path: Path
) -> None:
    alone = [*flags, f"--resume_from_checkpoint={two_stages[0]}/step-4", f"--checkpoint_path={tmp_path}/alone"]
    python("-m", "train", *alone, cwd=tmp_path)
    assert losses(tmp_path / "alone" / "baseline") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    back = [*flags, *layout(tmp_path / "back", 2, 2, [2, 3]), f"--resume_from_checkpoint={finished}/step-4"]
    accelerate(*back, cwd=tmp_path)
    assert losses(tmp_path / "back" / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_a_resumed_pipeline_is_the_uninterrupted_one(
    two_stages: tuple[Path, str], flags: list[str], tmp_path: Path
) -> None:
    half = f"--resume_from_checkpoint={two_stages[0]}/step-4"
    accelerate(*flags, *layout(tmp_path, 2, 2), half, cwd=tmp_path)
    assert losses(tmp_path / "optimized") == losses(two_stages[0])


@pytest.mark.slow
def test_stages_and_data_parallelism_together(flags: list[str], finished: Path, tmp_path: Path) -> None:
    torchrun = ["torchrun", "--nproc_per_node", "4", "--master_port", "0", "--rdzv_backend", "c10d"]
    command(*torchrun, "-m", "train", *flags, *layout(tmp_path, 2, 4), cwd=tmp_path)
    check_parity(tmp_path / "optimized", finished)


@pytest.mark.slow
@pytest.mark.parametrize("partition", [[1, 1, 3], [1, 3, 1], [3, 1, 1]])
def test_stages_without_matrices_or_without_vectors(
    flags: list[str], finished: Path, tmp_path: Path, partition: list[int]
) -> None:
    """Embeddings, final norm or head alone have parameters of one kind; the optimizer has a group for each kind."""
    accelerate(*flags, *layout(tmp_path, 3, 3, partition), cwd=tmp_path, processes=3)
    check_parity(tmp_path / "optimized", finished)


@pytest.mark.slow
def test_dualpipev_computes_what_one_process_does(flags: list[str], finished: Path, tmp_path: Path) -> None:
    dual = ["--pipeline_schedule=dualpipev", "--train_micro_batch_size_per_gpu=1", "--gradient_accumulation_steps=4"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    accelerate(*flags, *layout(whole, 2, 2, [2, 1, 1, 1]), *dual, cwd=tmp_path)
    check_parity(whole / "optimized", finished)
    accelerate(*flags, *layout(half, 2, 2), *dual, f"--resume_from_checkpoint={whole}/optimized/step-4", cwd=tmp_path)
    assert losses(half / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(
    two_stages: tuple[Path, str], flags: list[str], tmp_path: Path
) -> None:
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "train"]
    command(*launch, *flags, *layout(tmp_path, 2, 2), "--activation_checkpointing", cwd=tmp_path)
    assert losses(tmp_path / "optimized") == losses(two_stages[0])


@pytest.mark.slow
def test_bf16_stays_close_and_its_masters_are_kept(flags: list[str], finished: Path, tmp_path: Path) -> None:
    accelerate(*flags, *layout(tmp_path, 2, 2), "--mixed_precision=bf16", cwd=tmp_path)
    assert losses(tmp_path / "optimized") == pytest.approx(losses(finished), abs=0.02)
    for name, weight in load_file(tmp_path / "optimized" / "model.safetensors").items():
        assert weight.dtype == torch.float32
        if weight.ndim > 1:
            assert not torch.equal(weight, weight.bfloat16().float()), f"{name}: the fp32 masters are saved"


@pytest.mark.parametrize(
    ("stages", "partition", "words"),
    [
        (6, "cost", ["--pipeline_stages 6", "5 layers", "2 blocks", "5 stages or fewer"]),
        (2, "best", ["'best'", "uniform, parameters, cost"]),
        (2, [2, 2], ["[2, 2]", "sums to 4", "5 layers"]),
        (2, [1, 1, 3], ["lists 3 stages", "there are 2"]),
    ],
)
def test_stages_that_the_model_cannot_have_are_refused(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: int, partition: Any, words: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(stages))
    config = parse([*flags, *layout(tmp_path, stages, stages, partition)])
    with pytest.raises(UserError) as error:
        settle(config)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_dualpipev_is_refused_where_it_cannot_be(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dual = [*flags, "--pipeline_schedule=dualpipev"]
    with pytest.raises(UserError, match="--pipeline_schedule dualpipev: there is one stage"):
        settle(parse(dual))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"needs --gradient_accumulation_steps 4 or more .*, not 2"):
        settle(parse([*dual, *layout(tmp_path, 2, 2)]))
    monkeypatch.setenv("WORLD_SIZE", "3")
    three = [*dual, *layout(tmp_path, 3, 3), "--gradient_accumulation_steps=6"]
    with pytest.raises(UserError, match="dualpipev: 6 pipeline stages for 5 layers"):
        settle(parse(three))


def test_the_global_batch_counts_data_parallel_processes(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = parse([*flags, *layout(tmp_path, 2, 4)])
    run = settle(dataclasses.replace(config, train_micro_batch_size_per_gpu=3))
    assert run.train.global_batch_size == 3 * 2 * 2
    assert run.deepspeed is not None
    assert run.deepspeed["train_batch_size"] == 12
    assert run.partition is not None
    assert run.partition.stages == 2
