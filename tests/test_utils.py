"""Small helpers that several packages share."""

from pathlib import Path

import psutil
import pytest
from torch._inductor import config, cpp_builder

from train.engines.transforms import check_cpp_compiler
from train.utils.errors import UserError, first_line
from train.utils.processes import available_memory

MIB = 1 << 20


def test_the_compiler_is_the_one_that_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_cpp_compiler("--torch_compile")
    assert cpp_builder.get_cpp_compiler() == config.cpp.cxx[-1]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        UserError, match=r"^--compile: needs a C\+\+ compiler on the CPU, and no-such-compiler was not"
    ):
        check_cpp_compiler("--compile")


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n  wrong\nin detail")) == "wrong"
    assert first_line(ValueError()) == "ValueError"


def memory_group(folder: Path, version: int, most: int | str, used: int, unused: int) -> None:
    """The files of a cgroup, as the kernel's documents cgroup-v2 and cgroup-v1/memory have them."""
    limit, usage, key = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit).write_text(f"{most}\n")
    (folder / usage).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{key} {unused}\n")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("own", "outer", "expected"),
    [
        ((40 * MIB, 30 * MIB, 5 * MIB), None, 15 * MIB),
        ((40 * MIB, 30 * MIB, 0), (50 * MIB, 49 * MIB, MIB), 2 * MIB),  # the outer group's limit holds as well
        ((40 * MIB, 41 * MIB, 0), None, 0),
        (None, (50 * MIB, 20 * MIB, 0), 30 * MIB),
        (None, None, None),
    ],
)
def test_memory_is_what_the_limits_of_the_cgroups_leave(
    tmp_path: Path, version: int, own: tuple[int, ...] | None, outer: tuple[int, ...] | None, expected: int | None
) -> None:
    of, cgroups = tmp_path / "cgroup", tmp_path / "fs"
    of.write_text("4:cpu,memory:/job_7/step_0\n1:name=systemd:/else\n" if version == 1 else "0::/job_7/step_0\n")
    root, unlimited = (cgroups / "memory", 9223372036854771712) if version == 1 else (cgroups, "max")
    memory_group(root / "job_7" / "step_0", version, *(own or (unlimited, 30 * MIB, 0)))
    memory_group(root / "job_7", version, *(outer or (unlimited, 30 * MIB, 0)))
    found = available_memory(of, cgroups)
    assert found == expected if expected is not None else found > 50 * MIB


def test_the_memory_of_a_container_is_at_the_root(tmp_path: Path) -> None:
    """The path is that of the machine, which the container does not see."""
    (tmp_path / "cgroup").write_text("4:memory:/docker/4711\n")
    memory_group(tmp_path / "fs" / "memory", 1, 40 * MIB, 30 * MIB, 0)
    assert available_memory(tmp_path / "cgroup", tmp_path / "fs") == 10 * MIB


def test_without_cgroups_memory_is_the_systems(tmp_path: Path) -> None:
    assert 0 < available_memory(tmp_path / "missing") <= psutil.virtual_memory().total
