"""The one module that knows devices, and that it is the one."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity

from tests.conftest import ROOT
from train.engines.transforms import ATTENTION_OPERATORS
from train.utils import devices


def another_accelerator(monkeypatch: pytest.MonkeyPatch, kind: str = "xpu", **module: object) -> None:
    """An accelerator that is neither a CPU nor CUDA, with what its module of torch has."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**module))


def test_nobody_else_names_a_backend() -> None:
    named = re.compile(r"torch\.(cuda|xpu|mps)\b|[!=]= \"cuda|\"cuda\" (if|else)|\"cuda\"[,:]|_VISIBLE_DEVICES")
    users = {
        str(file.relative_to(ROOT))
        for package in ("train", "modeling_gpt2flash", "benchmarks")
        for file in (ROOT / package).rglob("*.py")
        if named.search(file.read_text())
    }
    of_versions = "train/metrics/hardware.py"  # the version of CUDA is a key of metrics.json
    assert users - {of_versions} == {"train/utils/devices.py", "modeling_gpt2flash/attention.py"}


def test_the_fused_kernels_of_sdpa_are_torchs() -> None:
    """Selective activation checkpointing keeps their outputs, on every kind of device."""
    names = dir(torch.ops.aten)
    kernels = {name for name in names if name.startswith("_scaled_dot_product") and f"{name}_backward" in names}
    assert {f"aten::{name}" for name in kernels} == set(devices.SDPA_OPERATORS) <= ATTENTION_OPERATORS


def test_without_an_accelerator_it_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (None, torch.device("mps")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, found=found: found)
        assert devices.device_type() == "cpu"
        assert devices.accelerators() == []
        assert not devices.has_memory_history()
    assert devices.device_name("cpu") == devices.device_name(torch.device("cpu")) == "cpu"
    cpu = torch.device("cpu")
    assert devices.nvml_uuid(cpu) is None
    assert devices.thread_initializer(cpu) is None
    assert devices.profiler_activities(cpu) == [ProfilerActivity.CPU]


def test_another_accelerator_is_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    another_accelerator(
        monkeypatch,
        get_device_name=lambda device: "Max 1550",
        get_device_properties=lambda index: SimpleNamespace(name=f"Max {index}", total_memory=2**30),
        is_bf16_supported=lambda including_emulation: not including_emulation,
    )
    assert devices.device_type() == "xpu"
    assert devices.device_name("xpu:1") == "Max 1550"
    assert devices.accelerators() == [{"name": f"Max {index}", "memory_bytes": 2**30} for index in (0, 1)]
    assert devices.has_fast_bf16()
    assert devices.nvml_uuid(torch.device("xpu")) is None
    assert not devices.has_memory_history()
    assert devices.matmul_precision("no", optimized=True) == "fp32"
    assert devices.profiler_activities(torch.device("xpu")) == [ProfilerActivity.CPU, ProfilerActivity.XPU]


def test_of_an_accelerator_that_says_little_the_answer_is_generic(monkeypatch: pytest.MonkeyPatch) -> None:
    another_accelerator(monkeypatch, "hpu")
    assert devices.device_name("hpu") == "hpu"
    assert not devices.has_fast_bf16()
    another_accelerator(monkeypatch, "hpu", is_bf16_supported=lambda: True)  # without including_emulation
    assert devices.has_fast_bf16()


def test_a_thread_selects_the_device_of_the_thread_that_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "set_device_index", selected.append)
    initializer = devices.thread_initializer(torch.device("cuda"))
    assert initializer is not None
    initializer()
    assert selected == [3]


@pytest.mark.parametrize(
    ("optimized", "mixed_precision", "device", "expected"),
    [
        (False, "no", "cuda", "fp32"),
        (True, "no", "cuda", "tf32"),
        (True, "no", "cpu", "fp32"),
        (False, "bf16", "cuda", "bf16"),
        (True, "bf16", "cpu", "bf16"),
    ],
)
def test_the_precision_of_matmuls_is_set_and_reported(
    monkeypatch: pytest.MonkeyPatch, optimized: bool, mixed_precision: str, device: str, expected: str
) -> None:
    monkeypatch.setattr(devices, "device_type", lambda: device)
    before = torch.get_float32_matmul_precision()
    try:
        devices.set_matmul_precision(optimized)
        assert devices.matmul_precision(mixed_precision, optimized) == expected
        assert torch.get_float32_matmul_precision() == ("high" if (optimized, device) == (True, "cuda") else "highest")
    finally:
        torch.set_float32_matmul_precision(before)


def test_bf16_flags() -> None:
    assert devices.has_bf16_matmuls(devices.cpuinfo_flags("model name\t: X\nflags\t\t: fpu avx512f avx512_bf16\n"))
    assert devices.has_bf16_matmuls(devices.cpuinfo_flags("flags : fpu amx_bf16 amx_tile\n"))
    assert devices.has_bf16_matmuls(devices.cpuinfo_flags("Features\t: fp asimd bf16 i8mm\n"))
    assert not devices.has_bf16_matmuls(devices.cpuinfo_flags("flags : fpu avx512f avx512_vnni\n"))
    assert not devices.has_bf16_matmuls(devices.cpuinfo_flags(""))


def test_bf16_without_torchs_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(devices, "read_or_none", lambda path: "flags : fpu avx512_bf16\n")
    assert devices.cpu_has_fast_bf16()
    monkeypatch.setattr(devices, "read_or_none", lambda path: None)
    assert not devices.cpu_has_fast_bf16()
