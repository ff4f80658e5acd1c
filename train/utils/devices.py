"""What the trainer has to know of the device that it computes on. No other module names a backend.

A device that is neither a CPU nor a CUDA GPU is served by `torch.accelerator` and by its own module of torch
(`torch.xpu`, ...) as far as these have the fact, and by the generic answer beyond that.
"""

import re
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

HISTORY_ENTRIES = 100_000  # allocations and frees that a memory history keeps


def device_type() -> str:
    """The type of this machine's accelerator ("cuda", "xpu", ...), or "cpu".

    A Mac trains on its CPU: MPS has no float64, in which the validation loss is summed.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None or accelerator.type == "mps" else accelerator.type


def device_name(device: torch.device | str) -> str:
    """The name of the product, such as "NVIDIA H200"; the type of a device that has no name, such as a CPU."""
    device = torch.device(device)
    get_name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if get_name is None else get_name(device)


def accelerators() -> list[dict[str, Any]]:
    """Name and memory in bytes of every accelerator that this process may use."""
    if device_type() == "cpu":
        return []
    module = torch.get_device_module(device_type())
    found = [module.get_device_properties(index) for index in range(torch.accelerator.device_count())]
    return [{"name": each.name, "memory_bytes": each.total_memory} for each in found]


def nvml_uuid(device: torch.device) -> str | None:
    """How NVML, which numbers all GPUs of a machine, names one of CUDA_VISIBLE_DEVICES; None for another device."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


# Precision


def matmul_precision(mixed_precision: str | None, optimized: bool) -> str:
    """The precision of matmuls: "bf16", "fp32", or "tf32", which rounds fp32 inputs to 10 bits of mantissa.

    The baseline's fp32 is fp32.
    """
    if mixed_precision == "bf16":
        return "bf16"
    return "tf32" if optimized and device_type() == "cuda" else "fp32"


def set_matmul_precision(optimized: bool) -> None:
    """Allow TF32 to an optimized run on CUDA. Mixed precision is the Accelerator's."""
    tf32 = matmul_precision(None, optimized) == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def has_fast_bf16() -> bool:
    """Whether this machine's device has instructions for bf16 matmuls; emulated, they are slower than fp32."""
    if device_type() == "cpu":
        return cpu_has_fast_bf16()
    is_supported = getattr(torch.get_device_module(device_type()), "is_bf16_supported", None)
    return is_supported is not None and is_supported(including_emulation=False)


def cpu_has_fast_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):  # not in every supported version of torch
        flags = {name for name, value in torch.cpu.get_capabilities().items() if value is True}
        if flags:
            return has_bf16_matmuls(flags)
    return has_bf16_matmuls(cpuinfo_flags(read_or_none("/proc/cpuinfo") or ""))


def has_bf16_matmuls(flags: set[str]) -> bool:
    """Whether these instruction sets of a CPU multiply bf16 matrices: AVX512_BF16, AMX, ARM's BFMMLA."""
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def cpuinfo_flags(cpuinfo: str) -> set[str]:
    """The instruction sets in /proc/cpuinfo: the line is "flags" on x86 and "Features" on ARM."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set(found[1].split()) if found else set()


def read_or_none(path: str) -> str | None:
    """The text of a file of Linux's, which other systems do not have."""
    return Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else None


# Memory


def peak_memory(device: torch.device | str) -> dict[str, Any]:
    """Peak memory of this process since it started, under the three keys that `metrics.json` has for it.

    On an accelerator: bytes allocated to tensors ("cuda_allocated", "xpu_allocated", ...), and bytes that the
    allocator reserved. On a CPU, and where torch has no statistics of the accelerator's allocator: resident memory of
    the process ("rss"). The two are not comparable.
    """
    device = torch.device(device)
    if _has_memory_statistics(device):
        return {
            "peak_memory_bytes": torch.accelerator.max_memory_allocated(device),
            "peak_memory_kind": f"{device.type}_allocated",
            "peak_memory_reserved_bytes": torch.accelerator.max_memory_reserved(device),
        }
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak_memory_bytes": resident_peak_bytes(read_or_none("/proc/self/status"), maxrss, sys.platform),
        "peak_memory_kind": "rss",
        "peak_memory_reserved_bytes": None,
    }


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak of allocated memory anew; the peak of resident memory cannot be reset."""
    if _has_memory_statistics(device):
        torch.accelerator.reset_peak_memory_stats(device)


def _has_memory_statistics(device: torch.device) -> bool:
    if device.type == "cpu":
        return False
    try:
        torch.accelerator.max_memory_allocated(device)
    except RuntimeError:  # "Allocator for ... is not a DeviceAllocator."
        return False
    return True


def resident_peak_bytes(status: str | None, maxrss: int, system: str) -> int:
    """Peak resident memory of this process in bytes, from /proc/self/status or else getrusage's `ru_maxrss`.

    `ru_maxrss` survives exec: a process started by a launcher of 500 MB starts at 500 MB. The kernel's VmHWM belongs
    to the new program alone, so it is preferred. `ru_maxrss` counts KiB on Linux and bytes on macOS.
    """
    if status is not None and (found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)):
        return int(found[1]) * 1024
    return maxrss if system == "darwin" else maxrss * 1024


def has_memory_history() -> bool:
    """Whether the allocator can record its history for pytorch.org/memory_viz."""
    return device_type() == "cuda"


def record_memory_history() -> None:
    torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)


def dump_memory_history(file: Path) -> None:
    """Write what was recorded as a pickle, and stop recording."""
    torch.cuda.memory._dump_snapshot(str(file))
    torch.cuda.memory._record_memory_history(enabled=None)


# Threads and profiler


def thread_initializer(device: torch.device) -> Callable[[], None] | None:
    """For a new thread: select the current device of this one. A thread starts on device 0."""
    if device.type == "cpu":
        return None
    return partial(torch.accelerator.set_device_index, torch.accelerator.current_device_index())


def profiler_activities(device: torch.device) -> list[ProfilerActivity]:
    """What `torch.profiler` records: the CPU, and the device if it is another and the profiler knows it."""
    activity = getattr(ProfilerActivity, device.type.upper(), ProfilerActivity.CPU)
    return list(dict.fromkeys([ProfilerActivity.CPU, activity]))
