"""The ranks of a job: rendezvous, process group, errors of other ranks, and small collectives.

A single process is rank 0 of 1, so that its callers need no second code path.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import re
import signal
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.errors import RunError, few, plural
from videoadapt.runtime.signals import JOB_SIGNALS, Stopped, StopRequest
from videoadapt.runtime.slurm import RankEnv, rank_env, slurm_job

T = TypeVar("T")

PATIENCE_S = 12 * 3600.0  # indexing and scoring have no collective until their slowest rank has finished
_POLL_S = 0.1  # time between two reads of the store
_FAILURE_REPORT_S = 5.0  # after a rank's first failed collective, until the other ranks' collectives fail too
_FILE_VISIBLE_S = 45.0  # NFS shows a file of another node only after its attribute cache has expired
# In ascending priority, because the ranks exchange the index and take the maximum: SIGUSR1 and SIGUSR2 request a
# requeue, so they override Ctrl-C and SIGTERM.
_STOP_SIGNALS = (None, signal.SIGINT, *JOB_SIGNALS)
# Messages of a collective or of the store that failed because of another rank. Only some of gloo's name its file: after
# a timeout it closes the connection, and other operations on it fail with "Application timeout caused pair closure".
_COLLECTIVE_ERROR = re.compile(
    "gloo|pair closure|closed by peer|socket closed|broken pipe|connection reset|timed out waiting|wait timeout",
    re.IGNORECASE,
)
_rendezvous_numbers = itertools.count()  # a process that runs several stages needs new keys for each rendezvous

# The gloo backend of every process group of this process. The last reference to a backend must be one of Python: it
# releases the GIL before the backend waits for its threads. DistributedDataParallel outlives its group and does not,
# and a thread that needs the GIL to free a tensor would never end: the rank would hang after its last step. The threads
# end before Python does, since at exit such a thread would abort the process (seen with torch 2.12 and 2.15).
_backends: list[object] = []
atexit.register(_backends.clear)


class Collectives:
    """The default process group of torch.distributed, for the ranks of one rendezvous.

    Without a store (a single process, or a process group that already exists), nothing is created or changed.
    """

    def __init__(self, env: RankEnv, store: dist.Store | None = None, backend: str = "gloo") -> None:
        self._env, self._store, self._backend = env, store, backend
        self._groups = 0  # process groups created so far; each needs a different key prefix in the store

    def set_timeout(self, timeout_s: float) -> None:
        """Changes how long a collective may last before it fails. All ranks must call it together.

        torch has no public function for it, so the process group is destroyed and created again from the same store,
        without another rendezvous. Groups of `dist.new_group` and DistributedDataParallel do not survive this: create
        them afterwards.

        Args:
            timeout_s: The new limit, in seconds.
        """
        if self._store is None:
            return
        wait_for_all()  # with the old timeout: ranks may arrive here at very different times
        dist.destroy_process_group()
        self._init_process_group(timeout_s)

    def _init_process_group(self, timeout_s: float) -> None:
        assert self._store is not None
        prefix = f"collectives-{self._groups}"
        self._groups += 1
        dist.init_process_group(
            self._backend,
            store=dist.PrefixStore(prefix, self._store),
            rank=self._env.rank,
            world_size=self._env.world,
            timeout=timedelta(seconds=timeout_s),
        )
        _keep_backend(dist.group.WORLD)


def new_group(timeout_s: float, members: Sequence[int] | None = None, backend: str | None = None) -> dist.ProcessGroup:
    """Creates a further process group. All ranks must call it together.

    Args:
        timeout_s: Seconds after which a collective of the group fails; the groups of torch do not inherit the limit.
        members: The ranks of the group; all by default. On any other rank, the group cannot be used.
        backend: As for `dist.new_group`.
    """
    group = dist.new_group(members, timeout=timedelta(seconds=timeout_s), backend=backend)
    _keep_backend(group)
    return group


def _keep_backend(group: object) -> None:
    if isinstance(group, dist.ProcessGroup):  # not on a rank outside of the group
        _backends.append(group._get_backend(torch.device("cpu")))


@contextmanager
def ranks(config: Config, timeout_s: float = PATIENCE_S) -> Iterator[Collectives]:
    """Joins the ranks that torchrun, srun or submitit started; leaves them at the end.

    The ranks find each other within `parallel.join_s` seconds, through a file in the run folder (torchrun: through
    torchrun's store). Each rank uses one GPU if there are GPUs. Does nothing for a single process, or inside another
    `ranks`.

    One failing rank raises the cause. If a rank died or hangs, that error names it. All other ranks raise `SystemExit`.
    If one rank is interrupted by a signal, all others raise `Stopped`.

    Args:
        config: The fields `run.dir`, `run.device`, `parallel.ranks` and `parallel.join_s` are used.
        timeout_s: Seconds after which a collective fails because a rank does not take part.

    Yields:
        The process group, to change its timeout later.

    Raises:
        RunError: A rank is missing, the number of ranks is not `parallel.ranks`, two ranks would share a
            GPU, or a rank died or hangs.
    """
    env = rank_env(os.environ)
    _require_world_size(env, config.parallel.ranks, os.environ)
    gpu = _select_gpu(env, config)
    if dist.is_initialized() or env.world == 1:
        yield Collectives(env)
        return
    store = _open_store(env, config)
    try:
        store = _rendezvous(store, env, gpu, config.parallel.join_s)
        # CPU tensors use gloo and GPU tensors NCCL.
        collectives = Collectives(env, store, "gloo" if gpu is None else "cpu:gloo,cuda:nccl")
        collectives._init_process_group(timeout_s)
        yield collectives
    except KeyboardInterrupt as stopped:
        with suppress(RuntimeError):  # the store of torchrun ends with the process that serves it
            store.set("stopped", stopped.signal.name if isinstance(stopped, Stopped) else "SIGINT")
        raise
    except Exception as error:
        exception = _exception_to_raise(store, env, error)
        if exception is error:
            raise
        raise exception from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _require_world_size(env: RankEnv, expected: int | None, environment: Mapping[str, str]) -> None:
    job = slurm_job(environment)
    if env.launcher == "none" and job is not None and job.tasks > 1:
        raise RunError(
            f"job {job.id} has {job.tasks} tasks, but this process was not started by srun: it would work alone while "
            "the other tasks are idle. Put srun before the command"
        )
    if expected is not None and expected != env.world:
        launcher = "no launcher started it" if env.launcher == "none" else f"{env.launcher} started it"
        raise RunError(
            f"parallel.ranks: expected {plural(expected, 'rank')}, but this process is one of {env.world} "
            f"({launcher}); start it "
            f"with srun --ntasks={expected} or torchrun --nproc-per-node"
        )


def _select_gpu(env: RankEnv, config: Config) -> str | None:
    """Makes one GPU the current device of this process. Returns the GPU's UUID, or None without GPUs."""
    if config.run.device == "cpu":
        return None
    if not torch.cuda.is_available():
        # Outside SLURM the variable may be a leftover of the user's shell, so only a job's value is an error.
        assigned = os.environ.get("CUDA_VISIBLE_DEVICES", "") if slurm_job(os.environ) else ""
        if assigned:
            raise RunError(
                f"{socket.gethostname()}: SLURM gave GPU {assigned} to this task, but torch finds no GPU; check "
                "nvidia-smi on that node, or set run.device=cpu"
            )
        return None
    count = torch.cuda.device_count()
    index = gpu_index(env.local_rank, count)
    if index is None:
        raise RunError(
            f"{socket.gethostname()}: local rank {env.local_rank} finds {plural(count, 'GPU')}; start one rank for "
            "each GPU. If the node has more, SLURM hides them from this rank: set slurm.gpu_bind to none or single:1"
        )
    torch.cuda.set_device(index)
    return str(torch.cuda.get_device_properties(index).uuid)


def gpu_index(local_rank: int, count: int) -> int | None:
    """Returns the index of the GPU that a rank uses among the `count` visible ones, or None if there are too few."""
    if count == 1:
        return 0  # SLURM shows each task one GPU only; if ranks share it by mistake, `gpu_conflict` finds that
    return local_rank if local_rank < count else None


def _open_store(env: RankEnv, config: Config) -> dist.Store:
    """Opens the key-value store that all processes of the job can reach. It may hold keys of an earlier job."""
    number = next(_rendezvous_numbers)
    if env.launcher == "torchrun":
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=config.parallel.join_s)))
        except (RuntimeError, ValueError) as error:  # ValueError: a variable such as RANK is not set
            raise RunError(f"the {env.world} ranks (WORLD_SIZE) cannot find each other: {error}") from error
        return dist.PrefixStore(str(number), store)
    folder = config.run.dir / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    return dist.FileStore(str(folder / f"{env.rendezvous}-{number}"), env.world)


@dataclass(frozen=True)
class _Registration:
    """The registration of a rank, which is stored as JSON."""

    id: str  # random, new for each process
    host: str
    gpu: str | None  # UUID; None without GPUs


def _rendezvous(store: dist.Store, env: RankEnv, gpu: str | None, join_s: float) -> dist.Store:
    """Waits until every rank has joined. Returns a store whose keys no other start of the job can have written.

    The given store may hold keys of a killed job with the same name. Random ids keep its processes and this job apart:

    1. Each rank writes its random id, its host and its GPU to `register/RANK`. An old value is overwritten.
    2. Rank 0 uses its own id as `rendezvous_id`. It reads all registrations until step 5, and for each new id writes
       `rendezvous_id` to `answer/ID`. Answers to old ids are never read.
    3. Each other rank waits for the answer to its id. All further keys have the key prefix `rendezvous_id`.
    4. Each rank writes `ack/RANK`.
    5. When all ranks have acknowledged, or after `join_s` seconds, rank 0 writes `error`: the missing ranks, or two
       ranks with one GPU; empty without an error.
    6. Each rank reads `error`.

    Returns:
        The store with the key prefix `rendezvous_id`.

    Raises:
        RunError: On all ranks, if `error` is not empty or rank 0 is missing.
    """
    own = _Registration(uuid.uuid4().hex, socket.gethostname(), gpu)
    store.set(f"register/{env.rank}", json.dumps(vars(own)))
    if env.rank == 0:
        joined: dist.Store = dist.PrefixStore(own.id, store)
        error = _collect_acks(store, joined, own.id, env.world, join_s)
        joined.set("error", error)
    else:
        try:
            store.wait([f"answer/{own.id}"], timedelta(seconds=join_s))
            joined = dist.PrefixStore(store.get(f"answer/{own.id}").decode(), store)
            joined.set(f"ack/{env.rank}", "")
            # Rank 0 may have started to wait up to `join_s` after this rank.
            joined.wait(["error"], timedelta(seconds=join_s + _FAILURE_REPORT_S))
        except RuntimeError:
            raise RunError(_missing_message([0], env.world, join_s)) from None
        error = joined.get("error").decode()
    if error:
        raise RunError(error)
    return joined


def _collect_acks(store: dist.Store, joined: dist.Store, rendezvous_id: str, world: int, join_s: float) -> str:
    """Runs steps 2 to 5 on rank 0. Returns the error, or an empty string."""
    deadline = time.monotonic() + join_s
    joined.set("ack/0", "")
    answered: set[str] = set()
    while True:
        keys = [f"register/{rank}" for rank in range(world)]
        registered = [_Registration(**json.loads(store.get(key))) for key in keys if store.check([key])]
        for registration in registered:
            if registration.id not in answered:
                store.set(f"answer/{registration.id}", rendezvous_id)
                answered.add(registration.id)
        missing = _ranks_without(joined, "ack", world)
        if not missing:
            return gpu_conflict([(registration.host, registration.gpu) for registration in registered])
        if time.monotonic() > deadline:
            return _missing_message(missing, world, join_s)
        time.sleep(_POLL_S)


def _ranks_without(store: dist.Store, key: str, world: int) -> list[int]:
    return [rank for rank in range(world) if not store.check([f"{key}/{rank}"])]


def _missing_message(missing: Sequence[int], world: int, join_s: float) -> str:
    return (
        f"{world - len(missing)} of {world} ranks joined within {join_s:g} s (parallel.join_s); missing: rank "
        f"{_comma_list(missing)}. Check the output of the missing ranks, and that all nodes see the same run.dir"
    )


def _comma_list(numbers: Sequence[int]) -> str:
    return few(numbers)


def gpu_conflict(gpus: Sequence[tuple[str, str | None]]) -> str:
    """Checks that either every rank or no rank has a GPU, and that no two ranks use the same one.

    Args:
        gpus: Host and GPU UUID (None: no GPU) of ranks 0, 1, ...

    Returns:
        The error message, or an empty string.
    """
    without = [rank for rank, (_, gpu) in enumerate(gpus) if gpu is None]
    if 0 < len(without) < len(gpus):
        return f"rank {_comma_list(without)} found no GPU on {gpus[without[0]][0]}, but other ranks found one"
    for rank, (host, gpu) in enumerate(gpus):
        first = gpus.index((host, gpu))
        if gpu is not None and first < rank:
            return f"ranks {first} and {rank} would share one GPU of {host}; start one rank for each GPU"
    return ""


def _exception_to_raise(store: dist.Store, env: RankEnv, error: Exception) -> BaseException:
    """Decides which of the failing ranks reports the cause.

    1. If a rank was interrupted by a signal (`stopped`), the exception is `Stopped`.
    2. This rank writes `failed/RANK`: it failed, but it is alive.
    3. If a collective failed, this rank closes its connections, so that collectives of the other ranks fail too and
       they also write their key. The ranks without a key after `_FAILURE_REPORT_S` died or hang.
    4. The rank that first increments `reports` raises the error. The others raise `SystemExit`.
    """
    try:
        if store.check(["stopped"]):
            return Stopped(signal.Signals[store.get("stopped").decode()])
        store.set(f"failed/{env.rank}", "")
        if is_collective_error(error):
            _close_connections(os.environ.get("MASTER_PORT", "") if env.launcher == "torchrun" else "")
            dead = _wait_for_failures(store, env.world)
            if dead:
                first_line = str(error).splitlines()[0]
                error = RunError(
                    f"rank {_comma_list(dead)} of {env.world} died or hangs; a collective operation of the other ranks "
                    f"failed: {first_line}"
                )
        is_first = store.add("reports", 1) == 1
    except RuntimeError:  # the host of the store has ended, so the ranks can no longer agree
        return error
    return error if is_first else SystemExit(1)


def _wait_for_failures(store: dist.Store, world: int) -> list[int]:
    """Waits for all ranks to report a failure. Returns the ranks that have not reported one in time."""
    deadline = time.monotonic() + _FAILURE_REPORT_S
    while (silent := _ranks_without(store, "failed", world)) and time.monotonic() <= deadline:
        time.sleep(_POLL_S)
    return silent


def _close_connections(store_port: str) -> None:
    """Closes all network connections of this process except its connections to torchrun's store.

    gloo cannot abort a collective (`ProcessGroup.abort` exists for NCCL only). A rank that waits for this one would
    wait until this process ends, and could not be told apart from a rank that died.
    """
    for number in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # the descriptor is closed by now, or the socket is not connected
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                # A duplicate: closing it leaves gloo's own descriptor valid, while shutdown acts on the connection.
                with socket.socket(fileno=os.dup(number)) as connection:
                    ends = (connection.getpeername(), connection.getsockname())
                    if connection.family != socket.AF_UNIX and all(str(end[1]) != store_port for end in ends):
                        connection.shutdown(socket.SHUT_RDWR)


def is_collective_error(error: Exception) -> bool:
    """Returns whether torch raised an error because another rank did not take part in a collective."""
    # gloo and torch's stores raise `RuntimeError` itself; `RunError` and others derive from it.
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and _COLLECTIVE_ERROR.search(str(error)) is not None
    )


def rank() -> int:
    """Returns the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Waits until every rank has called it (a barrier)."""
    if dist.is_initialized():
        dist.barrier()


def any_requested(stop: StopRequest) -> bool:
    """Returns whether any rank has received a stop signal. All ranks must call it.

    On return `stop.received` is the same signal on every rank, the one of highest priority. A signal that arrives
    during the call is reported by the next call.
    """
    if not dist.is_initialized():
        return stop.requested
    priority = torch.tensor(_STOP_SIGNALS.index(stop.received))
    dist.all_reduce(priority, dist.ReduceOp.MAX)
    agreed = _STOP_SIGNALS[int(priority)]
    if agreed is not None:  # if not, a signal that arrived during the all-reduce would be overwritten
        stop.received = agreed
    return agreed is not None


def stop_flags(stop: StopRequest) -> list[float]:
    """Returns a 1 at the signal that this rank has received, and zeros. The sums over ranks go to `agree_on_stop`."""
    return [float(signal is stop.received) for signal in _STOP_SIGNALS[1:]]


def agree_on_stop(stop: StopRequest, flags: Sequence[float]) -> bool:
    """Sets `stop.received` to the signal of highest priority that any rank had received; returns if there is one.

    A signal that arrived meanwhile is kept: it is in the flags of the next step.

    Args:
        stop: The request of this rank.
        flags: The sums over ranks of `stop_flags`.
    """
    for number, count in zip(_STOP_SIGNALS[1:], flags, strict=True):  # in ascending priority
        if count:
            stop.received = number
    return any(flags)


def all_gather(value: T) -> list[T]:
    """Returns the values of all ranks, in rank order, on every rank.

    Args:
        value: Any object that can be pickled.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sums a tensor over all ranks, in place, and returns it.

    Args:
        values: A CPU tensor of the same shape and dtype on every rank.

    Returns:
        `values`, with the same bits on every rank.
    """
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def rank0_then_all(action: Callable[[], T]) -> T:
    """Calls `action` on rank 0, and then on the other ranks, which can read the files that rank 0 has written.

    Returns:
        The result of the call on this rank.
    """
    if rank() == 0:
        result = action()
    wait_for_all()
    return result if rank() == 0 else action()


def broadcast_result(action: Callable[[], T]) -> T:
    """Calls `action` on rank 0 only, and returns its result on every rank. The result is pickled."""
    if not dist.is_initialized():
        return action()
    results = [action() if rank() == 0 else None]
    dist.broadcast_object_list(results)
    return cast(T, results[0])


def wait_for_file(path: Path, is_visible: Callable[[Path], bool] = Path.exists) -> Path:
    """Waits until this rank sees a file that another rank has already written.

    Args:
        path: The file.
        is_visible: Returns whether the file exists with the expected content.

    Returns:
        `path`.

    Raises:
        RunError: The file is not visible after 45 s.
    """
    deadline = time.monotonic() + _FILE_VISIBLE_S
    while not is_visible(path):
        if time.monotonic() > deadline:
            raise RunError(
                f"{path}: another rank wrote this file, but rank {rank()} on {socket.gethostname()} does not see it; "
                "run.dir must be a folder that all nodes share"
            )
        time.sleep(0.2)
    return path
