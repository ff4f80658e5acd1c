"""Muon for the blocks' matrices: the step, the pair with AdamW as one optimizer, layouts and resuming."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from modeling_gpt2flash import GPT2FlashForCausalLM
from tests.conftest import LOSS_TOLERANCE, losses, ranks, records, torchrun, train
from tests.test_optim import small
from train.optim.muon import Muon, MuonAndAdamW
from train.optim.parameter_groups import build_optimizer, is_hidden_matrix, moments_of
from train.utils.command import run_command

SLOW = pytest.mark.slow
# Newton-Schulz rounds each of its fifteen products to bf16: two steps end 0.03 of a step off those in float64. Without
# Nesterov's term they would 0.3, with a momentum of 0.9 up to 0.09.
BF16 = 0.04


def build(model: GPT2FlashForCausalLM, learning_rate: float = 1e-2) -> MuonAndAdamW:
    pair = build_optimizer(
        model, "muon", learning_rate=learning_rate, weight_decay=0.1, betas=(0.9, 0.95), fused=False
    )
    assert isinstance(pair, MuonAndAdamW)
    return pair


def give_gradients(model: GPT2FlashForCausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def orthogonal(matrix: Tensor) -> Tensor:
    """Keller Jordan's five iterations, in the matrix's own precision."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_two_steps_are_those_written_out_in_float64() -> None:
    model = small()
    pair = build(model)
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    momentum = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    steps = {}
    for seed in (1, 2):  # the second tells Nesterov's momentum from the plain one
        give_gradients(model, seed)
        pair.step()
        for name, parameter in model.named_parameters():
            if not is_hidden_matrix(name):
                continue
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            step = orthogonal(0.05 * gradient + 0.95 * momentum[name])
            before = expected[name] * (1 - 1e-2 * 0.1)
            expected[name] = before - 1e-2 * 0.2 * math.sqrt(max(step.shape)) * step
            steps[name] = expected[name] - before
    assert len(steps) == 8
    for name, parameter in model.named_parameters():
        if name in steps:
            assert (parameter - expected[name]).norm() < BF16 * steps[name].norm(), name


def test_the_rest_is_adamws() -> None:
    ours, theirs = small(), small()
    pair = build(ours)
    rest = [p for name, p in theirs.named_parameters() if not is_hidden_matrix(name)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, 1e-2, (0.9, 0.95))
    for seed in (1, 2):
        for model, optimizer in ((ours, pair), (theirs, adamw)):
            give_gradients(model, seed)
            optimizer.step()
    for (name, ours_), theirs_ in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_, theirs_) != is_hidden_matrix(name), name


def test_a_matrix_and_its_transpose_take_the_same_step() -> None:
    """So Conv1D's layout (in, out) trains as nn.Linear's (out, in)."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn((24, 8), generator=generator) for _ in range(2))
    steps = []
    for turned in (lambda t: t.clone(), lambda t: t.T.contiguous()):
        parameter = torch.nn.Parameter(turned(weight))
        parameter.grad = turned(gradient)
        Muon([parameter], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
        steps.append(turned(parameter.detach()) - turned(turned(weight)))
    assert (steps[0] - steps[1]).norm() < BF16 * steps[0].norm()
    # The root mean square of a step at rate 1: Newton-Schulz leaves singular values between 0.7 and 1.2.
    assert 0.14 < steps[0].square().mean().sqrt() < 0.24


def test_the_learning_rate_of_all_groups_reaches_both(tmp_path: Path) -> None:
    model = small()
    pair = build(model)
    give_gradients(model, 1)
    pair.step()
    pair.load_state_dict(pair.state_dict())  # as Accelerate does on taking an optimizer in
    before = [p.detach().clone() for p in model.parameters()]
    for group in pair.param_groups:
        group["lr"] = 0.0
    pair.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for name, parameter in model.named_parameters():
        assert set(pair.state[parameter]) - {"step"} == set(moments_of("muon", name))
    pair.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_the_matrices_are_the_four_of_each_block() -> None:
    names = [name for name, _ in small().named_parameters() if is_hidden_matrix(name)]
    four = ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
    assert names == [f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in four]
    assert {moments_of("adamw", name) for name in names} == {("exp_avg", "exp_avg_sq")}


# Complete runs


@pytest.fixture(scope="module")
def muon(flags: list[str]) -> list[str]:
    # Orthogonalising in bf16 makes much of rounding; at a small rate its effect on the losses stays below 1e-5.
    return [*flags, "--optimizer=muon", "--learning_rate=1e-3", "--save_interval=4"]


@pytest.fixture(scope="module")
def alone(muon: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process, with checkpoints after steps 4 and 8."""
    folder = tmp_path_factory.mktemp("muon")
    train(*muon, f"--checkpoint_path={folder}", cwd=folder)
    return folder / "baseline"


@SLOW
def test_it_learns_and_resumes_bit_for_bit(muon: list[str], alone: Path, finished: Path, tmp_path: Path) -> None:
    assert losses(alone)[0] == losses(finished)[0]
    assert losses(alone)[-1] < losses(alone)[0] - 0.02
    resumed = [*muon, f"--resume_from_checkpoint={alone}/step-4", f"--checkpoint_path={tmp_path}"]
    train(*resumed, cwd=tmp_path)
    assert [(r["loss"], r["grad_norm"]) for r in records(tmp_path / "baseline")] == [
        (r["loss"], r["grad_norm"]) for r in records(alone)
    ]
    for file in ("model.safetensors", "optimizer.safetensors"):
        once, again = (load_file(folder / "step-8" / file) for folder in (alone, tmp_path / "baseline"))
        assert once.keys() == again.keys()
        assert all(torch.equal(once[name], again[name]) for name in once)


@SLOW
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_processes_compute_what_one_does_and_each_resumes_from_the_other(
    muon: list[str], alone: Path, tmp_path: Path, layout: str
) -> None:
    two = [*muon, "--train_micro_batch_size_per_gpu=2"]
    ranks(*two, f"--checkpoint_path={tmp_path}/two", cwd=tmp_path, fsdp2=layout == "fsdp2")
    check_same(tmp_path / "two" / "baseline", alone)
    there = [*two, f"--resume_from_checkpoint={alone}/step-4", f"--checkpoint_path={tmp_path}/there"]
    ranks(*there, cwd=tmp_path, fsdp2=layout == "fsdp2")
    check_same(tmp_path / "there" / "baseline", alone)
    half = tmp_path / "two" / "baseline" / "step-4"
    back = [*muon, f"--resume_from_checkpoint={half}", f"--checkpoint_path={tmp_path}/back"]
    train(*back, cwd=tmp_path)
    check_same(tmp_path / "back" / "baseline", alone)


@SLOW
def test_a_step_on_shards_is_bit_for_bit_that_of_the_full_matrix(tmp_path: Path) -> None:
    torchrun("-m", "tests.test_muon", cwd=tmp_path)


def compare_shards() -> None:
    """Of two processes: rows that divide evenly and not, in all three proportions."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 192), (256, 64), (64, 64), (65, 3)):
        start, *gradients = (torch.randn(shape, generator=generator) for _ in range(4))
        full = torch.nn.Parameter(start.clone())
        sharded = torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
        ours, theirs = Muon([sharded]), torch.optim.Muon([full])
        ours.state[sharded]["momentum_buffer"] = torch.zeros_like(sharded)
        for gradient in gradients:
            full.grad, sharded.grad = gradient, distribute_tensor(gradient, mesh, [Shard(0)])
            theirs.step()
            ours.step()
        momentum = ours.state[sharded]["momentum_buffer"]
        assert momentum.placements == sharded.placements
        assert torch.equal(sharded.full_tensor(), full)
        assert torch.equal(momentum.full_tensor(), theirs.state[full]["momentum_buffer"])
    dist.destroy_process_group()


def check_same(run: Path, alone: Path) -> None:
    assert losses(run) == pytest.approx(losses(alone), abs=LOSS_TOLERANCE)


if __name__ == "__main__":
    run_command(compare_shards)  # in a job, the interpreter may abort when it frees the process group
