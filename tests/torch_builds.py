"""Run the tests that depend on the version of torch against a stand-in of each build: `python -m tests.torch_builds`.

The wheels of one release name their build in different ways. PyPI's for Linux are CUDA builds: `2.13.0` in their
metadata, `2.13.0+cu130` in `torch.__version__`. CPU wheels have `2.13.0+cpu` in both, other builds `2.13.0` in both.
A stand-in replaces `torch/version.py` and the `.dist-info` of the installed torch, in every process that a test
starts. The installed build itself needs no stand-in.
"""

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

SITECUSTOMIZE = """
import importlib.util
import sys
from pathlib import Path


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch.version":
            return importlib.util.spec_from_file_location(name, Path(__file__).with_name("torch_version.py"))


sys.meta_path.insert(0, Finder)
"""


class Build(NamedTuple):
    """What a build adds to the release in `torch.__version__` and in its metadata, and its `torch.version.cuda`."""

    label: str
    metadata_label: str
    cuda: str | None = None


BUILDS = [Build("", ""), Build("+cpu", "+cpu"), Build("+cu130", "", cuda="13.0")]


def write_stand_in(folder: Path, release: str, build: Build) -> None:
    """Write the files that make torch report `build` in every Python that has `folder` in its PYTHONPATH."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    facts = {"__version__": release + build.label, "cuda": build.cuda, "debug": False, "git_version": "0" * 40}
    facts |= {"hip": None, "rocm": None, "xpu": None}
    (folder / "torch_version.py").write_text("".join(f"{name} = {value!r}\n" for name, value in facts.items()))
    metadata = folder / f"torch-{release}{build.metadata_label}.dist-info"
    metadata.mkdir()
    content = f"Metadata-Version: 2.4\nName: torch\nVersion: {release}{build.metadata_label}\n"
    (metadata / "METADATA").write_text(content)


def main() -> int:
    release = version("torch").split("+")[0]
    files = [path for path in Path(__file__).parent.glob("test_*.py") if "mark.torch_version" in path.read_text()]
    for build in BUILDS:
        if (release + build.label, release + build.metadata_label) == (torch.__version__, version("torch")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_stand_in(Path(folder), release, build)
            print(f"torch {release}{build.label}, {release}{build.metadata_label} in its metadata", flush=True)
            claimed = {"PYTHONPATH": folder, "TORCH_BUILD": release + build.label}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "torch_version", *files]
            done = subprocess.run(command, env={**os.environ, **claimed})
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
