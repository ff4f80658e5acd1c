"""What the trainer has to know about the device that it computes on.

Other modules only ask whether it is a CPU. Beyond that, the attention kernels of the model
(`modeling_gpt2flash/attention.py`), the tables of products (`metrics/flops.py`, `plan/speed.py`), the energy counters
(`metrics/energy.py`) and the recorded version of CUDA (`metrics/hardware.py`) name kinds of devices.

A device that is neither a CPU nor a CUDA GPU is served by `torch.accelerator` and by its own module of torch
(`torch.xpu`, ...) as far as these have the fact, and by the generic answer beyond that.
"""

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

HIDE_ACCELERATORS = {"CUDA_VISIBLE_DEVICES": ""}  # environment of a process that is to compute on the CPU
# The fused kernels of `scaled_dot_product_attention`, each with a `_backward`. They differ by kind of device.
SDPA_OPERATORS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",  # XPU and devices outside of torch
)
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
    if is_supported is None:
        return False
    without_emulation = "including_emulation" in inspect.signature(is_supported).parameters
    return is_supported(including_emulation=False) if without_emulation else is_supported()


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


# Allocator's history and profiler


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
