"""Peak memory of a process, on a device and of the operating system."""

import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from train.metrics.peak_memory import peak_memory, reset_peak_memory, resident_peak_bytes


def test_without_statistics_of_the_accelerators_allocator_it_is_resident_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(device: torch.device) -> int:
        raise RuntimeError("Allocator for hpu is not a DeviceAllocator.")

    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", refuses)
    assert peak_memory("hpu")["peak_memory_kind"] == "rss"
    reset_peak_memory(torch.device("hpu"))
    reset_peak_memory(torch.device("cpu"))


def test_the_memory_of_an_accelerator_is_what_is_allocated_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda device: 4)
    assert peak_memory("xpu") == {
        "peak_memory_bytes": 3,
        "peak_memory_kind": "xpu_allocated",
        "peak_memory_reserved_bytes": 4,
    }


def test_resident_peak_prefers_this_programs_own_and_knows_the_units() -> None:
    assert resident_peak_bytes("Name: x\nVmHWM:\t    8752 kB\nVmRSS: 1 kB\n", 499_356, "linux") == 8752 * 1024
    assert resident_peak_bytes(None, 499_356, "linux") == 499_356 * 1024
    assert resident_peak_bytes(None, 499_356, "darwin") == 499_356


def test_peak_memory_sees_an_allocation_of_this_process() -> None:
    before = peak_memory("cpu")
    held = torch.ones(before["peak_memory_bytes"] // 4 + 25_000_000)  # as many floats as fill the peak, and 100 MB
    after = peak_memory(torch.device("cpu"))
    assert after["peak_memory_bytes"] >= before["peak_memory_bytes"] + 50_000_000
    assert after["peak_memory_kind"] == "rss"
    assert after["peak_memory_reserved_bytes"] is None
    assert held[0] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_is_not_the_launchers() -> None:
    code = (
        "import subprocess, sys; held = b'x' * 700_000_000; "
        "print(subprocess.run([sys.executable, '-c', "
        '\'from train.metrics.peak_memory import peak_memory; print(peak_memory("cpu")["peak_memory_bytes"])\'],'
        " capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 650_000_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda() -> None:
    held = torch.ones(25_000_000, device="cuda")
    got = peak_memory("cuda")
    assert got["peak_memory_kind"] == "cuda_allocated"
    assert got["peak_memory_reserved_bytes"] >= got["peak_memory_bytes"] >= held.numel() * 4
