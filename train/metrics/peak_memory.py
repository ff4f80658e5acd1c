"""Peak memory of a process: what its device's allocator counts, or else what the operating system does."""

import re
import resource
import sys
from typing import Any

import torch

from train.utils.devices import read_or_none


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
