"""Where the processes of a job meet, also after the launcher (`--max_restarts`) has started all of them anew.

torchelastic hands its workers the address of a store that its agent holds as long as the job lives. PyTorch meets in
that store under the same keys at every attempt, and so finds the addresses of dead processes. Here rank 0 of each
attempt holds a store of its own, and the agent's store only says where; and it remembers that the job has begun to
write its run folder, so that a later attempt may go on in it.
"""

import functools
import os
import socket
import time

from torch.distributed import TCPStore

MEETING = "gpt2flash/meeting"  # "host port" of the store of the newest attempt's rank 0
BEGUN = "gpt2flash/begun"
TIMEOUT_SECONDS = 300.0


def has_begun() -> bool:
    """Whether an earlier attempt of this job has made the run folder its own."""
    store = _agent_store()
    return store is not None and store.check([BEGUN])


def mark_begun() -> None:
    store = _agent_store()
    if store is not None:
        store.set(BEGUN, "yes")


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
        agent.set(MEETING, f"{address} {store.port}")
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


def _own_address(host: str, port: int) -> str:
    """Where the others reach this machine: by the network that leads to `host`, or as `host` when that is here."""
    with socket.create_connection((host, port)) as probe:
        here, there = probe.getsockname()[0], probe.getpeername()[0]
    return host if here == there else here


def _join(agent: TCPStore, rank: str) -> TCPStore:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        host, port = agent.get(MEETING).decode().split()
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            store = TCPStore(host, int(port), is_master=False)
            if store.add(f"joined/{rank}", 1) == 1:
                return store
        except (OSError, RuntimeError):
            pass
        time.sleep(0.5)  # that was an earlier attempt's: dead, or soon to be
    raise TimeoutError(f"rank 0 did not come to the meeting of the processes within {TIMEOUT_SECONDS:.0f} seconds")
