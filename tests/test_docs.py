"""README and docs: links lead somewhere; commands parse and, shrunk to seconds, run in the order of the pages.

Commands that are long, remote or of other tools are only parsed; what they do is tested elsewhere.
"""

import importlib.util
import json
import re
import runpy
import shlex
import sys
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from deepspeed.launcher import runner
from torch.distributed import run as torch_run

from tests.conftest import ROOT, command, free_port, records
from tests.forks import run_module
from train.cli import TOOLS
from train.config.run_config import parse
from train.metrics.table import METRICS
from train.preprocess_data.sources import FILE_KINDS, HUB_DATASETS, STDLIB

# The walk is some 35 commands, all in the setup of the first test that needs it.
pytestmark = pytest.mark.timeout(1800)

INDEX = (ROOT / "docs/index.md").read_text()
PAGES = ["README.md", *(f"docs/{name}" for name in re.findall(r"\((\w+\.md)\)", INDEX))]
MARKDOWN = [
    *(ROOT / name for name in (*PAGES, "docs/index.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *(file for package in ("train", "modeling_gpt2flash") for file in sorted((ROOT / package).rglob("README.md"))),
]
ONLY_PARSED = ("docs/integrations.md", "docs/performance.md")  # tests/test_integration_*.py run what the first shows
FOREIGN = ("curl", "echo", "lm_eval", "mlflow", "pip", "tensorboard", "trackio", "transformers", "twine", "wandb")
NANOGPT = {"train.py", "sample.py"}
REFERENCE = runpy.run_path(str(ROOT / "docs/reference.py"))


def commands(page: str) -> list[str]:
    """The lines of a page's bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


README = commands("README.md")
BASELINE = next(line for line in README if line.startswith("python -m train --run_type baseline"))
# Each command once, where it appears first.
WALK = list(dict.fromkeys(line for page in PAGES if page not in ONLY_PARSED for line in commands(page)))


# The pages themselves


def test_the_reference_is_generated_from_the_parsers() -> None:
    assert (ROOT / "docs/reference.md").read_text() == REFERENCE["reference"](), "run `make docs`"


def test_the_readme_is_short_and_shows_the_two_commands_first() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert [shlex.split(line, comments=True) for line in README[:2]] == [["make", "demo"], ["make", "test"]]


def test_the_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    measured = re.search(r"On two CPU cores, `make demo`.*?\n\n", (ROOT / "README.md").read_text(), re.DOTALL)
    assert measured is not None
    demo = (ROOT / "benchmarks/README.md").read_text().partition("## The loss")[0]
    for figure in re.findall(r"\d[\d,.]*\d", measured[0]):
        assert figure in demo, figure


def test_every_metric_is_explained() -> None:
    explained = (ROOT / "docs/report.md").read_text().partition("## Metrics\n")[2]
    for metric in METRICS:
        key = metric.key.partition(".")[0]
        assert metric.kind in ("count", "text") or f"`{key}`" in explained, key


def test_every_kind_of_file_is_in_the_table_of_sources() -> None:
    sources = (ROOT / "docs/data.md").read_text().partition("## Sources\n")[2]
    for name in (*FILE_KINDS, *HUB_DATASETS, STDLIB):
        assert f"\n| `{name}` |" in sources, name


def test_the_index_lists_every_page() -> None:
    assert {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")} == {*PAGES[1:], "docs/index.md"}


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_leads_somewhere(file: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)):
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_module_that_is_named_exists(file: Path) -> None:
    folders = ("train", "modeling_gpt2flash", "benchmarks", "tests", "docs")
    modules = [str(module.relative_to(ROOT)) for folder in folders for module in (ROOT / folder).rglob("*.py")]
    for name in set(re.findall(r"`([\w/]+\.py)`", file.read_text())) - NANOGPT:
        assert any(f"/{module}".endswith(f"/{name}") for module in modules), name


# Commands that are parsed


def check_arguments(module: str, arguments: list[str]) -> None:
    """The arguments are those of a program of this package, by the program's own parser."""
    tools = {name.removesuffix(".__main__"): tool for tool, (name, _) in TOOLS.items()}
    if module == "train":
        if arguments != ["--help"]:
            parse(arguments)
    elif module.startswith("benchmarks."):
        assert importlib.util.find_spec(module) is not None
    else:
        parser: ArgumentParser = REFERENCE["parser_of"](tools[module])
        parser.parse_args(arguments)


def check_command(words: list[str]) -> None:
    """A command of a page is one that exists, with arguments that it takes; launchers by their own parsers."""
    match words:
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ["python", "-m", "build"] | ["accelerate", "config" | "estimate-memory", *_]:
            pass
        case ["python", "-m", module, *arguments]:
            check_arguments(module, arguments)
        case ["gpt2flash", "--help"]:
            pass
        case ["gpt2flash", tool, *arguments]:
            check_arguments(TOOLS[tool][0].removesuffix(".__main__"), arguments)
        case ["accelerate", "launch", *arguments]:
            launch = launch_command_parser().parse_args(arguments)
            assert launch.module
            assert not launch.config_file or launch.config_file == "own.yaml" or (ROOT / launch.config_file).exists()
            check_arguments(launch.training_script, launch.training_script_args)
        case ["torchrun", *arguments]:
            launch = torch_run.parse_args(arguments)
            check_arguments(launch.training_script, launch.training_script_args)
        case ["deepspeed", *arguments]:
            launch = runner.parse_args(arguments)
            check_arguments(launch.user_script, launch.user_args)
        case _:
            assert words[0] in FOREIGN or words[0].startswith("TRACKIO_DIR="), words


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_command_parses(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        check_command(shlex.split(line, comments=True))


# Commands that run


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: the shipped configurations, some notes and a table."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("accelerate_configs", "ds_configs", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("notes", "tables"):
        (folder / name).mkdir()
    for number in range(30):
        (folder / "notes" / f"{number}.txt").write_text(f"Note {number}.\n" * 20)
    rows = "".join(f'{number},"Row {number}, a text."\n' for number in range(60))
    (folder / "tables" / "rows.csv").write_text(f"number,text\n{rows}")
    return folder


def run(words: list[str], cwd: Path) -> None:
    """A command as written; `python -m` in a fork, which saves it the imports."""
    if words[:2] == ["python", "-m"]:
        run_module(words[2], words[3:], cwd, check=True)
    else:
        command(*words, cwd=cwd)


def is_run(line: str) -> bool:
    """Whether the walk runs a command. Recipes have tests of their own, and the Hub is not there."""
    words = shlex.split(line, comments=True)
    if words[0] not in ("python", "accelerate", "torchrun", "deepspeed", "gpt2flash") or "train.hub" in words:
        return False
    return "--config" not in words or "recipes/demo_cpu.yaml" in words


def shrunk(line: str, flags: list[str]) -> list[str]:
    """A command as the walk runs it: few processes, this machine, a small model. The last of a repeated flag wins."""
    words = shlex.split(line, comments=True)
    words = ["127.0.0.1" if word == "10.0.0.1" else word for word in words]
    # A launch gets a free port, so that tests run side by side.
    if words[0] == "torchrun":
        words[1:1] = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    elif words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
    elif words[0] == "accelerate" and "--main_process_port" not in words:
        words[2:2] = ["--main_process_port", "0"]
    for key in ("--num_processes", "--num_gpus", "--nproc_per_node"):
        if key in words:
            words[words.index(key) + 1] = "2"
    if "train.preprocess_data" in words and "openwebtext" in words:
        return [*words, "--dataset", "stdlib", "--max_documents", "60", "--val_fraction", "0.2", "--split", "hash"]
    if "train.preprocess_data" in words and "stdlib" in words:
        return [*words, "--max_documents", "60", "--val_fraction", "0.2"]
    if "train.generate" in words:
        return [*words, "--max_new_tokens", "4"]
    if "--gate" in words:  # these models are too small to be any faster
        return [*words, "--gate", "peak_memory<=9x"]
    if "train.parity" in words:
        return [*words, "--layouts", "single", "--accumulation", "8"]
    if "train" in words:
        small = [flag for flag in flags if not flag.startswith(("--train_data", "--val_data", "--max_steps"))]
        steps = (
            ["--max_steps=3", "--allow_changes"]
            if "--resume_from_checkpoint" in words
            else ["--max_steps=2", "--overwrite"]
        )
        steps += ["--profile_steps=2:3"] if "--profile" in words else []
        steps += ["--profile=false", "--warmup_steps=1"] if "--config" in words else []
        return [*words, *small, "--eval_steps=1", *steps]
    return words


@pytest.fixture(scope="module")
def walked(workplace: Path, flags: list[str]) -> Path:
    """The workplace after the commands of all pages, in their order; those for several machines run in a test."""
    for line in filter(is_run, WALK):
        if "--num_machines" in line:
            continue
        if "--resume_from_checkpoint" in line:  # other commands have replaced the run since: make it anew
            run(shrunk(BASELINE, flags), workplace)
        run(shrunk(line, flags), workplace)
        if "--resume_from_checkpoint" in line:
            assert len(records(workplace / "checkpoint" / "baseline")) == 3, "two steps, and one after resuming"
    return workplace


@pytest.mark.slow
def test_every_command_runs_in_the_order_of_the_pages(walked: Path) -> None:
    for name in ("report.html", "report.md", "comparison.json"):
        assert (walked / "checkpoint" / "report" / name).exists()
    assert (walked / "data_notes" / "train.bin").exists()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/report.md"])
def test_the_python_of_a_page_runs(page: str, walked: Path) -> None:
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    command(sys.executable, "-c", source, cwd=walked)


@pytest.mark.slow
def test_the_commands_for_several_machines_train_together(
    walked: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    port = str(free_port())
    machines = [
        [port if word == "29500" else word for word in shrunk(line, flags)]
        for line in WALK
        if "--num_machines" in line
    ]
    assert len(machines) == 2
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda words: command(*words, "--checkpoint_path=machines", cwd=walked), machines))
    assert json.loads((walked / "machines" / "optimized" / "metrics.json").read_text())["world_size"] == 2
