"""What has changed in a checkpoint since it was written is found before it trains, and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from tests.conftest import SMALL, losses, ranks, train
from tests.test_checkpoint import save, states_of
from train.checkpoints import __main__ as command
from train.checkpoints import starting
from train.checkpoints.digests import TensorDigest
from train.utils.errors import UserError

FIRST, MOMENT = "transformer.h.0.attn.c_attn.weight", "exp_avg_sq.transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def model() -> GPT2FlashForCausalLM:
    torch.manual_seed(0)
    return GPT2FlashForCausalLM(GPT2FlashConfig(**SMALL, vocab_size=101))


@pytest.fixture
def run(tmp_path: Path, model: GPT2FlashForCausalLM) -> Path:
    """A run folder with two checkpoints."""
    for step in (1, 2):
        save(tmp_path / "run", model, step)
    return tmp_path / "run"


def forget_digests(run: Path) -> None:
    """Make the checkpoints those of an older version."""
    for file in run.glob("step-*/training_state.json"):
        state = json.loads(file.read_text())
        del state["digests"]
        file.write_text(json.dumps(state))


def change(file: str, name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """The harm of writing another tensor, in a file that is a good safetensors file otherwise."""

    def harm(run: Path) -> None:
        path = run / "step-2" / file
        tensors = {key: value.clone() for key, value in load_file(path).items()}
        path.unlink()  # another name of it is in the run folder
        save_file(tensors | {name: function(tensors[name]).contiguous()}, path, {"format": "pt"})

    return harm


def flip_a_bit(tensor: torch.Tensor) -> torch.Tensor:
    bits = tensor.clone().view(torch.int32)
    bits.flatten()[7] ^= 1
    return bits.view(torch.float32)


def change_config(run: Path) -> None:
    path = run / "step-2" / "config.json"
    config = json.loads(path.read_text()) | {"layer_norm_epsilon": 1e-3}
    path.unlink()
    path.write_text(json.dumps(config))


def shorten(run: Path) -> None:
    path = run / "step-2" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def rename(run: Path) -> None:
    (run / "step-2").rename(run / "step-3")
    (run / "latest").write_text("step-3\n")


def lose_a_tensor(run: Path) -> None:
    path = run / "step-2" / "optimizer.safetensors"
    save_file({key: value.clone() for key, value in load_file(path).items() if key != MOMENT}, path)


WEIGHTS, MOMENTS = "model.safetensors", "optimizer.safetensors"
# What is found by digests alone, and what is wrong in itself.
CHANGES = [
    (change(WEIGHTS, FIRST, flip_a_bit), [WEIGHTS, FIRST, "has changed"]),
    (change(MOMENTS, MOMENT, flip_a_bit), [MOMENTS, MOMENT, "has changed"]),
    (change(WEIGHTS, FIRST, lambda weight: weight.bfloat16().float()), [WEIGHTS, FIRST, "has changed"]),
    (change_config, ["config.json", "has changed"]),
]
FAULTS = [
    (change(WEIGHTS, FIRST, torch.Tensor.bfloat16), [WEIGHTS, FIRST, "BF16"]),
    (change(MOMENTS, MOMENT, torch.Tensor.t), [MOMENTS, MOMENT, "[64, 16]", "[16, 64]"]),
    (lose_a_tensor, [MOMENTS, MOMENT, "is missing"]),
    (shorten, [MOMENTS, "damaged"]),
    (rename, ["step-3", "step 2", "rename it to step-2"]),
    (lambda run: (run / "step-2" / "training_state.json").unlink(), ["training_state.json is missing"]),
    (lambda run: (run / "step-2" / MOMENTS).unlink(), [MOMENTS, "No such file"]),
]
NOT_FINITE = [
    change(WEIGHTS, FIRST, lambda weight: weight.index_fill(0, torch.tensor(3), torch.nan)),
    change(MOMENTS, MOMENT, lambda moment: moment.index_fill(0, torch.tensor(0), torch.inf)),
]


@pytest.mark.parametrize(("harm", "names"), CHANGES + FAULTS)
def test_a_damaged_step_is_refused_and_the_last_good_one_named(
    run: Path, harm: Callable[[Path], None], names: list[str]
) -> None:
    harm(run)
    damaged = run / ("step-3" if harm is rename else "step-2")
    with pytest.raises(UserError) as error:
        starting.find(str(damaged), run)
    assert all(name in str(error.value) for name in [*names, f"resume from {run / 'step-1'}"]), str(error.value)


@pytest.mark.parametrize(("harm", "names"), CHANGES + FAULTS)
def test_the_latest_is_the_newest_intact_one(
    run: Path, harm: Callable[[Path], None], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run)
    assert starting.find("latest", run).folder == run / "step-1"
    said = capsys.readouterr().err
    assert all(name in said for name in [*names, f"resuming from {run / 'step-1'}"]), said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("harm", "names"), FAULTS + [(harm, ["NaN or infinity"]) for harm in NOT_FINITE])
def test_faults_are_found_without_digests(run: Path, harm: Callable[[Path], None], names: list[str]) -> None:
    harm(run)
    forget_digests(run)
    assert starting.find(str(run), run).folder == run / "step-1"
    (run / "step-1" / MOMENTS).unlink()
    with pytest.raises(UserError) as error:
        starting.find("latest", run)
    assert all(name in str(error.value) for name in [*names, "--overwrite"]), str(error.value)


def test_a_checkpoint_of_an_older_version_resumes_and_says_what_is_not_checked(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_digests(run)
    assert starting.find("latest", run).step == 2
    assert "step-2 was written by an older version, without digests" in capsys.readouterr().err


def test_a_run_without_latest_resumes_from_its_newest_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "latest").unlink()
    assert starting.find("latest", run).step == 2
    assert "latest is missing" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("weight", torch.nan), ("exp_avg", -torch.inf), ("exp_avg_sq", torch.inf)])
def test_a_checkpoint_that_is_not_finite_is_never_written(
    run: Path, model: GPT2FlashForCausalLM, key: str, value: float
) -> None:
    def spoil(name: str, tensors: dict[str, torch.Tensor]) -> None:
        if name == FIRST:
            tensors[key] = tensors[key].clone()
            tensors[key][2, 3] = value

    with pytest.raises(UserError, match=rf"{FIRST.replace('.', '[.]')} holds NaN or infinity after step 3"):
        save(run, model, 3, states=states_of(model, 3, change=spoil))
    assert sorted(path.name for path in run.glob("*step-*")) == ["step-1", "step-2"]
    assert (run / "latest").read_text() == "step-2\n"


def test_values_whose_sum_overflows_are_finite() -> None:
    digest = TensorDigest()
    digest.update(torch.full((4,), 3e38).numpy())
    assert digest.finite
    digest.update(torch.tensor([torch.inf, -torch.inf]).numpy())
    digest.update(torch.ones(4).numpy())
    assert not digest.finite


def test_verify_names_every_fault(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--verify", str(run)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(run / "step-1"), str(run / "step-2")]
    assert all("as they were written" in line for line in lines)
    change(WEIGHTS, FIRST, flip_a_bit)(run)
    change(MOMENTS, MOMENT, flip_a_bit)(run)
    with pytest.raises(UserError) as error:
        command.main(["--verify", str(run)])
    assert [name in line for line, name in zip(str(error.value).splitlines(), (FIRST, MOMENT), strict=True)] == [
        True,
        True,
    ]
    assert capsys.readouterr().out.startswith(f"{run / 'step-1'}: ")


def test_verify_checks_latest_and_wants_checkpoints(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "step-2")
    with pytest.raises(UserError, match="latest names step-2, which is missing: write step-1 into it"):
        command.main(["--verify", str(run)])
    with pytest.raises(UserError, match="holds no checkpoint"):
        command.main(["--verify", str(tmp_path)])


def test_all_ranks_fall_back_to_the_same_checkpoint(flags: list[str], finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "baseline"
    shutil.copytree(finished, run)
    (run / "latest").write_text("step-4\n")
    (run / "metrics.json").unlink()
    weights = run / "step-8" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    (run / "latest").write_text("step-8\n")
    words = [*flags, f"--checkpoint_path={tmp_path}", "--train_micro_batch_size_per_gpu=2", "--resume_from_checkpoint"]
    done = ranks(*words, cwd=tmp_path)
    assert done.stdout.count(f"resuming from {run / 'step-4'}, the newest checkpoint that is intact") == 1
    assert losses(run) == pytest.approx(losses(finished), abs=1e-5)


def test_the_export_of_a_damaged_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    from train.export.nanogpt_file import find_training_state

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    moments = run / "step-8" / MOMENTS
    moments.write_bytes(moments.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"optimizer\.safetensors is damaged"):
        find_training_state(str(run))


def test_data_of_an_older_checkpoint_is_compared_by_what_it_recorded(
    flags: list[str], finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "baseline"
    shutil.copytree(finished, run)
    for file in run.glob("step-*/training_state.json"):
        state = json.loads(file.read_text())
        del state["train_data"]["samples_sha256"]
        file.write_text(json.dumps(state))
    words = [*flags, f"--checkpoint_path={tmp_path}", "--max_steps=9", "--resume_from_checkpoint", "--allow_changes"]
    train(*words, "--train_micro_batch_size_per_gpu=4", cwd=tmp_path)
    assert len(losses(run)) == 9
