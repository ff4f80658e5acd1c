"""Every launcher and layout computes what one process computes: real processes over gloo, real DeepSpeed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import LOSS_TOLERANCE, ROOT, accelerate, command, free_port, losses, python, records


def check_parity(run: Path, finished: Path) -> None:
    assert losses(run) == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    for ours, theirs in zip(records(run), records(finished), strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours.get("val_loss") == pytest.approx(theirs.get("val_loss"), abs=LOSS_TOLERANCE)
    assert json.loads((run / "metrics.json").read_text())["world_size"] == 2
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, finished))
    assert list(weights) == list(expected)
    # Not the key biases: their gradient is zero but for rounding, which AdamW makes into steps of the learning rate.
    for name in weights:
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def two_processes(flags: list[str]) -> list[str]:
    """The flags of the `finished` run, its global batch of 4 sequences shared by two processes."""
    return [*flags, "--train_micro_batch_size_per_gpu=2", "--mixed_precision=no", "--save_interval=4"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_on_two_processes_computes_what_one_process_does(
    two_processes: list[str], finished: Path, tmp_path: Path, stage: int
) -> None:
    accelerate(
        *two_processes,
        "--run_type=optimized",
        "--eval_interval=4",
        f"--deepspeed_config={ROOT}/ds_configs/zero{stage}.json",
        f"--checkpoint_path={tmp_path}",
        cwd=tmp_path,
    )
    check_parity(tmp_path / "optimized", finished)


def test_a_sharded_checkpoint_goes_on_in_another_layout(
    two_processes: list[str], finished: Path, tmp_path: Path
) -> None:
    zero3 = [f"--deepspeed_config={ROOT}/ds_configs/zero3.json", "--run_type=optimized"]
    accelerate(*two_processes, *zero3, f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    half = tmp_path / "optimized" / "step-4"
    alone = [*two_processes, "--train_micro_batch_size_per_gpu=4", f"--resume_from_checkpoint={half}"]
    python("-m", "train", *alone, f"--checkpoint_path={tmp_path}/alone", cwd=tmp_path)
    assert losses(tmp_path / "alone" / "baseline") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    accelerate(
        *two_processes,
        "--run_type=optimized",
        f"--deepspeed_config={ROOT}/ds_configs/zero1.json",
        f"--resume_from_checkpoint={finished}/step-4",
        f"--checkpoint_path={tmp_path}/back",
        cwd=tmp_path,
    )
    assert losses(tmp_path / "back" / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


def test_torchrun_trains_the_baseline_data_parallel(two_processes: list[str], finished: Path, tmp_path: Path) -> None:
    torchrun = ["torchrun", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend", "c10d"]
    command(*torchrun, "-m", "train", *two_processes, f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    assert losses(tmp_path / "baseline") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_plain_pytorch_on_two_processes_computes_what_one_process_does(
    two_processes: list[str], finished: Path, tmp_path: Path, layout: str
) -> None:
    flags = [*two_processes, "--eval_interval=4", f"--checkpoint_path={tmp_path}"]
    accelerate(*flags, cwd=tmp_path, layout=layout)
    check_parity(tmp_path / "baseline", finished)


def test_the_deepspeed_launcher_starts_the_same_run(two_processes: list[str], finished: Path, tmp_path: Path) -> None:
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "train"]
    zero2 = ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/zero2.json"]
    command(*launch, *two_processes, *zero2, f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    assert losses(tmp_path / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


def test_bf16_stays_close_and_its_masters_are_kept(flags: list[str], finished: Path, tmp_path: Path) -> None:
    zero2 = ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/zero2.json", "--mixed_precision=bf16"]
    python("-m", "train", *flags, *zero2, f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    assert losses(tmp_path / "optimized") == pytest.approx(losses(finished), abs=0.02)
    weight = load_file(tmp_path / "optimized" / "model.safetensors")["transformer.wte.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float()), "the fp32 masters, not the rounded weights, are saved"


def test_the_baseline_refuses_a_launcher_that_asks_for_deepspeed(flags: list[str], tmp_path: Path) -> None:
    done = accelerate(*flags, f"--checkpoint_path={tmp_path}", cwd=tmp_path, processes=1, check=False)
    assert done.returncode != 0
    assert "error: --run_type baseline: the launcher asks for DeepSpeed" in done.stderr
    assert not (tmp_path / "baseline").exists()


def test_a_mistake_is_said_once_whatever_the_number_of_processes(two_processes: list[str], tmp_path: Path) -> None:
    done = accelerate(*two_processes, "--run_type=optimized", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: --run_type optimized: trains through DeepSpeed") == 1
