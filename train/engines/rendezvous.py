"""Where the processes of a job meet, also after the launcher (`--max_restarts`) has started all of them anew.

torchelastic hands its workers the address of a store that its agent holds as long as the job lives. PyTorch meets in
that store under the same keys at every attempt, and so finds the addresses of dead processes. Here rank 0 of each
attempt holds a store of its own, and the agent's store only says where; and it remembers which run folder the job has
begun to write, so that a later attempt may go on in it.
"""

import functools
import os
import socket
import time
from pathlib import Path

from torch.distributed import TCPStore

TIMEOUT_SECONDS = 300.0


def has_begun(run_folder: Path) -> bool:
    """Whether an earlier attempt of this job has made the run folder its own."""
    store, key = _agent_store(), _key("begun")
    return store is not None and store.check([key]) and store.get(key).decode() == str(run_folder)


def mark_begun(run_folder: Path) -> None:
    store = _agent_store()
    if store is not None:
        store.set(_key("begun"), str(run_folder))


@functools.cache  # rank 0 holds the store until its end
def meet() -> TCPStore | None:
    """Point MASTER_ADDR and MASTER_PORT, where process groups are formed, to this attempt's own store.

    Raises:
        TimeoutError: when rank 0 does not come.
    """
    agent = _agent_store()
    if agent is None:
        return None
    rank = os.environ["RANK"]
    if rank == "0":
        address = _own_address(agent.host, agent.port)
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        agent.set(_key("meeting"), f"{address} {store.port}")
    else:
        store = _join(agent, rank)
    os.environ |= {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
    return store


@functools.cache
def _agent_store() -> TCPStore | None:
    """The store of torchelastic's agent; None under other launchers, and where it is not shared with the workers."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def _key(name: str) -> str:
    """Jobs without an --rdzv_endpoint of their own share a store, and their --rdzv_id is the same by default."""
    agent = str(os.getppid()) if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else ""
    return f"gpt2flash/{os.environ.get('TORCHELASTIC_RUN_ID')}/{agent}/{name}"


def _own_address(host: str, port: int) -> str:
    """Where the others reach this machine: by the network that leads to `host`, or as `host` when that is here."""
    with socket.create_connection((host, port)) as probe:
        here, there = probe.getsockname()[0], probe.getpeername()[0]
    return host if here == there else here


def _join(agent: TCPStore, rank: str) -> TCPStore:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        host, port = agent.get(_key("meeting")).decode().split()
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            store = TCPStore(host, int(port), is_master=False)
            if store.add(f"joined/{rank}", 1) == 1:
                return store
        except (OSError, RuntimeError):
            pass
        time.sleep(0.5)  # that was an earlier attempt's: dead, or soon to be
    raise TimeoutError(f"rank 0 did not come to the meeting of the processes within {TIMEOUT_SECONDS:.0f} seconds")
