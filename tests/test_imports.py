"""The directions of imports: lower floors never import higher ones."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up; a module may import those listed before it.
FLOORS = [
    "failure", "errors", "files", "tensor_file", "quiet", "sources", "text_files", "streams", "tokens", "splits",
    "words", "encoders", "preparation", "verify_data", "workers", "documents", "batches", "follow", "prefetch",
    "schedule", "activation", "allocator", "muon", "optim", "recompute", "flops", "energy", "metrics", "regions",
    "evaluate_metrics", "config", "preprocess_data", "nanogpt", "models", "memory", "shipped",
    "engines.launcher", "engines.deepspeed_json", "engines.rendezvous", "engines.accelerators", "engines.layout",
    "engines.state", "engines.base", "engines.accelerated", "engines.pipelined", "checkpoint", "compare_runs",
    "compare_plots", "report_parts", "card", "hub", "trackers", "runlog", "growing_cache", "inference", "build",
    "validate", "summary", "profiling", "loop", "__main__", "cpu_layers", "generate", "export_onnx", "export",
    "report_style", "kernels_shapes",
    "kernels_trace", "kernels_places", "kernels_account", "kernels_timeline", "kernels", "compare_windows",
    "compare_figures", "compare_gate", "report_svg", "report_pipeline", "report_kernels", "report_memory",
    "report_html", "compare", "parity_oracle", "parity_check", "parity", "plan_shapes", "plan_memory", "plan_speed",
    "plan", "cli",
]  # fmt: skip
# What comes after training never touches its live objects.
READ_FILES_ONLY = [
    "generate", "export", "export_onnx", "compare", "parity", "parity_check", "parity_oracle", "kernels",
    "kernels_account", "kernels_places", "kernels_trace", "kernels_shapes", "kernels_timeline",
    "plan", "plan_memory", "plan_shapes", "plan_speed",
]  # fmt: skip
TRAIN_MODULES = sorted((ROOT / "train").rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "train").with_suffix("").parts)


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


def of_train(path: Path) -> set[str]:
    stripped = {name.removeprefix("train.") for name in imported(path) if name.startswith("train.")}
    return {module for module in FLOORS for name in stripped if name == module or name.startswith(f"{module}.")}


def test_every_module_has_a_floor() -> None:
    modules = {name_of(path) for path in TRAIN_MODULES if path.name != "__init__.py"}
    assert {name for name in modules if not name.startswith("evaluate_metrics")} == set(FLOORS) - {"evaluate_metrics"}


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor: str) -> None:
    path = ROOT / "train" / f"{floor.replace('.', '/')}.py"
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    assert of_train(path) <= set(FLOORS[: FLOORS.index(floor)])


@pytest.mark.parametrize("tool", READ_FILES_ONLY)
def test_tools_after_training_read_files(tool: str) -> None:
    assert not of_train(ROOT / "train" / f"{tool}.py") & {
        "loop", "build", "profiling", "engines.base", "engines.accelerated", "engines.pipelined", "runlog",
    }  # fmt: skip


def test_the_model_package_knows_neither_the_trainer_nor_its_engines() -> None:
    for path in (ROOT / "modeling_gpt2flash").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path) if not name.startswith(".")}
        assert not roots & {"train", "accelerate", "deepspeed", "datasets"}, path.name


def test_deepspeed_is_imported_in_one_folder() -> None:
    users = {path for path in TRAIN_MODULES if any(name.split(".")[0] == "deepspeed" for name in imported(path))}
    assert {path.parent.name for path in users} == {"engines"}


def test_no_module_of_train_has_the_name_of_another_module() -> None:
    # In script mode the folder `train` comes first on sys.path, and such a name would hide the other.
    taken = set(sys.stdlib_module_names) | {"accelerate", "datasets", "deepspeed", "evaluate", "numpy", "torch"}
    assert not {path.stem for path in TRAIN_MODULES if path.name != "__init__.py"} & (taken - {"__main__"})


@pytest.mark.parametrize("package", ["train", "train.engines"])
def test_packages_of_the_trainer_run_nothing_on_import(package: str) -> None:
    assert (ROOT / package.replace(".", "/") / "__init__.py").read_text() == ""
