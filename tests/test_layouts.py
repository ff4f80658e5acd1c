"""Every launcher and layout computes what one process computes: real processes over gloo, real DeepSpeed."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import (
    LOSS_TOLERANCE,
    ROOT,
    accelerate,
    check_parity,
    command,
    engine_steps,
    free_port,
    losses,
    ranks,
    torchrun,
    train,
)


@pytest.fixture(scope="module")
def two_processes(flags: list[str]) -> list[str]:
    """The flags of the `finished` run, its global batch of 4 sequences shared by two processes."""
    return [*flags, "--train_micro_batch_size_per_gpu=2", "--mixed_precision=no", "--save_interval=4"]


SLOW = pytest.mark.slow
ENGINES = {
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero1_offload": "ZeRO-1 with its optimizer on the CPU",
    "zero2_offload": "ZeRO-2 with its optimizer on the CPU",
    "zero3_offload": "ZeRO-3 with its optimizer on the CPU",
}


@pytest.mark.parametrize("engine", [pytest.param(name, marks=SLOW if "offload" in name else ()) for name in ENGINES])
def test_zero_on_two_processes_computes_what_one_process_does(
    two_processes: list[str], finished: Path, tmp_path: Path, engine: str
) -> None:
    start = accelerate if engine == "zero2" else ranks
    done = start(
        *two_processes,
        "--run_type=optimized",
        "--eval_interval=4",
        f"--deepspeed_config={ROOT}/ds_configs/{engine}.json",
        f"--checkpoint_path={tmp_path}",
        cwd=tmp_path,
    )
    assert f"{ENGINES[engine]} on 2 processes" in done.stdout + done.stderr
    check_parity(tmp_path / "optimized", finished)


STYLES = ("deepspeed_fields", "deepspeed_json")


def test_every_shipped_file_is_tested() -> None:
    assert {path.stem for path in (ROOT / "ds_configs").glob("*.json")} == {*ENGINES, "pipeline"}
    launchers = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert launchers == {"one_process", "ddp", "fsdp2", "deepspeed", "deepspeed_machines", *STYLES}


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("json", [[], ["--deepspeed_config=ds_configs/zero2.json"]], ids=["alone", "beside a JSON"])
def test_deepspeed_may_be_set_by_the_launchers_file(
    two_processes: list[str], finished: Path, tmp_path: Path, style: str, json: list[str]
) -> None:
    """In both of Accelerate's styles; the JSON, which is not in this folder, is the shipped one."""
    flags = [*two_processes, "--run_type=optimized", "--eval_interval=4", *json, f"--checkpoint_path={tmp_path}"]
    done = accelerate(*flags, cwd=tmp_path, layout=style)
    assert "ZeRO-2 on 2 processes" in done.stdout + done.stderr
    check_parity(tmp_path / "optimized", finished)


@pytest.mark.slow
def test_numbers_in_the_launchers_fields_are_the_runs(flags: list[str], finished: Path, tmp_path: Path) -> None:
    written = yaml.safe_load((ROOT / "accelerate_configs" / "deepspeed_fields.yaml").read_text())
    written["deepspeed_config"] |= {"zero_stage": 1, "gradient_accumulation_steps": 2, "gradient_clipping": "auto"}
    written |= {"num_processes": 1, "mixed_precision": "no"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(written))
    launch = ["accelerate", "launch", "--config_file", "own.yaml", "--main_process_port", 0, "-m", "train", *flags]
    launch += ["--run_type=optimized", f"--checkpoint_path={tmp_path}"]
    done = command(*launch, "--train_micro_batch_size_per_gpu=2", cwd=tmp_path)
    assert "ZeRO-1 on 1 process" in done.stdout + done.stderr
    assert losses(tmp_path / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    refused = command(*launch, "--gradient_accumulation_steps=4", "--overwrite", cwd=tmp_path, check=False)
    assert "the launcher's deepspeed_config" in refused.stderr
    assert "--gradient_accumulation_steps is 4" in refused.stderr
    written["deepspeed_config"]["gradient_accumulation_steps"] = "auto"
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(written))
    command(
        *launch, "--gradient_accumulation_steps=4", "--train_micro_batch_size_per_gpu=1", "--overwrite", cwd=tmp_path
    )
    assert losses(tmp_path / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_the_json_may_be_named_in_the_launchers_file(flags: list[str], finished: Path, tmp_path: Path) -> None:
    """As `deepspeed_config_file`, Accelerate's own way; the flag may then only repeat it."""
    written = yaml.safe_load((ROOT / "accelerate_configs" / "deepspeed.yaml").read_text())
    written |= {"deepspeed_config": {"deepspeed_config_file": f"{ROOT}/ds_configs/zero1.json"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(written))
    launch = ["accelerate", "launch", "--config_file", "own.yaml", "-m", "train", *flags, "--run_type=optimized"]
    launch += ["--mixed_precision=no", f"--checkpoint_path={tmp_path}"]
    done = command(*launch, cwd=tmp_path)
    assert "ZeRO-1 on 1 process" in done.stdout + done.stderr
    assert losses(tmp_path / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    refused = command(*launch, f"--deepspeed_config={ROOT}/ds_configs/zero2.json", cwd=tmp_path, check=False)
    assert "the launcher's deepspeed_config_file is" in refused.stderr


def test_a_sharded_checkpoint_goes_on_in_another_layout(
    two_processes: list[str], finished: Path, tmp_path: Path
) -> None:
    zero3 = [f"--deepspeed_config={ROOT}/ds_configs/zero3.json", "--run_type=optimized"]
    ranks(*two_processes, *zero3, f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    half = tmp_path / "optimized" / "step-4"
    alone = [*two_processes, "--train_micro_batch_size_per_gpu=4", f"--resume_from_checkpoint={half}"]
    train(*alone, f"--checkpoint_path={tmp_path}/alone", cwd=tmp_path)
    assert losses(tmp_path / "alone" / "baseline") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    ranks(
        *two_processes,
        "--run_type=optimized",
        f"--deepspeed_config={ROOT}/ds_configs/zero1.json",
        f"--resume_from_checkpoint={finished}/step-4",
        f"--checkpoint_path={tmp_path}/back",
        cwd=tmp_path,
    )
    assert losses(tmp_path / "back" / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


def test_torchrun_trains_the_baseline_data_parallel(two_processes: list[str], finished: Path, tmp_path: Path) -> None:
    """With the masks of dropout that one process draws for the same micro-batches."""
    words = [*two_processes, "--dropout=0.1"]
    torchrun("-m", "train", *words, f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    alone = [*words, "--gradient_accumulation_steps=2", f"--checkpoint_path={tmp_path}/alone"]
    train(*alone, cwd=tmp_path)
    ours = losses(tmp_path / "baseline")
    assert ours == pytest.approx(losses(tmp_path / "alone" / "baseline"), abs=LOSS_TOLERANCE)
    assert ours != pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@pytest.mark.parametrize(("layout", "wrapping"), [pytest.param("ddp", "DDP", marks=SLOW), ("fsdp2", "FSDP2")])
def test_plain_pytorch_on_two_processes_computes_what_one_process_does(
    two_processes: list[str], finished: Path, tmp_path: Path, layout: str, wrapping: str
) -> None:
    flags = [*two_processes, "--eval_interval=4", f"--checkpoint_path={tmp_path}"]
    done = accelerate(*flags, cwd=tmp_path, layout=layout)
    assert f"{wrapping} on 2 processes" in done.stdout + done.stderr
    check_parity(tmp_path / "baseline", finished)


@pytest.mark.slow
def test_fsdp2_goes_on_from_any_layout_and_any_layout_from_it(
    two_processes: list[str], finished: Path, tmp_path: Path
) -> None:
    there = [*two_processes, f"--resume_from_checkpoint={finished}/step-4", f"--checkpoint_path={tmp_path}/there"]
    ranks(*there, "--save_interval=2", cwd=tmp_path, fsdp2=True)
    assert losses(tmp_path / "there" / "baseline") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    back = [*two_processes, f"--resume_from_checkpoint={tmp_path}/there/baseline/step-6"]
    train(*back, "--train_micro_batch_size_per_gpu=4", f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    assert losses(tmp_path / "baseline") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_fsdp2_in_bf16_stays_close(two_processes: list[str], finished: Path, tmp_path: Path) -> None:
    flags = [*two_processes, "--mixed_precision=bf16", "--loss_chunk_size=16", f"--checkpoint_path={tmp_path}"]
    done = ranks(*flags, "--activation_checkpointing=full", cwd=tmp_path, fsdp2=True)
    assert "--loss_chunk_size 16 has no effect: FSDP2 computes the full logits" in done.stdout + done.stderr
    assert losses(tmp_path / "baseline") == pytest.approx(losses(finished), abs=0.02)


@pytest.mark.slow
def test_one_process_may_be_launched_too(flags: list[str], finished: Path, tmp_path: Path) -> None:
    accelerate(*flags, f"--checkpoint_path={tmp_path}", cwd=tmp_path, layout="one_process", processes=1)
    assert losses(tmp_path / "baseline") == losses(finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"fsdp_version": 1}, ["fsdp_version is 1", "write fsdp_version: 2"]),
        ({"fsdp_auto_wrap_policy": "SIZE_BASED_WRAP"}, ["fsdp_auto_wrap_policy is SIZE_BASED_WRAP"]),
        ({"fsdp_offload_params": True}, ["fsdp_offload_params is true", "zero3_offload.json"]),
    ],
)
def test_fsdp_settings_that_would_not_be_obeyed_are_refused(
    flags: list[str], tmp_path: Path, setting: dict[str, object], words: list[str]
) -> None:
    written = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    written["fsdp_config"] |= setting
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(written | {"num_processes": 2}))
    launch = ["accelerate", "launch", "--config_file", "own.yaml", "--main_process_port", 0, "-m", "train", *flags]
    done = command(*launch, f"--checkpoint_path={tmp_path}/out", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_deepspeed_launcher_starts_the_same_run(two_processes: list[str], finished: Path, tmp_path: Path) -> None:
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", free_port(), "--module", "train"]
    zero2 = ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/zero2.json"]
    command(*launch, *two_processes, *zero2, f"--checkpoint_path={tmp_path}", cwd=tmp_path)
    assert losses(tmp_path / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


def test_bf16_stays_close_and_its_masters_are_kept(flags: list[str], finished: Path, tmp_path: Path) -> None:
    zero2 = ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/zero2.json", "--mixed_precision=bf16"]
    train(*flags, *zero2, f"--checkpoint_path={tmp_path}", cwd=tmp_path)
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


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--run_type=optimized", f"--deepspeed_config={ROOT}/ds_configs/zero1.json"]])
def test_gradients_travel_once_a_step_whatever_is_accumulated(
    flags: list[str], tmp_path: Path, more: list[str]
) -> None:
    counts = []
    for accumulation in (1, 4):
        split = [
            f"--gradient_accumulation_steps={accumulation}",
            "--train_micro_batch_size_per_gpu=1",
            "--max_steps=3",
        ]
        said = engine_steps("counted", tmp_path / str(accumulation), *flags, *more, *split, "--mixed_precision=no")
        last = said[0][-1]["operations"]
        counts.append({name: count for name, count in last.items() if name.startswith("c10d::") and "reduce" in name})
    assert counts[0]
    assert counts[0] == counts[1]
