"""The directions of imports: a package imports its own modules and those of the packages on lower floors."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up. Packages on one floor may import each other, as long as no two modules import each other.
FLOORS = [
    {"utils", "job", "optim", "evaluate_metrics"},
    {"config", "data", "metrics"},
    {"preprocess_data", "checkpoints", "kernels", "engines", "trackers"},
    {"plan", "generate", "parity", "replay", "export", "compare"},
    {"hub"},
    {"run"},
    {"__main__", "cli"},
]
AFTER_TRAINING = ["compare", "export", "generate", "kernels", "parity", "plan", "replay"]
TRAIN_MODULES = sorted((ROOT / "train").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def packages_imported(package: str) -> set[str]:
    """The packages and modules directly below `train` that a package's modules import."""
    files = [path for path in TRAIN_MODULES if name_of(path).split(".")[1:2] == [package]]
    assert files, f"there is no train.{package}"
    return {name.split(".")[1] for path in files for name in imported(path) if name.startswith("train.")} - {package}


def test_every_package_has_a_floor() -> None:
    assert {name_of(path).split(".")[1] for path in TRAIN_MODULES if name_of(path) != "train"} == set.union(*FLOORS)


@pytest.mark.parametrize("package", sorted(set.union(*FLOORS)))
def test_imports_point_down(package: str) -> None:
    floor = next(number for number, packages in enumerate(FLOORS) if package in packages)
    assert packages_imported(package) <= set.union(*FLOORS[: floor + 1])


def test_no_two_modules_import_each_other() -> None:
    graph = {name_of(path): imported(path) for path in TRAIN_MODULES}
    graphlib.TopologicalSorter({name: names & set(graph) for name, names in graph.items()}).prepare()


def test_no_folder_has_more_than_9_modules() -> None:
    for folder in {path.parent for path in TRAIN_MODULES}:
        modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        assert len(modules) <= 9, f"{folder.relative_to(ROOT)} has {len(modules)}: {sorted(modules)}"


@pytest.mark.parametrize("package", AFTER_TRAINING)
def test_tools_after_training_read_files(package: str) -> None:
    assert "run" not in packages_imported(package)


def test_the_model_package_knows_neither_the_trainer_nor_its_engines() -> None:
    for path in (ROOT / "modeling_gpt2flash").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path) if not name.startswith(".")}
        assert not roots & {"train", "accelerate", "deepspeed", "datasets"}, path.name


def test_deepspeed_is_imported_where_its_engines_and_its_json_are() -> None:
    users = {
        name_of(path) for path in TRAIN_MODULES if {name.split(".")[0] for name in imported(path)} & {"deepspeed"}
    }
    assert {name.split(".")[1] for name in users} == {"engines", "config"}


def test_no_package_of_train_has_the_name_of_another_module() -> None:
    # In script mode the folder `train` comes first on sys.path, and such a name would hide the other.
    taken = set(sys.stdlib_module_names) | {"accelerate", "datasets", "deepspeed", "evaluate", "numpy", "torch"}
    assert not set.union(*FLOORS) & (taken - {"__main__"})


def test_packages_of_the_trainer_run_nothing_on_import() -> None:
    initializers = {path for path in TRAIN_MODULES if path.name == "__init__.py"}
    assert {name_of(path) for path in initializers if path.read_text()} == {"train.evaluate_metrics"}


def test_no_module_has_more_than_400_lines() -> None:
    modules = [*TRAIN_MODULES, *(ROOT / "modeling_gpt2flash").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in modules}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
