"""What has changed in a checkpoint since it was written is found before it trains, and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_gpt2flash import GPT2FlashConfig, GPT2FlashForCausalLM
from tests.conftest import SMALL, losses, ranks, train
from tests.test_checkpoint import save, states_of
from train.checkpoints import __main__ as command
from train.checkpoints import starting
from train.checkpoints.digests import TensorDigest, digest_of_state
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


def edit_state(step: Path, edit: Callable[[dict[str, Any]], Any], *, with_digest: bool = False) -> None:
    """Change a training state; its own digest is dropped, or `with_digest` written anew, as another version would."""
    state = json.loads((step / "training_state.json").read_text())
    edit(state)
    if state.get("digests"):
        state["digests"]["state"] = digest_of_state(state) if with_digest else None
    (step / "training_state.json").write_text(json.dumps(state))


def forget_digests(run: Path) -> None:
    """Make the checkpoints those of an older version."""
    for step in run.glob("step-*"):
        if (step / "training_state.json").exists():
            edit_state(step, lambda state: state.pop("digests"))


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


def change_state(run: Path) -> None:
    path = run / "step-2" / "training_state.json"
    state = json.loads(path.read_text())
    state["guard"] = {"updates": 1003}
    path.write_text(json.dumps(state))


def break_state(run: Path) -> None:
    path = run / "step-2" / "training_state.json"
    path.write_bytes(path.read_bytes()[:-9])


def shorten(run: Path) -> None:
    path = run / "step-2" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def rename(run: Path) -> None:
    (run / "step-2").rename(run / "step-3")
    (run / "latest").write_text("step-3\n")


def lose_the_state(run: Path) -> None:
    (run / "step-2" / "training_state.json").unlink()


def transpose(run: Path) -> None:
    """Its values are all the same, so that they have the digest still."""
    change(MOMENTS, MOMENT, torch.Tensor.t)(run)


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
    (change_state, ["training_state.json", "has changed"]),
    (break_state, ["training_state.json", "broken JSON"]),
]
FAULTS = [
    (change(WEIGHTS, FIRST, torch.Tensor.bfloat16), [WEIGHTS, FIRST, "BF16"]),
    (transpose, [MOMENTS, MOMENT, "[64, 16]", "[16, 64]"]),
    (lose_a_tensor, [MOMENTS, MOMENT, "is missing"]),
    (shorten, [MOMENTS, "damaged"]),
    (rename, ["step-3", "step 2", "rename it to step-2"]),
    (lose_the_state, ["training_state.json is missing"]),
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


def resume(run: Path, delete_newer: bool = False) -> str:
    """The name of the checkpoint from which the run folder is made ready to resume."""
    start = starting.decide(run, "latest", overwrite=False, delete_newer=delete_newer)
    starting.prepare_run_folder(run, start)
    assert start.checkpoint is not None
    return start.checkpoint.folder.name


# What no digest proves to be damage: it may be intact under another name, or in another version.
NOT_PROVEN = (rename, lose_the_state, transpose)
DAMAGE = [harm for harm, _ in CHANGES + FAULTS if harm not in NOT_PROVEN]


@pytest.mark.parametrize("harm", DAMAGE)
def test_a_damaged_newest_checkpoint_is_put_aside_and_the_run_resumes(
    run: Path, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    harm(run)
    content = {path.name: path.read_bytes() for path in (run / "step-2").iterdir()}
    assert resume(run) == "step-1"
    assert f"{run / 'step-2'} is {run / 'step-2.damaged'} now" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (run / "step-2.damaged").iterdir()} == content
    assert resume(run) == "step-1"
    assert capsys.readouterr().err == "", "nothing is left to say"
    (run / "step-2.damaged").rename(run / "step-2")
    (run / "step-2.damaged").mkdir()
    assert resume(run) == "step-1"
    assert (run / "step-2.damaged-2").is_dir()


def fail_to_read(run: Path) -> None:
    """A real error of reading, where /proc has one: EIO."""
    (run / "step-2" / "config.json").unlink()
    (run / "step-2" / "config.json").symlink_to("/proc/self/mem")


def fail_to_open(run: Path) -> None:
    for name in (WEIGHTS, "training_state.json"):
        (run / "step-2" / name).rename(run / "step-2" / f"moved-{name}")
    (run / "step-2" / WEIGHTS).symlink_to(run / "step-2" / WEIGHTS)
    (run / "step-2" / "training_state.json").symlink_to(run / "step-2" / "training_state.json")


def other_schema(run: Path) -> None:
    edit_state(run / "step-2", lambda state: state.update(seed="1337"), with_digest=True)


def other_tensors(run: Path) -> None:
    """What another version might write: weights in bf16, with the digests that belong to them."""
    change(WEIGHTS, FIRST, torch.Tensor.bfloat16)(run)
    digest = TensorDigest()
    digest.update(load_file(run / "step-2" / WEIGHTS)[FIRST].view(torch.uint8).flatten().numpy())
    edit_state(
        run / "step-2",
        lambda state: state["digests"]["tensors"].update({FIRST: digest.hexdigest()}),
        with_digest=True,
    )


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        (fail_to_read, ["config.json cannot be read: Input/output error"]),
        (fail_to_open, ["training_state.json cannot be read: Too many levels of symbolic links"]),
        (other_schema, ["\"seed\" is '1337'", "not what training writes"]),
        (other_tensors, [FIRST, "BF16"]),
        (rename, ["rename it to step-2"]),
        (lose_the_state, ["training_state.json is missing"]),
        (transpose, ["[64, 16]", "[16, 64]"]),
    ],
)
def test_a_newest_checkpoint_that_is_not_read_is_never_touched_without_a_flag(
    run: Path, harm: Callable[[Path], None], names: list[str]
) -> None:
    harm(run)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with pytest.raises(UserError) as error:
        starting.decide(run, "latest", overwrite=False)
    remedies = ["--delete_newer_checkpoints", f"--resume_from_checkpoint {run / 'step-1'} with another"]
    assert all(name in str(error.value) for name in [*names, *remedies]), str(error.value)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    assert resume(run, delete_newer=True) == "step-1"
    assert [path.name for path in run.glob("*step-*")] == ["step-1"]


def test_a_renamed_checkpoint_resumes_once_it_has_its_name_again(run: Path) -> None:
    rename(run)
    with pytest.raises(UserError, match="rename it to step-2"):
        starting.decide(run, "latest", overwrite=False)
    (run / "step-3").rename(run / "step-2")
    assert resume(run) == "step-2"


def test_a_damaged_checkpoint_is_replaced_with_its_run(run: Path) -> None:
    shorten(run)
    resume(run)
    starting.prepare_run_folder(run, starting.decide(run, None, overwrite=True))
    assert list(run.iterdir()) == []


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
    for step in run.glob("step-*"):
        edit_state(step, lambda state: state["train_data"].pop("samples_sha256"))
    words = [*flags, f"--checkpoint_path={tmp_path}", "--max_steps=9", "--resume_from_checkpoint", "--allow_changes"]
    train(*words, "--train_micro_batch_size_per_gpu=4", cwd=tmp_path)
    assert len(losses(run)) == 9
