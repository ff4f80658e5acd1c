"""A pipeline computes what one process computes: real processes over gloo, DeepSpeed's real engine."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import (
    LOSS_TOLERANCE,
    ROOT,
    SMALL,
    check_parity,
    command,
    engine_steps,
    free_port,
    losses,
    python,
    ranks,
    train,
)
from train.config.run_config import parse
from train.run.setup import resolve
from train.utils.errors import UserError


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


def dualpipev(folder: Path, partition: Any = (2, 1, 1, 1)) -> list[str]:
    """Flags that train with DualPipeV on two processes."""
    schedule = ["--pipeline_schedule=dualpipev", "--train_micro_batch_size_per_gpu=1"]
    return [*layout(folder, 2, 2, partition), *schedule, "--gradient_accumulation_steps=4"]


@pytest.fixture(scope="module")
def two_stages(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished run of two stages on two processes, and what it said."""
    folder = tmp_path_factory.mktemp("two_stages")
    done = ranks(*flags, *layout(folder, 2, 2), cwd=folder)
    return folder / "optimized", done.stdout


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
    train(*alone, cwd=tmp_path)
    assert losses(tmp_path / "alone" / "baseline") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    back = [*flags, *layout(tmp_path / "back", 2, 2, [2, 3]), f"--resume_from_checkpoint={finished}/step-4"]
    ranks(*back, cwd=tmp_path)
    assert losses(tmp_path / "back" / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_a_resumed_pipeline_is_the_uninterrupted_one(
    two_stages: tuple[Path, str], flags: list[str], tmp_path: Path
) -> None:
    half = f"--resume_from_checkpoint={two_stages[0]}/step-4"
    ranks(*flags, *layout(tmp_path, 2, 2), half, cwd=tmp_path)
    assert losses(tmp_path / "optimized") == losses(two_stages[0])


@pytest.mark.slow
def test_stages_and_data_parallelism_together(flags: list[str], finished: Path, tmp_path: Path) -> None:
    ranks(*flags, *layout(tmp_path, 2, 4), cwd=tmp_path, processes=4)
    check_parity(tmp_path / "optimized", finished)


@pytest.mark.slow
@pytest.mark.parametrize("partition", [[1, 1, 3], [1, 3, 1], [3, 1, 1]])
def test_stages_without_matrices_or_without_vectors(
    flags: list[str], finished: Path, tmp_path: Path, partition: list[int]
) -> None:
    """Embeddings, final norm or head alone have parameters of one kind; the optimizer has a group for each kind."""
    ranks(*flags, *layout(tmp_path, 3, 3, partition), cwd=tmp_path, processes=3)
    check_parity(tmp_path / "optimized", finished)


@pytest.mark.slow
def test_dualpipev_computes_what_one_process_does(flags: list[str], finished: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    ranks(*flags, *dualpipev(whole), cwd=tmp_path)
    check_parity(whole / "optimized", finished)
    ranks(*flags, *dualpipev(half, "uniform"), f"--resume_from_checkpoint={whole}/optimized/step-4", cwd=tmp_path)
    assert losses(half / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(
    two_stages: tuple[Path, str], flags: list[str], tmp_path: Path
) -> None:
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "train"]
    command(*launch, *flags, *layout(tmp_path, 2, 2), "--activation_checkpointing=full", cwd=tmp_path)
    assert losses(tmp_path / "optimized") == losses(two_stages[0])


@pytest.fixture(scope="module")
def six_blocks(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of two steps of a model of nine layers, four in the first half, five in the second."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("six_blocks")
    GPT2LMHeadModel(GPT2Config(**SMALL | {"n_layer": 6})).save_pretrained(folder / "model")
    return [*flags, *layout(folder, 2, 2, [4, 5]), f"--model={folder}/model", "--max_steps=2"]


def grouped(interval: int) -> list[str]:
    return ["--activation_checkpointing=full", f"--activation_checkpointing_interval={interval}"]


@pytest.fixture(scope="module")
def without_recomputation(six_blocks: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[list[dict]]:
    return engine_steps("watched", tmp_path_factory.mktemp("all_kept") / "out", *six_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_layers_are_recomputed_in_groups_on_every_stage(
    six_blocks: list[str], without_recomputation: list[list[dict]], tmp_path: Path, interval: int
) -> None:
    said = engine_steps("watched", tmp_path / "out", *six_blocks, *grouped(interval))
    for stage, own in enumerate([[0, 1, 2, 3], [4, 5, 6, 7]]):  # the head is part of the loss and no layer
        groups = [own[start : start + interval] for start in range(0, len(own), interval)]
        for step, all_kept in zip(said[stage], without_recomputation[stage], strict=True):
            assert (step["loss"], step["grad_norm"]) == (all_kept["loss"], all_kept["grad_norm"])
            assert all_kept["training"] == 2 * own, "two micro-batches"
            assert Counter(step["training"]) == dict.fromkeys(own, 4)
            assert step["training"][-len(own) :] == [layer for group in reversed(groups) for layer in group]
            assert step["evaluating"] == own


@pytest.mark.slow
def test_dualpipev_recomputes_as_the_json_says(six_blocks: list[str], tmp_path: Path) -> None:
    four = [*six_blocks, *dualpipev(tmp_path, [2, 2, 2, 3])]
    all_kept = engine_steps("watched", tmp_path / "all_kept", *four)
    settings = json.loads((tmp_path / "ds.json").read_text())
    settings["pipeline"]["activation_checkpoint_interval"] = 2
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    said = engine_steps("watched", tmp_path / "out", *four)
    for rank, own in enumerate([[0, 1, 6, 7], [2, 3, 4, 5]]):
        for step, before in zip(said[rank], all_kept[rank], strict=True):
            assert (step["loss"], step["grad_norm"]) == (before["loss"], before["grad_norm"])
            assert Counter(before["training"]) == dict.fromkeys(own, 4)
            assert Counter(step["training"]) == dict.fromkeys(own, 8)
            assert step["training"][-2:] == own[:2]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], grouped(2), ["dualpipev"]])
def test_packed_documents_across_stages(flags: list[str], tmp_path: Path, more: list[str]) -> None:
    one = [*flags, "--attn_implementation=sdpa"]
    [expected] = engine_steps("in_packs", tmp_path / "one", *one, processes=1)
    [unpacked] = engine_steps("plain", tmp_path / "unpacked", *one, processes=1)
    two = dualpipev(tmp_path) if more == ["dualpipev"] else [*layout(tmp_path, 2, 2), *more]
    said = engine_steps("in_packs", tmp_path / "two", *flags, *two)[0]
    for ours, theirs in zip(said, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=LOSS_TOLERANCE, rel=1e-4)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=LOSS_TOLERANCE)
    assert all(abs(ours["loss"] - theirs["loss"]) > 1e-3 for ours, theirs in zip(said[:2], unpacked[:2], strict=True))
    weights, reference = (load_file(tmp_path / name / "weights.safetensors") for name in ("two", "one"))
    for name in reference:
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(weights[name], reference[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_what_happens_between_steps_leaves_them_alone(flags: list[str], tmp_path: Path, schedule: str) -> None:
    """Validation in batches of another size, checkpoints and generation from them, with dropout to be disturbed."""
    two = dualpipev(tmp_path) if schedule == "dualpipev" else layout(tmp_path, 2, 2, [2, 3])
    two = [*flags, *two, "--dropout=0.1"]
    plain = engine_steps("plain", tmp_path / "plain", *two)
    assert engine_steps("interrupted", tmp_path / "interrupted", *two) == plain
    weights, others = (load_file(tmp_path / name / "weights.safetensors") for name in ("plain", "interrupted"))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_goes_through_every_layout(flags: list[str], tmp_path: Path) -> None:
    """Each leg goes on two steps after the beginning of the one before."""
    ten = ["--max_steps=10", "--save_interval=2"]
    train(*flags, *ten, f"--checkpoint_path={tmp_path}/whole", cwd=tmp_path)
    last = tmp_path / "whole" / "baseline"
    expected = losses(last)
    zero3 = ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/zero3.json", "--mixed_precision=no"]
    legs = {
        "four_stages": (4, layout(tmp_path / "four_stages", 4, 4)),
        "two_by_two": (4, layout(tmp_path / "two_by_two", 2, 4)),
        "zero3": (2, [*zero3, "--train_micro_batch_size_per_gpu=2", f"--checkpoint_path={tmp_path}/zero3"]),
        "alone": (1, [f"--checkpoint_path={tmp_path}/alone"]),
    }
    for step, (name, (processes, own)) in zip([2, 4, 6, 8], legs.items(), strict=True):
        words = [*flags, *own, *ten, f"--resume_from_checkpoint={last}/step-{step}"]
        if processes > 1:
            ranks(*words, cwd=tmp_path, processes=processes)
        else:
            train(*words, cwd=tmp_path)
        last = tmp_path / name / ("optimized" if processes > 1 else "baseline")
        assert losses(last) == pytest.approx(expected, abs=LOSS_TOLERANCE), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_stages_of_two_processes_from_text_on(tmp_path: Path) -> None:
    prepare = ["-m", "train.preprocess_data", "--dataset", "stdlib", "--out_dir", "data"]
    python(*prepare, "--max_documents", 60, "--val_fraction", 0.2, cwd=tmp_path)
    shared = ["--model=tiny", "--block_size=64", "--max_steps=10", "--mixed_precision=no", "--eval_steps=2",
              "--report_to=none", "--max_new_tokens=8"]  # fmt: skip
    train(*shared, "--train_micro_batch_size_per_gpu=8", cwd=tmp_path)
    two = ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/pipeline.json", "--pipeline_stages=2"]
    half = ["--train_micro_batch_size_per_gpu=2", "--gradient_accumulation_steps=2"]
    ranks(*shared, *two, *half, cwd=tmp_path, processes=4)
    one, pipelined = (losses(tmp_path / "checkpoint" / kind) for kind in ("baseline", "optimized"))
    assert pipelined == pytest.approx(one, abs=LOSS_TOLERANCE)
    assert one[-1] < one[0] - 0.5


@pytest.mark.slow
def test_bf16_stays_close_and_its_masters_are_kept(flags: list[str], finished: Path, tmp_path: Path) -> None:
    ranks(*flags, *layout(tmp_path, 2, 2), "--mixed_precision=bf16", cwd=tmp_path)
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
        resolve(config)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_dualpipev_is_refused_where_it_cannot_be(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dual = [*flags, "--pipeline_schedule=dualpipev"]
    with pytest.raises(UserError, match="--pipeline_schedule dualpipev: there is one stage"):
        resolve(parse(dual))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"needs --gradient_accumulation_steps 4 or more .*, not 2"):
        resolve(parse([*dual, *layout(tmp_path, 2, 2)]))
    monkeypatch.setenv("WORLD_SIZE", "3")
    three = [*dual, *layout(tmp_path, 3, 3), "--gradient_accumulation_steps=6"]
    with pytest.raises(UserError, match="dualpipev: 6 pipeline stages for 5 layers"):
        resolve(parse(three))


def test_groups_of_layers_are_recomputed_in_a_pipeline_only(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpointing_interval 2: without a pipeline .*; write 1 .*stages"):
        resolve(parse([*flags, *grouped(2)]))
    (tmp_path / "ds.json").write_text('{"pipeline": {"stages": 1, "activation_checkpoint_interval": 2}}')
    one = ["--run_type=optimized", f"--deepspeed_config={tmp_path}/ds.json", "--mixed_precision=no"]
    with pytest.raises(UserError, match=r"--activation_checkpointing_interval 2: .* \(in the JSON too\)"):
        resolve(parse([*flags, *one]))
    assert resolve(parse(flags)).config.activation_checkpointing == "none"


def test_the_global_batch_counts_data_parallel_processes(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = parse([*flags, *layout(tmp_path, 2, 4)])
    run = resolve(dataclasses.replace(config, train_micro_batch_size_per_gpu=3))
    assert run.train.global_batch_size == 3 * 2 * 2
    assert run.deepspeed["train_batch_size"] == 12
    assert run.partition is not None
    assert run.partition.stages == 2
