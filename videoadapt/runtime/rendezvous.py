"""How the processes of a job find each other: a key-value store (torch's TCPStore) that rank 0 hosts.

A file in the run folder says where the store listens. The file system serves this one file only: a store of files takes
a lock for every key and every look at it, which is thousands of locks for 32 ranks.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from videoadapt.errors import RunError, few
from videoadapt.runtime.files import write_json
from videoadapt.runtime.slurm import RankEnv

_POLL_S = 0.2  # time between two looks at the file or at the store
_CONNECT_S = 3.0  # an address of another network may give no answer at all
_LATE_S = 5.0  # rank 0 may have started to wait `join_s` after another rank
_ANSWER_S = 30.0  # for an answer of the store, until `Collectives` has set another time


@dataclass(frozen=True)
class StoreAddress:
    """Where rank 0 hosts the store. The fields are keys of the JSON in the file."""

    id: str  # random: the store knows it, too
    host: str
    addresses: list[str]  # of rank 0's machine, the best one first
    port: int


@dataclass(frozen=True)
class Rendezvous:
    """The ranks that have found each other."""

    store: dist.Store  # for process groups, which may wait for hours in it
    control: dist.Store  # the same keys by another connection, since a connection serves one call at a time
    hosts: tuple[str, ...]  # name of each rank's machine
    rank0: str  # address of rank 0's machine, as this rank reaches it
    host_of_store: str  # for messages
    hosted: dist.Store | None = None  # the store itself, if this process hosts it: it ends with the last reference

    @classmethod
    def of(cls, env: RankEnv, folder: Path, number: int, gpu: str | None, join_s: float) -> Rendezvous:
        """Waits until every rank has joined.

        Args:
            env: The rank of this process.
            folder: Where rank 0 writes the file; all nodes see it. torchrun has a store of its own and needs no file.
            number: How many rendezvous this process has had before.
            gpu: UUID of this rank's GPU; None without GPUs.
            join_s: Seconds in which all ranks must have joined.

        Raises:
            RunError: On all ranks, if a rank is missing or two ranks have one GPU.
        """
        if env.launcher == "torchrun":
            return _join_torchrun(env, number, gpu, join_s)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{env.rendezvous}-{number}.json"
        return _host(env, file, gpu, join_s) if env.rank == 0 else _join(env, file, gpu, join_s)


def _host(env: RankEnv, file: Path, gpu: str | None, join_s: float) -> Rendezvous:
    """Hosts the store on any free port, and removes its file when the ranks have joined or are given up."""
    hosted = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=_ANSWER_S), wait_for_workers=False)
    address = StoreAddress(uuid.uuid4().hex, socket.gethostname(), own_addresses(), hosted.port)
    hosted.set("id", address.id)
    write_json(file, asdict(address))
    try:
        hosts = _register(hosted, env, gpu, join_s)
    finally:
        file.unlink(missing_ok=True)
    control = _client("localhost", hosted.port)
    return Rendezvous(hosted, control, hosts, address.addresses[0], _host_of_store(env, address.host), hosted)


def _join(env: RankEnv, file: Path, gpu: str | None, join_s: float) -> Rendezvous:
    """Connects to the store of the file.

    A killed start of the job may have left its file. Its store is gone, or this rank has joined it before: then the
    file is looked at again, until rank 0 of this start has replaced it.
    """
    deadline, problem = time.monotonic() + join_s, f"rank 0 has not written {file}"
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, TypeError):  # not there yet
            address = StoreAddress(**json.loads(file.read_text(encoding="utf-8")))
            problem = f"rank 0 on {address.host} does not answer at {few(address.addresses)}, port {address.port}"
            if reached := _reach(address):
                store = _client(reached, address.port)
                if store.add(f"joined/{env.rank}", 1) == 1:
                    hosts = _register(store, env, gpu, join_s)
                    control = _client(reached, address.port)
                    return Rendezvous(store, control, hosts, reached, _host_of_store(env, address.host))
        time.sleep(_POLL_S)
    raise RunError(
        f"rank {env.rank} of {env.world} did not find rank 0 within {join_s:g} s (parallel.join_s): {problem}. Check "
        "the output of rank 0, and that all nodes see the same run.dir and reach each other"
    )


def _join_torchrun(env: RankEnv, number: int, gpu: str | None, join_s: float) -> Rendezvous:
    try:
        first, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=join_s)))
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's store outlives the ranks: after a restart it still has the keys of those before.
        prefix = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{number}"
        store, control = (dist.PrefixStore(prefix, each) for each in (first, _client(host, port)))
    except (RuntimeError, ValueError) as error:  # ValueError: a variable such as RANK is not set
        raise RunError(f"the {env.world} ranks (WORLD_SIZE) cannot find each other: {error}") from error
    hosts = _register(store, env, gpu, join_s)
    return Rendezvous(store, control, hosts, host, f"the store of torchrun on {host}")


def _reach(address: StoreAddress) -> str | None:
    """Returns the first address at which the store with this id answers, or None."""
    for each in address.addresses:
        # A plain connection first: torch's client would print every address that does not answer.
        with suppress(OSError), socket.create_connection((each, address.port), _CONNECT_S):
            with suppress(RuntimeError):
                if _client(each, address.port, _CONNECT_S).get("id").decode() == address.id:
                    return each
    return None


def _client(host: str, port: int, timeout_s: float = _ANSWER_S) -> dist.Store:
    return dist.TCPStore(host, port, None, False, timedelta(seconds=timeout_s))


def _host_of_store(env: RankEnv, host: str) -> str:
    return f"rank 0 of {env.world} on {host}"


def _register(store: dist.Store, env: RankEnv, gpu: str | None, join_s: float) -> tuple[str, ...]:
    """Writes this rank's host and GPU, and waits for those of all ranks. Returns the hosts, by rank.

    Rank 0 waits for all, and writes `error`: the missing ranks, or two ranks with one GPU; empty without an error.
    """
    store.set(f"register/{env.rank}", json.dumps([socket.gethostname(), gpu]))
    keys = [f"register/{rank}" for rank in range(env.world)]
    if env.rank == 0:
        error = _wait_for_all(store, keys, join_s)
        store.set("error", error)
        if error:
            _wait_for_readers(store, keys)
    else:
        try:
            store.wait(["error"], timedelta(seconds=join_s + _LATE_S))
            error = store.get("error").decode()
            store.add("read", 1)
        except RuntimeError:
            raise RunError(
                f"rank 0 of {env.world} ended while rank {env.rank} waited for the others; check the output of rank 0"
            ) from None
    if error:
        raise RunError(error)
    return tuple(json.loads(value)[0] for value in store.multi_get(keys))


def _wait_for_all(store: dist.Store, keys: Sequence[str], join_s: float) -> str:
    """Returns the error, or an empty string."""
    deadline = time.monotonic() + join_s
    while missing := [rank for rank, key in enumerate(keys) if not store.check([key])]:
        if time.monotonic() > deadline:
            joined = f"{len(keys) - len(missing)} of {len(keys)} ranks joined within {join_s:g} s (parallel.join_s)"
            return (
                f"{joined}; missing: rank {few(missing)}. Check the output of the missing ranks, and that all nodes "
                "see the same run.dir"
            )
        time.sleep(_POLL_S)
    return gpu_conflict([tuple(json.loads(value)) for value in store.multi_get(list(keys))])


def _wait_for_readers(store: dist.Store, keys: Sequence[str]) -> None:
    """Waits until the ranks that have joined have read the error: the store ends with this process."""
    deadline, others = time.monotonic() + _LATE_S, sum(store.check([key]) for key in keys) - 1
    while store.add("read", 0) < others and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def gpu_conflict(gpus: Sequence[tuple[str, str | None]]) -> str:
    """Checks that either every rank or no rank has a GPU, and that no two ranks use the same one.

    Args:
        gpus: Host and GPU UUID (None: no GPU) of ranks 0, 1, ...

    Returns:
        The error message, or an empty string.
    """
    without = [rank for rank, (_, gpu) in enumerate(gpus) if gpu is None]
    if 0 < len(without) < len(gpus):
        return f"rank {few(without)} found no GPU on {gpus[without[0]][0]}, but other ranks found one"
    for rank, (host, gpu) in enumerate(gpus):
        first = gpus.index((host, gpu))
        if gpu is not None and first < rank:
            return f"ranks {first} and {rank} would share one GPU of {host}; start one rank for each GPU"
    return ""


def own_addresses() -> list[str]:
    """Returns the IP addresses of this machine, in the order in which other machines try them.

    First the address of the host name, then the one of the default route, then the others. The host name of some
    clusters stands for 127.0.1.1, so an address of this machine alone comes last.
    """
    active = {name for name, interface in psutil.net_if_stats().items() if interface.isup}
    found = [
        each.address
        for name, addresses in psutil.net_if_addrs().items()
        for each in addresses
        if name in active and each.family in (socket.AF_INET, socket.AF_INET6) and not each.address.startswith("fe80:")
    ]
    named: set[str] = set()
    with suppress(OSError):
        named = {str(information[4][0]) for information in socket.getaddrinfo(socket.gethostname(), None)}
    default = local_address_to("192.0.2.1")  # of no machine: an address for documentation
    return sorted(found, key=lambda each: (_is_local(each), each not in named, each != default)) or ["127.0.0.1"]


def _is_local(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def local_address_to(address: str) -> str | None:
    """Returns the address of this machine from which packets to another one leave; None without a route."""
    try:
        family, kind, _, _, end = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as unconnected:
            unconnected.connect(end)  # sends nothing
            return str(unconnected.getsockname()[0])
    except OSError:
        return None


def interface_to(rank0: str, *, several_hosts: bool) -> str | None:
    """Returns the name of the network interface by which this machine reaches rank 0, such as `eth0`.

    Args:
        rank0: Address or name of rank 0's machine.
        several_hosts: Whether the ranks are on several machines.
    """
    local = local_address_to(rank0)
    if several_hosts and (local is None or _is_local(local)):  # on rank 0's machine, whose own name may be 127.0.1.1
        local = own_addresses()[0]
    names = (name for name, each in psutil.net_if_addrs().items() if local in {one.address for one in each})
    return next(names, None)
