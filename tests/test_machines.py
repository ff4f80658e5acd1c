"""Two machines train together: network namespaces joined by a cable, or one machine twice where none can be had."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest

from tests.conftest import LOSS_TOLERANCE, ROOT, accelerate, command, free_port, losses, records
from tests.jobs import END_SECONDS, job

SLURM = ROOT / "accelerate_configs" / "slurm.sh"

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
        holder = stack.enter_context(subprocess.Popen([*make, *HOLD], stdin=PIPE, stdout=PIPE, text=True))
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
            "accelerate", "launch", "--config_file", f"{ROOT}/accelerate_configs/deepspeed_machines.yaml",
            "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank),
            "--main_process_ip", machines[0].address, "--main_process_port", str(port),
            *options,
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "pipeline"])
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


@pytest.mark.slow
def test_a_process_that_dies_on_one_machine_ends_the_job_on_the_other(
    machines: list[Machine], flags: list[str], tmp_path: Path
) -> None:
    one, two = launch(machines, tmp_path, *flags, *layout("zero2"), "--max_steps=100000", "--warmup_steps=0")
    with job(*one, cwd=tmp_path) as first, job(*two, cwd=tmp_path) as second:
        first.until_step(6, tmp_path / "optimized")
        processes = [*first.processes(), *second.processes()]
        second.worker(1).kill()
        assert first.end(END_SECONDS) != 0
        assert second.end(END_SECONDS) != 0
        assert not psutil.wait_procs(processes, timeout=5)[1]
        assert "rank 0 of 2: lost another process of the job" in first.said()


@pytest.mark.slow
def test_a_network_that_is_gone_ends_the_job_on_both_machines(
    machines: list[Machine], flags: list[str], tmp_path: Path
) -> None:
    if not machines[0].enter:
        pytest.skip("no network namespaces here")
    train = [*flags, *layout("zero2"), "--max_steps=100000", "--warmup_steps=0", "--timeout=8"]
    one, two = launch(machines, tmp_path, *train)
    cable = [*machines[1].enter, "ip", "link", "set", "cable"]
    with job(*one, cwd=tmp_path) as first, job(*two, cwd=tmp_path) as second:
        first.until_step(6, tmp_path / "optimized")
        processes = [*first.processes(), *second.processes()]
        subprocess.run([*cable, "down"], check=True)
        try:
            assert first.end(END_SECONDS) != 0
            assert second.end(END_SECONDS) != 0
        finally:
            subprocess.run([*cable, "up"], check=True)
        assert not psutil.wait_procs(processes, timeout=5)[1]
        assert "rank 1 of 2: no sign of life for" in first.said()
        assert "rank 0 of 2: no sign of life for" in second.said()


@pytest.mark.slow
def test_a_job_of_two_machines_restarts(machines: list[Machine], flags: list[str], tmp_path: Path) -> None:
    train = [*flags, *layout("zero2"), "--max_steps=40"]
    accelerate(*train, "--run_type=optimized", f"--checkpoint_path={tmp_path}/whole", cwd=tmp_path)
    one, two = launch(machines, tmp_path, *train, options=("--max_restarts", "1"))
    with job(*one, cwd=tmp_path) as first, job(*two, cwd=tmp_path) as second:
        first.until_step(6, tmp_path / "optimized")
        first.until_saved(tmp_path / "optimized")
        second.worker(1).kill()
        assert first.end() == 0, first.said() + second.said()
        assert second.end() == 0, second.said()
        assert first.said().count("restarted by the launcher: the run resumes from") == 1
    assert losses(tmp_path / "optimized") == losses(tmp_path / "whole" / "optimized")


@pytest.mark.slow
def test_the_hostfile_starts_one_job(
    machines: list[Machine], flags: list[str], finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "hostfile").write_text((ROOT / "ds_configs" / "hostfile").read_text().replace("slots=8", "slots=1"))
    port = free_port()
    commands = [
        [
            *machine.enter, "env", f"GLOO_SOCKET_IFNAME={machine.interface}",
            "deepspeed", "--hostfile", "hostfile", "--no_ssh", "--node_rank", rank,
            "--master_addr", machines[0].address, "--master_port", port, "--module", "train",
            *flags, *layout("zero2"), "--run_type=optimized", f"--checkpoint_path={tmp_path}",
        ]
        for rank, machine in enumerate(machines)
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda words: command(*words, cwd=tmp_path), commands))
    assert losses(tmp_path / "optimized") == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


def test_the_slurm_script_is_a_script() -> None:
    command("bash", "-n", SLURM, cwd=ROOT)


@pytest.fixture
def slurm(machines: list[Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The id of the job. Slurm's own commands are stand-ins that only start what they are given, once a node."""
    for name in ("accelerate_configs", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    nodes = [
        f'SLURM_NODEID={rank} GLOO_SOCKET_IFNAME={machine.interface} {" ".join(machine.enter)} "${{@:2}}" &'
        for rank, machine in enumerate(machines)
    ]
    end = ["wait -n && wait -n", "status=$?", "kill $(jobs -p) 2> /dev/null", "wait", "exit $status"]  # a bad exit's
    (programs / "srun").write_text("\n".join(["#!/bin/bash", *nodes, *end, ""]))
    addresses = f"printf '{machines[0].address}\\n{machines[1].address}\\n'"
    (programs / "scontrol").write_text(
        f"#!/bin/bash\ncase $1 in requeue) echo $2 >> {tmp_path}/requeued;; *) {addresses};; esac\n"
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    facts = {"JOB_ID": str(free_port()), "JOB_NODELIST": "node[1-2]", "NNODES": "2", "GPUS_ON_NODE": "1"}
    for key, value in facts.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    return facts["JOB_ID"]


@pytest.mark.slow
def test_the_slurm_script_trains_and_goes_on_when_requeued(
    slurm: str, flags: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "checkpoint" / "optimized"
    with monkeypatch.context() as time_is_over:
        time_is_over.setenv("SLURM_JOB_END_TIME", "1")
        done = command("bash", SLURM, *flags, *layout("zero2"), cwd=tmp_path)
    assert "the end of the Slurm job: the run stops after step 1 of 8" in done.stderr
    assert (tmp_path / "requeued").read_text() == f"{slurm}\n"
    command("bash", SLURM, *flags, *layout("zero2"), cwd=tmp_path)
    assert (tmp_path / "requeued").read_text() == f"{slurm}\n", "a finished run is not requeued"
    assert losses(run) == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)
    command("bash", SLURM, *flags, *layout("zero2"), "--max_steps=10", "--allow_changes", cwd=tmp_path)
    assert [record["step"] for record in records(run)] == list(range(1, 11))
    assert losses(run)[:8] == pytest.approx(losses(finished), abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_the_signal_before_the_end_of_a_slurm_job_reaches_the_ranks(
    slurm: str, flags: list[str], tmp_path: Path
) -> None:
    """As Slurm does: the one that the script asks for, to all processes of the step, but not to the batch shell."""
    [name] = re.findall(r"^#SBATCH --signal=(\w+)@", SLURM.read_text(), re.MULTILINE)
    run = tmp_path / "checkpoint" / "optimized"
    with job("bash", SLURM, *flags, *layout("zero2"), "--max_steps=100000", cwd=tmp_path) as started:
        started.until_step(3, run)
        for process in started.processes():
            if process != started.process and "srun" not in " ".join(process.cmdline()):
                process.send_signal(signal.Signals[f"SIG{name}"])
        assert started.end(END_SECONDS) == 0, started.said()
        assert f"SIG{name}: the run stops after step" in started.said()
    assert (run / "latest").read_text() == f"step-{records(run)[-1]['step']}\n"
    assert (tmp_path / "requeued").read_text() == f"{slurm}\n"


@pytest.mark.slow
def test_a_slurm_job_that_the_guard_stops_is_not_requeued(slurm: str, flags: list[str], tmp_path: Path) -> None:
    diverging = ["--learning_rate=1e30", "--warmup_steps=0"]
    done = command("bash", SLURM, *flags, *layout("zero2"), *diverging, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert done.stderr.count("the run stops before this update") == 1, done.stderr
    assert done.stderr.count("not started again, because it would end as before") == 3
    assert (tmp_path / "checkpoint" / "optimized" / "latest").exists()
    assert not (tmp_path / "requeued").exists()
