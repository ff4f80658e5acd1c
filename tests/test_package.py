"""The package as it is installed: built without a network, in an environment and a folder with nothing of this one."""

import json
import shlex
import shutil
import site
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, command, python

SOURCES = ("modeling_gpt2flash", "train", "accelerate_configs", "ds_configs", "recipes")
FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module", autouse=True)
def _away_from_the_repository() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH")
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a package is made of."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    """As `python -m build` does: the source distribution, and a wheel of what is in it."""
    python("-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=sources)
    [source] = (sources / "dist").glob("*.tar.gz")
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    python("-m", "pip", "wheel", *offline, "--wheel-dir", sources / "dist", source, cwd=sources)
    [built] = (sources / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel in it; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    python("-m", "venv", "--without-pip", folder, cwd=folder)
    programs = folder / "bin"
    python("-m", "pip", "--python", programs / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # Last, since pip would take this environment's gpt2flash for one that is installed. Its own .pth are not read.
    (Path(own) / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return programs


@pytest.mark.slow
def test_the_wheel_has_code_vocabulary_and_configurations(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("modeling_gpt2flash", "train")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".jinja", ".css")
    }
    expected |= {"train/data/gpt2.tiktoken"}
    expected |= {f"train/{name}/{file.name}" for name in SOURCES[2:] for file in (ROOT / name).iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected
        [metadata] = [name for name in archive.namelist() if name.endswith("METADATA")]
        assert "# gpt2flash" in archive.read(metadata).decode()
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]


@pytest.mark.slow
def test_it_prepares_and_trains_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    def gpt2flash(*words: object) -> str:
        return command(installed / "gpt2flash", *words, cwd=tmp_path).stdout

    assert "preprocess" in gpt2flash("--help")
    yaml = Path(gpt2flash("config", "deepspeed").strip())
    assert yaml.is_relative_to(installed.parent)
    assert not yaml.is_relative_to(ROOT)

    gpt2flash("preprocess", "--dataset", "stdlib", "--max_documents", 60, "--val_fraction", 0.2, "--out_dir", "data")
    training = ["train", "--model", "tiny", "--max_steps", 2, "--block_size", 32, "--eval_steps", 1,
                "--max_new_tokens", 2, "--report_to", "none"]  # fmt: skip
    gpt2flash(*training)
    optimized = [*training, "--run_type", "optimized", "--deepspeed_config", "zero2.json"]
    launch = [
        installed / "python",
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        yaml,
        "--main_process_port",
        0,
    ]
    command(*launch, "--no_python", installed / "gpt2flash", *optimized, cwd=tmp_path)
    for run_type in ("baseline", "optimized"):
        assert json.loads((tmp_path / "checkpoint" / run_type / "metrics.json").read_text())["steps"] == 2
    wrong = command(installed / "gpt2flash", "train", "--max_steps", 0, cwd=tmp_path, check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "error: --max_steps: 0 must be at least 1\n")


@pytest.mark.slow
def test_plan_and_parity_need_no_repository(installed: Path, tmp_path: Path) -> None:
    small = ["--model", "tiny", "--block_size", 128, "--sequences_per_step", 8, "--device", "cpu", "--world_size", 2]
    told = command(installed / "gpt2flash", "plan", *small, cwd=tmp_path).stdout
    words = shlex.split(told.split("\n\n")[-1].replace("\\\n", " "))
    file = Path(words[words.index("--config_file") + 1])
    assert file.is_file()
    assert file.is_relative_to(installed.parent)
    done = command(installed / "gpt2flash", "parity", "--layouts", "zero2-x2", "--accumulation", 8, cwd=tmp_path)
    assert "All 4 runs are green" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_what_is_released_passes_the_checks_of_a_package_index(sources: Path) -> None:
    python("-m", "build", "--no-isolation", "--outdir", sources / "released", cwd=sources)
    released = sorted((sources / "released").iterdir())
    assert [file.suffix for file in released] == [".whl", ".gz"]
    said = python("-m", "twine", "check", "--strict", *released, cwd=sources).stdout
    assert said.count("PASSED") == 2, said
