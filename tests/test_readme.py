"""Every command of the README runs, shrunk to seconds by flags added at its end, and its table of flags is whole."""

import dataclasses
import json
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT, command, free_port
from train.config.run_config import RunConfig

README = (ROOT / "README.md").read_text()
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def flag_table() -> str:
    rows = ["| flag | default | what it is |", "| --- | --- | --- |"]
    for field in dataclasses.fields(RunConfig):
        default = "" if field.default is None or field.default is False else f"`{field.default}`"
        rows.append(f"| `--{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(rows)


def test_the_table_of_flags_is_that_of_the_configuration() -> None:
    found = re.search(r"<!-- flags -->\n(.*?)\n<!-- /flags -->", README, re.DOTALL)
    assert found is not None
    assert found[1] == flag_table()


def test_the_readme_opens_with_the_two_commands() -> None:
    assert [shlex.split(line, comments=True) for line in COMMANDS[:2]] == [["make", "demo"], ["make", "test"]]
    assert README.index("make demo") < 600


@pytest.fixture(scope="module")
def workplace(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader's: the shipped configurations, some notes, and the tokens of steps before."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("accelerate_configs", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notes").mkdir()
    for number in range(30):
        (folder / "notes" / f"{number}.txt").write_text(f"Note {number}.\n" * 20)
    return folder


def shrunk(line: str, flags: list[str]) -> list[str]:
    """A README command as run here: on fewer processes, this machine and a small model; the last of a flag wins."""
    words = shlex.split(line, comments=True)
    words = ["127.0.0.1" if word == "10.0.0.1" else word for word in words]
    # A launch gets a free port, so that tests run side by side.
    if words[0] == "torchrun":
        words[1:1] = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    elif words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
    elif words[0] == "accelerate" and "--main_process_port" not in words:
        words[2:2] = ["--main_process_port", "0"]
    for key, value in (("--num_processes", "2"), ("--num_gpus", "2"), ("--nproc_per_node", "2")):
        if key in words:
            words[words.index(key) + 1] = value
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
        steps = ["--max_steps=3"] if "--resume_from_checkpoint" in words else ["--max_steps=2", "--overwrite"]
        steps += ["--profile_steps=2:3"] if "--profile" in words else []
        return [*words, *small, "--eval_steps=1", *steps]
    return words


@pytest.fixture(scope="module")
def walked(workplace: Path, flags: list[str]) -> Path:
    """The workplace after every command of the README, in its order; those for several machines come in a test."""
    baseline = next(line for line in COMMANDS if line.startswith("python -m train --run_type baseline"))
    for line in COMMANDS:
        if line.startswith("make ") or "--num_machines" in line:
            continue
        if "--resume_from_checkpoint" in line:  # other commands have replaced the run since: make it anew
            command(*shrunk(baseline, flags), cwd=workplace)
        command(*shrunk(line, flags), cwd=workplace)
    return workplace


@pytest.mark.slow
def test_every_command_runs_in_the_order_of_the_readme(walked: Path) -> None:
    for name in ("report.html", "report.md", "comparison.json"):
        assert (walked / "checkpoint" / "report" / name).exists()
    assert (walked / "data_notes" / "train.bin").exists()
    assert json.loads((walked / "checkpoint" / "baseline" / "metrics.json").read_text())["steps"] == 3, "resumed"


@pytest.mark.slow
def test_the_python_of_the_readme_runs(walked: Path) -> None:
    for source in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        command(sys.executable, "-c", source, cwd=walked)


@pytest.mark.slow
def test_the_commands_for_several_machines_train_together(
    walked: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    port = str(free_port())
    machines = [
        [port if word == "29500" else word for word in shrunk(line, flags)]
        for line in COMMANDS
        if "--num_machines" in line
    ]
    assert len(machines) == 2
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda words: command(*words, "--checkpoint_path=machines", cwd=walked), machines))
    assert json.loads((walked / "machines" / "optimized" / "metrics.json").read_text())["world_size"] == 2
