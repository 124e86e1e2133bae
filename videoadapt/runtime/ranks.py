"""The ranks of a job: who am I of how many, meeting the others, and waiting for one another.

One process alone is rank 0 of 1: code that asks for its rank needs no second path.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.errors import RunError
from videoadapt.runtime.signals import JOB_SIGNALS, Stopped, StopRequest
from videoadapt.runtime.slurm import RankEnv, rank_env, slurm_job

T = TypeVar("T")

PATIENCE_S = 12 * 3600.0  # for the slowest rank of a stage whose ranks meet only at its end
_LAST_WORDS_S = 5.0  # after the first failed collective, for the other ranks to say that theirs failed too
_SEEN_WITHIN_S = 45.0  # network file systems show what another node has written after seconds
_STOPS = (None, signal.SIGINT, *JOB_SIGNALS)  # each outweighs those before it: a warning asks for another start
_meetings = itertools.count()  # each meeting of this process has keys of its own


@contextmanager
def ranks(config: Config, timeout_s: float = PATIENCE_S) -> Iterator[None]:
    """While entered, this process is one of the ranks that torchrun, srun or submitit started, or the only one.

    Ranks meet within `parallel.join_s`, by a file in the run folder (torchrun: by its own store), and each has a GPU of
    its own where there are GPUs. A collective that lasts longer than `timeout_s` fails.

    Where ranks fail, one of them raises: the one that failed first or, where one died or hangs, one that names it. The
    others raise `SystemExit`. Where one is interrupted, the others are too, by `Stopped`. Raises `RunError` where the
    ranks cannot meet, or are not as many as `parallel.ranks`.
    """
    place = rank_env(os.environ)
    _require_asked_for(place, config.parallel.ranks, os.environ)
    gpu = _own_gpu(place, config)
    if dist.is_initialized() or place.world == 1:
        yield
        return
    store = _store(place, config)
    try:
        store = _meet(store, place, gpu, config.parallel.join_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu is not None else "gloo",  # host tensors by gloo, those of a GPU by NCCL
            store=dist.PrefixStore("collectives", store),
            rank=place.rank,
            world_size=place.world,
            timeout=timedelta(seconds=timeout_s),
        )
        yield
    except KeyboardInterrupt as stopped:
        with suppress(RuntimeError):  # the store may have gone with its host
            store.set("stopped", stopped.signal.name if isinstance(stopped, Stopped) else "SIGINT")
        raise
    except Exception as error:
        verdict = _verdict(store, place, error)
        if verdict is error:
            raise
        raise verdict from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _require_asked_for(place: RankEnv, expected: int | None, environment: Mapping[str, str]) -> None:
    job = slurm_job(environment)
    if place.launcher == "none" and job is not None and job.tasks > 1:
        raise RunError(
            f"job {job.id} has {job.tasks} tasks, but this process was not started by srun: it would work alone while "
            "the others idle. Put srun before the command"
        )
    if expected is not None and expected != place.world:
        started = "no launcher started it" if place.launcher == "none" else f"{place.launcher} started it"
        raise RunError(
            f"parallel.ranks: {expected} ranks were asked for, this process is one of {place.world} ({started}); start "
            f"it by srun --ntasks={expected} or torchrun --nproc-per-node"
        )


def _own_gpu(place: RankEnv, config: Config) -> str | None:
    """Makes one GPU this rank's own; returns what tells it from all others. None without GPUs."""
    if config.run.device == "cpu":
        return None
    if not torch.cuda.is_available():
        promised = os.environ.get("CUDA_VISIBLE_DEVICES", "") if slurm_job(os.environ) else ""
        if promised:
            raise RunError(
                f"{socket.gethostname()}: SLURM gave GPU {promised} to this task, but torch sees none; look at "
                "nvidia-smi there, or set run.device=cpu"
            )
        return None
    count = torch.cuda.device_count()
    index = gpu_index(place.local_rank, count)
    if index is None:
        raise RunError(
            f"{socket.gethostname()}: local rank {place.local_rank} finds {count} GPUs; start one rank for each GPU"
        )
    torch.cuda.set_device(index)
    return str(torch.cuda.get_device_properties(index).uuid)


def gpu_index(local_rank: int, count: int) -> int | None:
    """Which of the `count` visible GPUs a rank takes: its own, where it sees no other; none if there are too few."""
    if count == 1:
        return 0  # bound by SLURM, or shared: `_meet` finds that out
    return local_rank if local_rank < count else None


def _store(place: RankEnv, config: Config) -> Any:
    number = next(_meetings)
    if place.launcher == "torchrun":
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=config.parallel.join_s)))
        except (RuntimeError, ValueError) as error:  # ValueError: variables of the launcher are missing
            raise RunError(f"the {place.world} ranks (WORLD_SIZE) cannot meet: {error}") from error
        return dist.PrefixStore(str(number), store)
    folder = config.run.dir / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    return dist.FileStore(str(folder / f"{place.meeting}-{number}"), place.world)


def _meet(store: Any, place: RankEnv, gpu: str | None, join_s: float) -> Any:
    """Waits until every rank is here, and rank 0 has found nothing wrong. Raises `RunError` on every rank if not.

    Returns a store for these ranks alone: what ranks of the same name, which were killed, left in the old one counts
    for nothing, since rank 0 calls each rank by a word of its own and waits for its answer.
    """
    mine = uuid.uuid4().hex
    store.set(f"here/{place.rank}", json.dumps({"host": socket.gethostname(), "gpu": gpu, "word": mine}))
    if place.rank == 0:
        meeting = dist.PrefixStore(mine, store)
        told, absent = _answers(store, mine, place.world, join_s)
        fault = _not_all_here(absent, place.world, join_s) if absent else shared_gpu(told)
        meeting.set("fault", fault)
    else:
        try:
            store.wait([f"called/{mine}"], timedelta(seconds=join_s))
            meeting = dist.PrefixStore(store.get(f"called/{mine}").decode(), store)
            meeting.set(f"came/{place.rank}", "")
            meeting.wait(["fault"], timedelta(seconds=join_s + _LAST_WORDS_S))
        except RuntimeError:
            raise RunError(_not_all_here([0], place.world, join_s)) from None
        fault = meeting.get("fault").decode()
    if fault:
        raise RunError(fault)
    return meeting


def _answers(store: Any, mine: str, world: int, join_s: float) -> tuple[list[tuple[str, str | None]], list[int]]:
    """Calls all ranks until they have answered or the time is over: their (host, GPU), and who did not answer."""
    deadline = time.monotonic() + join_s
    meeting = dist.PrefixStore(mine, store)
    meeting.set("came/0", "")
    called: set[str] = set()
    while True:
        here = [json.loads(store.get(f"here/{rank}")) for rank in range(world) if store.check([f"here/{rank}"])]
        for one in here:
            if one["word"] not in called:
                store.set(f"called/{one['word']}", mine)
                called.add(one["word"])
        absent = [rank for rank in range(world) if not meeting.check([f"came/{rank}"])]
        if not absent or time.monotonic() > deadline:
            return [(one["host"], one["gpu"]) for one in here], absent
        time.sleep(0.1)


def _not_all_here(absent: Sequence[int], world: int, join_s: float) -> str:
    return (
        f"{world - len(absent)} of {world} ranks met within {join_s:g} s (parallel.join_s); missing: rank "
        f"{', '.join(map(str, absent))}. See what they printed, and whether all nodes see the same run.dir"
    )


def shared_gpu(gpus: Sequence[tuple[str, str | None]]) -> str:
    """What is wrong with the (host, GPU) of ranks 0, 1, ...: some have none, or two have the same. Else empty."""
    without = [rank for rank, (_, gpu) in enumerate(gpus) if gpu is None]
    if 0 < len(without) < len(gpus):
        return f"rank {', '.join(map(str, without))} found no GPU, on {gpus[without[0]][0]}, and others did"
    for rank, (host, gpu) in enumerate(gpus):
        first = gpus.index((host, gpu))
        if gpu is not None and first < rank:
            return f"ranks {first} and {rank} would share one GPU of {host}; start one rank for each GPU"
    return ""


def _absent(store: Any, key: str, expected: Sequence[int], wait_s: float) -> list[int]:
    """The ranks that have not set their key when all have, or the time is over."""
    deadline = time.monotonic() + wait_s
    while True:
        absent = [rank for rank in expected if not store.check([f"{key}/{rank}"])]
        if not absent or time.monotonic() > deadline:
            return absent
        time.sleep(0.1)


def _verdict(store: Any, place: RankEnv, error: Exception) -> BaseException:
    """What this rank raises for an error: the error itself, what it means, or `SystemExit` where another one tells."""
    try:
        if store.check(["stopped"]):
            return Stopped(signal.Signals[store.get("stopped").decode()])
        store.set(f"lost/{place.rank}", "")
        if _is_of_collectives(error):
            _hang_up(os.environ.get("MASTER_PORT", "") if place.launcher == "torchrun" else "")
            absent = _absent(store, "lost", range(place.world), _LAST_WORDS_S)
            if absent:
                error = RunError(
                    f"rank {', '.join(map(str, absent))} of {place.world} died or hangs: the other ranks waited for it "
                    f"in vain ({str(error).splitlines()[0]})"
                )
        first = store.add("failed", 1) == 1
    except RuntimeError:  # the store has gone with its host: nobody else can be asked
        return error
    return error if first else SystemExit(1)


def _hang_up(store_port: str) -> None:
    """Ends this process's connections, save those with the store: ranks that wait for it fail now, not when it ends.

    They could not tell themselves from ranks that died: gloo has nothing to do it (`ProcessGroup.abort` is of NCCL).
    """
    for number in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # closed, or not connected
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                with socket.socket(fileno=os.dup(number)) as connection:
                    ends = (connection.getpeername(), connection.getsockname())
                    if connection.family != socket.AF_UNIX and all(str(end[1]) != store_port for end in ends):
                        connection.shutdown(socket.SHUT_RDWR)


def _is_of_collectives(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or "gloo/" in str(error)


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Returns when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def any_requested(stop: StopRequest) -> bool:
    """Whether any rank was asked to stop; every rank asks, and then all know of it, and by which signal.

    A signal that comes while the ranks tell each other is known the next time.
    """
    if not dist.is_initialized():
        return stop.requested
    number = torch.tensor(_STOPS.index(stop.received))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    told = _STOPS[int(number)]
    if told is not None:
        stop.received = told
    return told is not None


def gather(value: T) -> list[T]:
    """Every rank's value, by rank; it must be picklable."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def rank0_then_all(action: Callable[[], T]) -> T:
    """Rank 0 does it, then the others, which find on the disk what it has made."""
    if rank() == 0:
        result = action()
    wait_for_all()
    return result if rank() == 0 else action()


def wait_for_file(path: Path, seen: Callable[[Path], bool] = Path.exists) -> Path:
    """A file that another rank has written, once this one sees it. Raises `RunError` if it never does."""
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not seen(path):
        if time.monotonic() > deadline:
            raise RunError(
                f"{path}: another rank wrote it, and rank {rank()} on {socket.gethostname()} cannot see it; run.dir "
                "must be a folder that all nodes share"
            )
        time.sleep(0.2)
    return path


def summed(values: Tensor) -> Tensor:
    """The sum of a small host tensor over all ranks, the same to the bit on each."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast_result(action: Callable[[], T]) -> T:
    """Rank 0 does it while the others wait; every rank gets the result, which must be picklable."""
    if not dist.is_initialized():
        return action()
    results = [action() if rank() == 0 else None]
    dist.broadcast_object_list(results)
    return cast(T, results[0])
