"""Freed memory: an optimized run on a CPU keeps it, so that its steps need no fresh pages."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, engine_steps

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")

FILL_OFTEN = """
import resource, sys, torch
from train.engines.transforms import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_tensor_gets_the_pages_of_those_before() -> None:
    """The fortieth does: glibc keeps up to seven small pieces a size, which part the first ones."""
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", FILL_OFTEN, which], check=True, capture_output=True).stdout)
        for which in ("given back", "kept")
    )
    assert given_back >= 2**26 // 2**21, "at least one page of 2 MB each"
    assert kept < given_back / 4


def test_steps_of_an_optimized_run_need_no_fresh_pages(flags: list[str], tmp_path: Path) -> None:
    faults = {}
    for run_type, more in (("baseline", []), ("optimized", [f"--deepspeed_config={ROOT}/ds_configs/zero2.json"])):
        words = [*flags, f"--run_type={run_type}", "--max_steps=20", *more]
        (steps, *_) = engine_steps("paged", tmp_path / run_type, *words, processes=1)
        faults[run_type] = sum(step["page_faults"] for step in steps[2:])
    assert faults["optimized"] < faults["baseline"] / 10
