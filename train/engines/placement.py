"""The requested layout compared with the actual one: a run that would train in another layout is refused.

Launchers may start fewer processes than requested, or unconnected ones, without a message: `accelerate launch --cpu
--num_processes 2` starts one; with `--num_machines 2` and DeepSpeed each machine trains alone unless the launcher is
`standard`; `srun -n 8 python` starts eight jobs of one process. The request is read from the launcher's command line
and from the cluster's environment variables.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import psutil
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from train.utils.errors import UserError
from train.utils.tables import markdown_table

TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # of srun, Open MPI, MPICH
NODES = "SLURM_STEP_NUM_NODES"


class RankPlacement(NamedTuple):
    """Where one process runs, and its part in the layout."""

    rank: int
    host: str
    device: str
    wrapping: str  # of the model: plain, DDP, FSDP2, ZeRO-2, ...
    stage: int  # of the pipeline; 0 without one
    data_rank: int


def check_launch(world_size: int) -> None:
    """Refuse to train with fewer processes than the launcher or the cluster was asked to start."""
    for name in TASKS:
        tasks = int(os.environ.get(name, "1"))
        if tasks > world_size:
            raise UserError(
                f"{name} is {tasks}, but this process is one of {world_size}: each would train alone; start one "
                "launcher per machine (torchrun or accelerate launch), as accelerate_configs/slurm.sh does"
            )
    for command, folder in _ancestors():
        requested, machines = _requested_of_accelerate(command, folder)
        if requested not in (None, world_size):
            remedy = (
                "add --deepspeed_multinode_launcher standard"
                if machines > 1
                else "launch with --config_file accelerate_configs/ddp.yaml, fsdp2.yaml or deepspeed.yaml"
            )
            raise UserError(
                f"accelerate launch was asked for {requested} processes and started {world_size}, which would train "
                f"alone; {remedy}"
            )


def _ancestors() -> Iterator[tuple[list[str], str]]:
    """(command line, working directory) of each ancestor of this process."""
    for process in psutil.Process().parents():
        try:
            yield process.cmdline(), process.cwd()
        except psutil.Error:  # it has ended, or belongs to another user
            continue


def _requested_of_accelerate(command: list[str], folder: str) -> tuple[int | None, int]:
    """(processes, machines) that a flag or file of `accelerate launch` requests; (None, 1) for any other command."""
    names = [Path(argument).name for argument in command]
    starts = [
        index + 1
        for index, name in enumerate(names)
        if name in ("accelerate-launch", "accelerate.commands.launch")
        or (name == "launch" and index > 0 and names[index - 1] == "accelerate")
    ]
    if not starts:
        return None, 1
    args = launch_command_parser().parse_known_args(command[starts[0] :])[0]
    file = Path(folder, args.config_file or default_config_file)
    config = load_config_from_file(str(file)) if file.exists() else None
    return (
        args.num_processes or getattr(config, "num_processes", None),
        args.num_machines or getattr(config, "num_machines", 1),
    )


def check_placements(ranks: Sequence[tuple[RankPlacement, RankPlacement]]) -> str:
    """Return a table of the layout with a line for each host and stage; refuse one that is not the requested one.

    `ranks` has the actual and the requested placement of each rank.
    """
    for actual, requested in ranks:
        for field, value, expected in zip(RankPlacement._fields, actual, requested, strict=True):
            if value != expected:
                raise UserError(
                    f"rank {requested.rank} of {len(ranks)}: {field} is {value}, not {expected} as requested; compare "
                    "the launcher's configuration with the flags"
                )
    found = [actual for actual, _ in ranks]
    hosts = len({place.host for place in found})
    if hosts < int(os.environ.get(NODES, "1")):
        raise UserError(
            f"{NODES} is {os.environ[NODES]}, but the processes of this job are on {hosts}: each machine would train "
            "alone; give the launcher the number of machines and the first one's address"
        )
    rows = []
    group = attrgetter("stage", "host", "device")
    for (stage, host, device), places in groupby(sorted(found, key=group), group):
        own_ranks, data_ranks = zip(*((str(place.rank), str(place.data_rank)) for place in places), strict=True)
        rows.append((host, device, str(stage), ", ".join(own_ranks), ", ".join(data_ranks)))
    table = markdown_table(["host", "device", "stage", "ranks", "data-parallel ranks"], rows)
    return f"{found[0].wrapping} on {len(found)} process{'es' * (len(found) > 1)}\n{table}"
