"""Two machines train together: network namespaces joined by a cable, or one machine twice where none can be had."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import LOSS_TOLERANCE, ROOT, command, free_port, losses

ENTER = ["nsenter", "--user", "--net", "--preserve-credentials", "--target"]
# A namespace lives as long as a process in it. This one ends when its standard input does: with this test.
HOLD = ["sh", "-c", "ip link set lo up && echo ready && exec cat"]


@dataclass(frozen=True)
class Machine:
    enter: list[str]  # what a command on this machine begins with
    address: str
    interface: str


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    with ExitStack() as stack:
        try:
            yield _joined_namespaces(stack)
        except (OSError, subprocess.CalledProcessError):
            yield [Machine([], "127.0.0.1", "lo")] * 2


def _joined_namespaces(stack: ExitStack) -> list[Machine]:
    holders: list[str] = []
    for make in (["unshare", "--user", "--map-root-user", "--net"], None):
        make = make or [*ENTER, holders[0], "unshare", "--net"]
        holder = stack.enter_context(subprocess.Popen([*make, *HOLD], stdin=-1, stdout=-1, stderr=-3, text=True))
        stack.callback(holder.kill)
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            raise OSError("no namespaces here")
        holders.append(str(holder.pid))
    one, two = ([*ENTER, holder] for holder in holders)
    cable = ["ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", holders[1]]
    subprocess.run([*one, *cable], check=True)
    for enter, address in ((one, "10.0.0.1"), (two, "10.0.0.2")):
        subprocess.run([*enter, "ip", "address", "add", f"{address}/24", "dev", "cable"], check=True)
        subprocess.run([*enter, "ip", "link", "set", "cable", "up"], check=True)
    return [Machine(one, "10.0.0.1", "cable"), Machine(two, "10.0.0.2", "cable")]


def launch(machines: list[Machine], folder: Path, *words: object, options: tuple[str, ...] = ()) -> list[list[str]]:
    """The command of each machine: a process each, through the shipped configuration."""
    port = free_port()
    return [
        [
            *machine.enter, "env", f"GLOO_SOCKET_IFNAME={machine.interface}",
            "accelerate", "launch", "--config_file", f"{ROOT}/accelerate_configs/deepspeed.yaml",
            "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank),
            "--main_process_ip", machines[0].address, "--main_process_port", str(port),
            "--deepspeed_multinode_launcher", "standard", "--same_network", *options,
            "-m", "train", "--run_type=optimized", f"--checkpoint_path={folder}", *map(str, words),
        ]
        for rank, machine in enumerate(machines)
    ]  # fmt: skip


def layout(name: str) -> list[str]:
    """Flags that share the 4 sequences of a step of the `finished` run between two processes."""
    stages = {"zero2": 1, "pipeline": 2}[name]
    return [
        f"--deepspeed_config={ROOT}/ds_configs/{name}.json",
        f"--pipeline_stages={stages}",
        "--train_micro_batch_size_per_gpu=2",
        f"--gradient_accumulation_steps={stages}",
        "--mixed_precision=no",
        "--save_interval=4",
    ]


@pytest.mark.parametrize("name", ["zero2", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_two_machines_compute_what_one_process_does(
    machines: list[Machine], flags: list[str], finished: Path, tmp_path: Path, name: str
) -> None:
    commands = launch(machines, tmp_path, *flags, *layout(name))
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda words: command(*words, cwd=tmp_path), commands))
    run = tmp_path / "optimized"
    assert losses(run) == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    assert "training: 100%" in done[0].stderr
    assert "training:" not in done[1].stderr
