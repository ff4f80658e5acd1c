"""The rendezvous of a job's processes: they find each other's store, call the roll, and compare what they run.

Rank 0 hosts a store. Under DeepSpeed's launcher, or none, it is at MASTER_ADDR and MASTER_PORT, where PyTorch's
process group finds it as well. torchelastic (torchrun, `accelerate launch`) passes the address of a store that its
agent keeps for the life of the job. PyTorch uses the same keys in that store at every attempt of the job
(`--max_restarts`), and so finds the addresses of processes that have ended. Here rank 0 of each attempt has a store of
its own, whose address is in the agent's store. That store also remembers what a later attempt has to know: which
run folder the job has claimed, when it began, and why the guard has stopped it.
"""

import contextlib
import functools
import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from train.utils import processes
from train.utils.errors import STOPPED_BY_GUARD, EarlyEnd, UserError, first_line

POLL_SECONDS = 0.2
# The agent's store is there before its processes are, or the agent is gone. PyTorch tries to connect twice.
AGENT_TIMEOUT = timedelta(seconds=30)
SHOWN = 3  # differences that are listed
REMEDY = (
    "start the same command on every machine, each with its own --machine_rank and with the main machine's address"
)
SAME = "give all machines the same command, the same folders and the same versions"


def is_claimed(run_folder: Path) -> bool:
    """Whether an earlier attempt of this job has claimed the run folder."""
    store, key = _agent_store(), _key("claimed")
    return store is not None and store.check([key]) and store.get(key).decode() == str(run_folder)


def job_id() -> str:
    """What the processes of this job share with those that the launcher starts in their place; empty without it."""
    return _key("job") if _agent_store() is not None else ""


def claim(run_folder: Path) -> None:
    """Record that this job writes to the run folder."""
    store = _agent_store()
    if store is not None:
        store.set(_key("claimed"), str(run_folder))


def job_start(own_start: float) -> float:
    """When the first attempt of this job began (Unix time); `own_start` is when this process did."""
    store = _agent_store()
    return own_start if store is None else float(store.compare_set(_key("start"), "", str(own_start)))


def record_guard_stop(sentence: str) -> None:
    """Record why this job is stopped for good: the launcher restarts it all the same."""
    store = _agent_store()
    if store is not None:
        with contextlib.suppress(RuntimeError):  # a launcher that is gone restarts nothing
            store.set(_key("guard_stop"), sentence)


def refuse_after_guard_stop() -> None:
    """End with the guard's exit code, if the guard has stopped an earlier attempt of this job."""
    store, key = _agent_store(), _key("guard_stop")
    if store is None or not store.check([key]):
        return
    if processes.rank() != 0:
        time.sleep(processes.GRACE_SECONDS)  # rank 0 prints it, and then the launcher ends the others
    reason = store.get(key).decode()
    raise EarlyEnd(f"not started again, because it would end as before: {reason}", STOPPED_BY_GUARD)


def join(timeout: float, facts: Mapping[str, Any]) -> TCPStore | None:
    """The store of this attempt, in which every rank has joined with the same `facts`; None for a single process.

    The facts are flags, versions, what was read of data and checkpoint. MASTER_ADDR and MASTER_PORT, where process
    groups are formed, are the store's address then. Rank 0 keeps the store until it exits.

    Raises:
        UserError: if the store cannot be reached, if a rank does not join within `timeout` seconds, joins twice, or
            has other facts.
    """
    if processes.world_size() == 1:
        return None
    deadline = time.monotonic() + timeout
    agent = _agent_store()
    store = _host_or_connect(deadline) if agent is None else _join_attempt(agent, deadline, timeout)
    os.environ |= {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
    try:
        _call_roll(store, deadline, timeout, facts)
    except DistNetworkError as error:
        raise UserError(
            f"rank {processes.rank()} of {processes.world_size()}: rank 0 has exited before all ranks had joined, or "
            f"cannot be reached any more: {first_line(error)}; its own message says why"
        ) from None
    return store


def _host_or_connect(deadline: float) -> TCPStore:
    """The store at MASTER_ADDR and MASTER_PORT."""
    rank, host, port = processes.rank(), os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise UserError(
            f"rank {rank}: WORLD_SIZE is {processes.world_size()}, but MASTER_ADDR is '{host}' and MASTER_PORT "
            f"is '{port}'; start the processes with accelerate launch, torchrun or deepspeed, or set all of them"
        )
    if rank == 0:
        try:  # multi_tenant: PyTorch's process group shares the port within this process
            return TCPStore(host, int(port), is_master=True, wait_for_workers=False, multi_tenant=True)
        except DistNetworkError as error:
            raise UserError(
                f"rank 0: cannot host the job's store at MASTER_ADDR {host}, MASTER_PORT {port}: {first_line(error)}; "
                "another job or another rank 0 may have it: take another port (--main_process_port, --master_port), "
                "and give each machine its own rank"
            ) from None
    try:
        return TCPStore(host, int(port), is_master=False, timeout=_left(deadline))
    except (DistNetworkError, DistStoreError) as error:
        _unreachable(f"{host}, port {port}", error)


def _unreachable(address: str, error: Exception) -> NoReturn:
    raise UserError(
        f"rank {processes.rank()} of {processes.world_size()}: rank 0 cannot be reached at {address}: "
        f"{first_line(error)}; {REMEDY}"
    ) from None


def _call_roll(store: TCPStore, deadline: float, timeout: float, facts: Mapping[str, Any]) -> None:
    """Wait until every rank has joined, only once, and compare their facts."""
    rank, world_size = processes.rank(), processes.world_size()
    where = f"process {os.getpid()} on {socket.gethostname()}"
    asked = store.compare_set("world_size", "", str(world_size)).decode()
    if asked != str(world_size):
        _refuse(
            store, f"rank {rank} ({where}) belongs to a job of {world_size} processes, the others to one of {asked}"
        )
    if store.add(f"rank/{rank}", 1) > 1:
        other = json.loads(store.get(f"joined/{rank}"))["where"]
        _refuse(store, f"rank {rank} of {world_size} has joined twice: {other}, and {where}")
    store.set(f"joined/{rank}", json.dumps({"where": where, "facts": facts}))
    while missing := [str(other) for other in range(world_size) if not store.check([f"joined/{other}"])]:
        if store.check(["refused"]):
            _end(store.get("refused").decode())
        if time.monotonic() > deadline:
            ranks, have = ("ranks", "have") if len(missing) > 1 else ("rank", "has")
            _refuse(
                store, f"{ranks} {', '.join(missing)} of {world_size} {have} not joined within {timeout:g} seconds"
            )
        time.sleep(POLL_SECONDS)
    first, *others = (json.loads(store.get(f"joined/{other}")) for other in range(world_size))
    differences = [
        f"{key} is {first['facts'].get(key)} on rank 0 ({first['where']}) and {each['facts'].get(key)} on rank "
        f"{other} ({each['where']})"
        for other, each in enumerate(others, 1)
        for key in sorted({*first["facts"], *each["facts"]})
        if each["facts"].get(key) != first["facts"].get(key)
    ]
    if differences:
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        _end(f"the processes of the job differ: {'; '.join(differences[:SHOWN])}{more}; {SAME}")


def _refuse(store: TCPStore, sentence: str) -> NoReturn:
    """End this rank, and those that still wait for others."""
    store.set("refused", f"{sentence}; {REMEDY}")
    _end(f"{sentence}; {REMEDY}")


def _end(sentence: str) -> NoReturn:
    if processes.rank() == 0:
        time.sleep(10 * POLL_SECONDS)  # until the others have read it in the store, which ends with this process
    raise UserError(sentence)


@functools.cache
def _agent_store() -> TCPStore | None:
    """The store of torchelastic's agent; None under other launchers, or if it is not shared with the workers."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=AGENT_TIMEOUT)
    except (DistNetworkError, DistStoreError) as error:
        raise UserError(
            f"rank {processes.rank()}: the launcher's store at {address}, port {port}, does not answer "
            f"({first_line(error)}): the launcher has exited, or its network is gone; start the job again"
        ) from None
    store.set_timeout(timedelta(minutes=5))  # PyTorch's default, for values
    return store


def _key(name: str) -> str:
    """A key of this job: jobs without their own --rdzv_endpoint share a store, and by default the --rdzv_id."""
    agent = str(os.getppid()) if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else ""
    return f"gpt2flash/{os.environ.get('TORCHELASTIC_RUN_ID')}/{agent}/{name}"


def _join_attempt(agent: TCPStore, deadline: float, timeout: float) -> TCPStore:
    """The store of rank 0 of this attempt, whose address is in the agent's."""
    if processes.rank() == 0:
        address = _own_address(agent.host, agent.port)
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        agent.set(_key("rendezvous"), f"{address} {store.port}")
        return store
    while True:
        try:
            agent.wait([_key("rendezvous")], _left(deadline))
            host, port = agent.get(_key("rendezvous")).decode().split()
        except (DistNetworkError, DistStoreError):
            raise UserError(
                f"rank 0 of {processes.world_size()} has not joined within {timeout:g} seconds; {REMEDY}"
            ) from None
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            store = TCPStore(host, int(port), is_master=False, timeout=_left(deadline))
            if store.add(f"attempt/{processes.rank()}", 1) == 1:
                return store
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline:
                _unreachable(f"{host}, port {port}", error)
        time.sleep(0.5)  # the address is that of an earlier attempt, which has ended or is about to


def _own_address(host: str, port: int) -> str:
    """The address of this machine in the network that reaches `host`, or `host` itself if that is this machine."""
    with socket.create_connection((host, port)) as probe:
        here, there = probe.getsockname()[0], probe.getpeername()[0]
    return host if here == there else here


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))
