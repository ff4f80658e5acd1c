"""What a run was made on: facts of the machine and versions of the packages."""

import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from train.utils.devices import accelerators, cpu_has_fast_bf16, read_or_none
from train.utils.processes import usable_cores

PACKAGES = ("gpt2flash", "transformers", "accelerate", "deepspeed", "datasets", "evaluate", "tiktoken",
            "flash-attn", "flash-attn-4", "kernels", "liger-kernel", "numpy")  # fmt: skip


def hardware() -> dict[str, Any]:
    """What this process runs on. Memory in bytes. No host name: reports are shown to strangers."""
    cpuinfo = read_or_none("/proc/cpuinfo") or ""
    model_name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    gpus = accelerators()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": model_name[1].strip() if model_name else platform.processor() or platform.machine(),
        "cpu_physical_cores": psutil.cpu_count(logical=False),
        "cpu_logical_cores": psutil.cpu_count(),
        # A container or `taskset` may allow fewer than the machine has.
        "cpu_usable_cores": usable_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_bf16": cpu_has_fast_bf16(),
        "torch_threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpu_count": len(gpus),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def torch_build(version: str, cuda: str | None) -> str:
    """The version of torch with its build, such as "2.13.0+cpu" or "2.13.0+cu130".

    `version` is `torch.__version__`: the metadata of a CUDA wheel has the bare release. Builds from elsewhere may have
    the bare release in both, and are told apart by `torch.version.cuda`.
    """
    return version if "+" in version or not cuda else f"{version}+cu{cuda.replace('.', '')}"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that shape a run. None of the packages is imported."""
    found = {"python": platform.python_version(), "torch": torch_build(str(torch.__version__), torch.version.cuda)}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package.replace("-", "_")] = version(package)
    return found
