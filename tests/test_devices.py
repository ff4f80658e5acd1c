"""The one module that knows devices, and that it is the one."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity

from tests.conftest import ROOT
from train.utils import devices


def another_accelerator(monkeypatch: pytest.MonkeyPatch, kind: str = "xpu", **module: object) -> None:
    """An accelerator that is neither a CPU nor CUDA, with what its module of torch has."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**module))


def test_nobody_else_names_a_backend() -> None:
    named = re.compile(r"torch\.(cuda|xpu|mps)\b|[!=]= \"cuda|\"cuda\" (if|else)")
    users = {
        str(file.relative_to(ROOT))
        for package in ("train", "modeling_gpt2flash")
        for file in (ROOT / package).rglob("*.py")
        if named.search(file.read_text())
    }
    of_traces = "train/kernels/traces.py"  # Kineto's own names
    assert users - {of_traces} == {"train/utils/devices.py", "modeling_gpt2flash/attention.py"}


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
    devices.reset_peak_memory(cpu)


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

    def refuses(device: torch.device) -> int:
        raise RuntimeError("Allocator for hpu is not a DeviceAllocator.")

    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", refuses)
    assert devices.peak_memory("hpu")["peak_memory_kind"] == "rss"
    devices.reset_peak_memory(torch.device("hpu"))


def test_the_memory_of_an_accelerator_is_what_is_allocated_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda device: 4)
    assert devices.peak_memory("xpu") == {
        "peak_memory_bytes": 3,
        "peak_memory_kind": "xpu_allocated",
        "peak_memory_reserved_bytes": 4,
    }


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


def test_resident_peak_prefers_this_programs_own_and_knows_the_units() -> None:
    assert devices.resident_peak_bytes("Name: x\nVmHWM:\t    8752 kB\nVmRSS: 1 kB\n", 499_356, "linux") == 8752 * 1024
    assert devices.resident_peak_bytes(None, 499_356, "linux") == 499_356 * 1024
    assert devices.resident_peak_bytes(None, 499_356, "darwin") == 499_356


def test_peak_memory_sees_an_allocation_of_this_process() -> None:
    before = devices.peak_memory("cpu")
    held = torch.ones(before["peak_memory_bytes"] // 4 + 25_000_000)  # as many floats as fill the peak, and 100 MB
    after = devices.peak_memory(torch.device("cpu"))
    assert after["peak_memory_bytes"] >= before["peak_memory_bytes"] + 50_000_000
    assert after["peak_memory_kind"] == "rss"
    assert after["peak_memory_reserved_bytes"] is None
    assert held[0] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_is_not_the_launchers() -> None:
    code = (
        "import subprocess, sys; held = b'x' * 700_000_000; "
        "print(subprocess.run([sys.executable, '-c', "
        '\'from train.utils.devices import peak_memory; print(peak_memory("cpu")["peak_memory_bytes"])\'],'
        " capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 650_000_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda() -> None:
    held = torch.ones(25_000_000, device="cuda")
    got = devices.peak_memory("cuda")
    assert got["peak_memory_kind"] == "cuda_allocated"
    assert got["peak_memory_reserved_bytes"] >= got["peak_memory_bytes"] >= held.numel() * 4


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
