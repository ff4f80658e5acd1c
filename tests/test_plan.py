"""The planner picks what a person would, says when nothing fits, and prints commands that run."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import command, losses, python
from train.plan import __main__ as plan
from train.plan.__main__ import Plan, best_of_each, plans
from train.plan.shapes import Layout, Shape
from train.plan.speed import DEVICES, predict_speed, traffic
from train.utils.errors import UserError

H100 = DEVICES["H100"]
XL = Shape(48, 25, 1600, 6400, 50257, 1024, 1024)


def chosen(model: str, world_size: int, memory: float, device: str = "H100", sequences: int = 512) -> list[Plan]:
    return best_of_each(plans(model, 1024, world_size, sequences, DEVICES[device], 0.4), memory)


def test_gpt2_on_one_large_device_is_trained_plainly() -> None:
    best = chosen("gpt2", 1, 72e9)[0]
    assert best.name == "one process"
    assert best.layout.activation_checkpointing == "none"
    assert best.layout.micro_batch >= 16


def test_a_large_model_on_large_devices_keeps_its_activations() -> None:
    best = chosen("gpt2-xl", 8, 72e9)[0]
    assert best.name in ("DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3")
    assert best.layout.activation_checkpointing == "none"


def test_a_large_model_on_small_devices_is_shared_out() -> None:
    found = chosen("gpt2-xl", 8, 14.4e9, "V100")
    assert found
    assert "DDP" not in [each.name for each in found]
    assert any(each.layout.activation_checkpointing != "none" for each in found)
    assert any(each.layout.stages > 1 for each in found)


def test_what_does_not_fit_is_not_chosen_and_more_memory_is_never_slower() -> None:
    rates = []
    for memory in (9e9, 14e9, 22e9, 36e9, 72e9):
        found = chosen("gpt2-large", 4, memory, sequences=64)
        assert all(each.memory.peak <= memory for each in found)
        rates.append(found[0].speed.tokens_per_second)
    assert rates == sorted(rates)


def test_nothing_is_offloaded_from_a_cpu_to_itself() -> None:
    for world_size in (1, 2):
        assert not any(each.layout.offload for each in plans("tiny", 128, world_size, 8, DEVICES["cpu"], 0.4))


def test_recomputation_saves_memory_and_costs_time() -> None:
    found = plans("gpt2", 1024, 1, 8, H100, 0.4)
    one = [each for each in found if each.name == "one process" and each.layout.micro_batch == 8]
    of = {each.layout.activation_checkpointing: each for each in one}
    modes = ("none", "selective", "full")
    peaks, rates = zip(*((of[mode].memory.peak, of[mode].speed.tokens_per_second) for mode in modes), strict=True)
    assert peaks == tuple(sorted(peaks, reverse=True))
    assert rates == tuple(sorted(rates, reverse=True))


def test_the_bytes_between_processes_are_those_of_the_literature() -> None:
    """ZeRO (arXiv:1910.02054, section 7): two of the model's size for stages 1 and 2, three for stage 3."""
    size = 2 * XL.parameters * 7 / 8

    def sent(layout: Layout) -> float:
        return sum(traffic(XL, layout))

    assert sent(Layout("ddp", 8, 1)) == pytest.approx(2 * 2 * size), "in fp32"
    assert sent(Layout("zero", 8, 1, zero_stage=1)) == pytest.approx(2 * size)
    assert sent(Layout("zero", 8, 1, zero_stage=2)) == pytest.approx(2 * size)
    assert sent(Layout("zero", 8, 1, zero_stage=3)) == pytest.approx(3 * size)
    assert sent(Layout("zero", 8, 1, 4, zero_stage=2)) == pytest.approx(5 * size), "reduced with every micro-batch"
    assert sent(Layout("single", 1, 1)) == 0


def test_the_bubble_is_that_of_the_schedule() -> None:
    layout = Layout("zero", 4, 1, 8, zero_stage=1, stages=4)
    speed = predict_speed(XL, layout, H100, 0.4)
    assert speed.bubble / (speed.arithmetic + speed.bubble) == pytest.approx(3 / (8 + 3))
    assert predict_speed(XL, replace(layout, accumulation=32), H100, 0.4).bubble < speed.bubble * 4


@pytest.mark.parametrize(("text", "bytes_"), [("80GB", 80e9), ("24GiB", 24 * 2**30), ("1.5 tb", 1.5e12), ("7", 7)])
def test_sizes(text: str, bytes_: float) -> None:
    assert plan.size(text) == bytes_


@pytest.mark.parametrize("text", ["80G", "GB", "-3GB", "0GB", "much"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--device_memory.*80GB"):
        plan.main([f"--device_memory={text}"])


def test_impossible_plans_are_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="--block_size 2048"):
        plans("gpt2", 2048, 1, 8, H100, 0.4)
    with pytest.raises(UserError, match="--sequences_per_step 7"):
        plans("gpt2", 1024, 17, 7, H100, 0.4)


def test_it_says_that_nothing_fits_and_what_comes_nearest() -> None:
    with pytest.raises(UserError, match=r"nothing fits into 2GB.*the closest is ZeRO-3 offload"):
        plan.main(["--model=gpt2-xl", "--device_memory=2GB"])


def test_the_plan_shows_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["--model=gpt2", "--world_size=4", "--link=12GB", "--efficiency=0.3"])
    said = capsys.readouterr().out
    for words in ("30% of 989.5 TFLOP/s", "12 GB/s between processes", "up to 72.0 GB", "| DDP", "--num_processes 4"):
        assert words in said


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_printed_command_runs_and_takes_what_was_planned(
    world_size: int, flags: list[str], small_model: Path, finished: Path, tmp_path: Path
) -> None:
    asked = ["--block_size=32", f"--world_size={world_size}", "--sequences_per_step=4", "--device=cpu"]
    printed = python("-m", "train.plan", f"--model={small_model}", *asked, cwd=tmp_path).stdout
    assert "| DDP" in printed or world_size == 1
    # In this folder there are no configurations; the shipped ones are named.
    words = shlex.split(printed.split("\n\n")[-1].replace("\\\n", " "))
    if words[0] == "accelerate":
        words[2:2] = ["--main_process_port", "0"]
    # Eight steps as in `finished`, whose losses it must have; the second is the one that is tracked.
    command(*words, *flags, "--profile", "--profile_steps=3:4", f"--checkpoint_path={tmp_path}/out", cwd=tmp_path)
    [run] = (tmp_path / "out").iterdir()
    assert losses(run) == pytest.approx(losses(finished), abs=1e-5)
    measured = json.loads((run / "profile" / "memory.json").read_text())
    best = plans(str(small_model), 32, world_size, 4, DEVICES["cpu"], 0.4)[0]
    assert best.memory.peak == pytest.approx(measured["peak_bytes"], rel=0.10)
