"""The rendezvous of a job's processes, also after the launcher (`--max_restarts`) has restarted all of them.

torchelastic passes its workers the address of a store that its agent keeps for the life of the job. PyTorch uses the
same keys in that store at every attempt, and so finds the addresses of processes that have ended. Here rank 0 of each
attempt has a store of its own, whose address is in the agent's store. The agent's store also remembers which run
folder the job has claimed, so that a later attempt may resume in it.
"""

import functools
import os
import socket
import time
from pathlib import Path

from torch.distributed import TCPStore

TIMEOUT_SECONDS = 300.0


def is_claimed(run_folder: Path) -> bool:
    """Whether an earlier attempt of this job has claimed the run folder."""
    store, key = _agent_store(), _key("claimed")
    return store is not None and store.check([key]) and store.get(key).decode() == str(run_folder)


def claim(run_folder: Path) -> None:
    """Record that this job writes to the run folder."""
    store = _agent_store()
    if store is not None:
        store.set(_key("claimed"), str(run_folder))


@functools.cache  # rank 0 keeps the store until it exits
def join() -> TCPStore | None:
    """Set MASTER_ADDR and MASTER_PORT, where process groups are formed, to the store of this attempt.

    Raises:
        TimeoutError: if rank 0 does not join.
    """
    agent = _agent_store()
    if agent is None:
        return None
    rank = os.environ["RANK"]
    if rank == "0":
        address = _own_address(agent.host, agent.port)
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        agent.set(_key("rendezvous"), f"{address} {store.port}")
    else:
        store = _connect(agent, rank)
    os.environ |= {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
    return store


@functools.cache
def _agent_store() -> TCPStore | None:
    """The store of torchelastic's agent; None under other launchers, or if it is not shared with the workers."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def _key(name: str) -> str:
    """A key of this job: jobs without their own --rdzv_endpoint share a store, and by default the --rdzv_id."""
    agent = str(os.getppid()) if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else ""
    return f"gpt2flash/{os.environ.get('TORCHELASTIC_RUN_ID')}/{agent}/{name}"


def _own_address(host: str, port: int) -> str:
    """The address of this machine in the network that reaches `host`, or `host` itself if that is this machine."""
    with socket.create_connection((host, port)) as probe:
        here, there = probe.getsockname()[0], probe.getpeername()[0]
    return host if here == there else here


def _connect(agent: TCPStore, rank: str) -> TCPStore:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        host, port = agent.get(_key("rendezvous")).decode().split()
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            store = TCPStore(host, int(port), is_master=False)
            if store.add(f"joined/{rank}", 1) == 1:
                return store
        except (OSError, RuntimeError):
            pass
        time.sleep(0.5)  # the address is that of an earlier attempt, which has ended or is about to
    raise TimeoutError(f"rank 0 did not join the rendezvous within {TIMEOUT_SECONDS:.0f} seconds")
