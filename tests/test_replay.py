"""A step computed again: the recorded loss, whatever the layout was, and where a number that is not finite arises."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import half_finished, ranks, train
from tests.forks import run_module
from tests.jobs import layout
from tests.tiny_gpt2 import make_ours
from train.replay.report import sequence_of
from train.replay.search import Found, ValueSearch


def replay(*words: object, cwd: Path, check: bool = True) -> str:
    done = run_module("train.replay", [str(word) for word in words], cwd, check)
    return done.stdout + done.stderr


def losses_of(said: str) -> tuple[float, float]:
    found = re.search(r"^loss (\S+), recorded ([\d.e+-]+);", said, re.MULTILINE)
    assert found, said
    return float(found[1]), float(found[2])


# The search


def search(model: GPT2FlashForCausalLM, backward: bool = True) -> ValueSearch:
    ids = torch.arange(24).reshape(2, 12)
    with ValueSearch(model) as found:
        loss = model(input_ids=ids, shift_labels=ids, use_cache=False).loss
        if backward:
            loss.backward()
    return found


def test_what_arises_in_the_forward_pass_is_found_where_it_arises() -> None:
    model = make_ours()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[:, 3] = 3e38  # finite; its product is not
    first = search(model, backward=False).first
    assert first is not None
    assert (first.phase, first.module) == ("forward", "transformer.h.1.mlp.c_fc")
    assert first.operator in ("aten::addmm", "aten::mm")
    assert first.shape[0] == 24
    assert first.index[1] == 3


def test_what_arises_in_the_backward_pass_is_found_where_it_arises() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient / torch.zeros_like(gradient)

    model = make_ours()
    forward = model.transformer.h[0].mlp.c_proj.forward
    model.transformer.h[0].mlp.c_proj.forward = lambda hidden: Broken.apply(forward(hidden))
    first = search(model).first
    assert first is not None
    assert (first.phase, first.module, first.operator) == ("backward", "transformer.h.0.mlp.c_proj", "aten::div")


def test_masks_and_what_is_never_computed_are_not_found() -> None:
    found = search(make_ours(attn_implementation="eager"))
    assert found.first is None
    assert found.micro_batch == 0
    assert 0 < found.largest[-1].value <= found.largest[0].value < 1e6


@pytest.mark.parametrize(
    ("shape", "index", "expected"),
    [
        ((2, 12, 16), (1, 7, 3), (1, 7)),
        ((24, 16), (19, 3), (1, 7)),
        ((2, 4, 12, 12), (1, 0, 7, 2), (1, 7)),
        ((16, 64), (1, 7), (None, None)),
        ((), (), (None, None)),
    ],
)
def test_the_sequence_of_a_value(
    shape: tuple[int, ...], index: tuple[int, ...], expected: tuple[int | None, int | None]
) -> None:
    assert sequence_of(Found(0.0, "forward", "", "aten::mm", shape, index, 0), 2, 12) == expected


# Runs


def test_a_step_without_a_checkpoint_before_it_is_refused(finished: Path, tmp_path: Path) -> None:
    said = replay(finished, "--step", 4, cwd=tmp_path, check=False)
    assert "no checkpoint before step 4 (it has step-4, step-8); ask for a later --step" in said


@pytest.mark.parametrize("step", [5, 7])
def test_the_loss_of_a_step_is_the_recorded_one(finished: Path, tmp_path: Path, step: int) -> None:
    said = replay(finished, "--step", step, cwd=tmp_path)
    ours, recorded = losses_of(said)
    assert ours == recorded
    assert f"step {step} of {finished}, computed from step-4" in said
    assert "every value is finite; the largest:" in said
    assert re.search(r"the highest loss of a micro-batch: [\d.]+, rank 0, micro-batch 1", said)
    assert re.search(r"sequence 4: tokens [\d,]+ to [\d,]+ of \S+train.bin", said)


def test_dropout_and_skipped_updates_are_the_same(flags: list[str], tmp_path: Path) -> None:
    run = [*flags, "--dropout=0.1", "--save_interval=2", "--max_new_tokens=0", f"--checkpoint_path={tmp_path}"]
    planted = ["4", "0", "transformer.h.1.mlp", "nan", "train", *run, "--on_nonfinite=skip"]
    planted += ["--train_micro_batch_size_per_gpu=2", "--gradient_accumulation_steps=2"]
    run_module("tests.planted", planted, tmp_path, check=True)
    for folder in (tmp_path / "baseline").glob("step-*"):  # so that the skipped step is computed again
        if folder.name in ("step-4", "step-6", "step-8"):
            folder.rename(folder.with_name(f"moved-{folder.name}"))
    said = replay(tmp_path / "baseline", "--step", 7, cwd=tmp_path)
    assert "computed from step-2" in said
    ours, recorded = losses_of(said)
    assert ours == recorded


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to change."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_damaged_checkpoint_is_not_used(flags: list[str], tmp_path: Path) -> None:
    train(*flags, "--save_interval=2", f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    run = tmp_path / "baseline"
    weights = run / "step-4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    said = replay(run, "--step", 6, cwd=tmp_path)
    assert re.search(r"step-4/model.safetensors: \S+ has changed since it was written; not used", said)
    assert "computed from step-2" in said
    ours, recorded = losses_of(said)
    assert ours == recorded
    weights.unlink()
    (run / "step-2" / "training_state.json").write_text("{}")
    refused = replay(run, "--step", 5, cwd=tmp_path, check=False)
    assert f"{run} has no other intact checkpoint before step 5" in refused


def test_the_rates_are_the_recorded_ones_and_other_flags_are_said(
    flags: list[str], finished: Path, tmp_path: Path
) -> None:
    run = half_finished(finished, tmp_path)
    words = [*flags, f"--checkpoint_path={tmp_path}", "--resume_from_checkpoint", "--allow_changes"]
    train(*words, "--learning_rate=0.02", cwd=tmp_path)
    said = replay(run, "--step", 7, cwd=tmp_path)
    ours, recorded = losses_of(said)
    assert ours == recorded, "steps 5 and 6 have another rate than the flags of step-4"
    assert "other flags" not in said
    shutil.rmtree(run / "step-8")
    (run / "metrics.json").unlink()
    (run / "latest").write_text("step-4\n")
    train(*words, "--max_grad_norm=0", cwd=tmp_path)
    said = replay(run, "--step", 7, cwd=tmp_path)
    assert "step-8 was computed with other flags than step-4" in said
    assert re.search(r"max_grad_norm\s*\|\s*1\.0\s*\|\s*0\.0\s*\|", said)


def test_a_lost_record_is_said(run: Path, tmp_path: Path) -> None:
    log = run / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if not line.startswith('{"step": 6,')))
    said = replay(run, "--step", 7, cwd=tmp_path)
    assert f"{log} has no record of step 6: computed as if no update was skipped, at the learning rate" in said
    assert "no record" not in replay(run, "--step", 9, cwd=tmp_path), "the step after the last has none"


def test_another_token_file_is_refused(finished: Path, corpus: Path, tmp_path: Path) -> None:
    said = replay(finished, "--step", 6, "--train_data_path", corpus / "val.bin", cwd=tmp_path, check=False)
    assert "is not the file that the run was trained on; name that one with --train_data_path" in said


@pytest.mark.faults
@pytest.mark.parametrize("name", ["baseline", "zero2", "zero3", "fsdp2", "pipeline", "dualpipev"])
def test_a_planted_nan_of_every_layout_is_found(flags: list[str], tmp_path: Path, name: str) -> None:
    own = layout({"fsdp2": "baseline", "dualpipev": "pipeline"}.get(name, name))
    if name == "dualpipev":
        own += ["--pipeline_schedule=dualpipev", "--train_micro_batch_size_per_gpu=1"]
        own += ["--gradient_accumulation_steps=4"]
    words = [*flags, *own, "--dropout=0.1", "--save_interval=2", "--max_new_tokens=0", f"--checkpoint_path={tmp_path}"]
    ranks(*words, cwd=tmp_path, fsdp2=name == "fsdp2")
    run = tmp_path / ("baseline" if name in ("baseline", "fsdp2") else "optimized")
    for step in (5, 6, 7):  # 6 follows an update of this process's own
        ours, recorded = losses_of(replay(run, "--step", step, cwd=tmp_path))
        assert ours == pytest.approx(recorded, abs=3e-6)
    planted = ["7", "0", "transformer.h.1.mlp", "nan", "replay", str(run), "--step=7"]
    found = run_module("tests.planted", planted, tmp_path, check=True)
    assert "nan in the forward pass of transformer.h.1.mlp: aten::mul" in found.stdout
    last = {"pipeline": "rank 0, micro-batch 2", "dualpipev": "rank 0, micro-batch 4"}
    assert last.get(name, "rank 1, micro-batch 1") in found.stdout


@pytest.mark.faults
def test_in_bf16_the_loss_is_the_recorded_one_up_to_rounding(flags: list[str], tmp_path: Path) -> None:
    for kind in (["--run_type=baseline"], ["--run_type=optimized", "--deepspeed_config=zero2.json"]):
        train(
            *flags, *kind, "--mixed_precision=bf16", "--save_interval=4", f"--checkpoint_path={tmp_path}", cwd=tmp_path
        )
        ours, recorded = losses_of(replay(tmp_path / kind[0].partition("=")[2], "--step", 5, cwd=tmp_path))
        assert ours == pytest.approx(recorded, abs=2e-2)
