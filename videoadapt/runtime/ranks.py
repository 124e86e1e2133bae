"""The ranks of a job: process group, errors of other ranks, and small collectives.

A single process is rank 0 of 1, so that its callers need no second code path.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import re
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.errors import RunError, UserError, plural
from videoadapt.runtime.heartbeats import Heartbeats, cause_of_end, claim_end, describe_dead
from videoadapt.runtime.rendezvous import Rendezvous, interface_to
from videoadapt.runtime.signals import JOB_SIGNALS, Stopped, StopRequest
from videoadapt.runtime.slurm import RankEnv, rank_env, slurm_job

T = TypeVar("T")

PATIENCE_S = 12 * 3600.0  # indexing and scoring have no collective until their slowest rank has finished
_POLL_S = 0.1  # time between two reads of the store
_HOST_STAYS_S = 12.0  # after a failure: a slow rank that finds the store gone takes its host for the lost rank
_FAILURE_REPORT_S = 5.0  # after a rank's first failed collective, until the other ranks' collectives fail too
_FILE_VISIBLE_S = 45.0  # NFS shows a file of another node only after its attribute cache has expired
# In ascending priority: SIGUSR1 and SIGUSR2 request a requeue, so they override Ctrl-C and SIGTERM.
_STOP_SIGNALS = (signal.SIGINT, *JOB_SIGNALS)
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
_connections: set[int] = set()  # inodes of the sockets of these backends
_last_actions: list[Callable[[], None]] = []  # of `before_sudden_end`


class Collectives:
    """The default process group of torch.distributed, for the ranks of one rendezvous.

    Without a rendezvous (a single process, or a process group that already exists), nothing is created or changed.
    """

    def __init__(self, env: RankEnv, rendezvous: Rendezvous | None = None, backend: str = "gloo") -> None:
        self._env, self._rendezvous, self._backend = env, rendezvous, backend
        self._groups = 0  # process groups created so far; each needs a different key prefix in the store

    def set_timeout(self, timeout_s: float) -> None:
        """Changes how long a collective may last before it fails. All ranks must call it together.

        torch has no public function for it, so the process group is destroyed and created again from the same store,
        without another rendezvous. Groups of `dist.new_group` and DistributedDataParallel do not survive this: create
        them afterwards.

        Args:
            timeout_s: The new limit, in seconds.
        """
        if self._rendezvous is None:
            return
        wait_for_all()  # with the old timeout: ranks may arrive here at very different times
        dist.destroy_process_group()
        self._init_process_group(timeout_s)

    def _init_process_group(self, timeout_s: float) -> None:
        assert self._rendezvous is not None
        store = self._rendezvous.store
        store.set_timeout(timedelta(seconds=timeout_s))  # in which ranks may come to the creation of a group
        prefix = f"collectives-{self._groups}"
        self._groups += 1
        before = _sockets()
        dist.init_process_group(
            self._backend,
            store=dist.PrefixStore(prefix, store),
            rank=self._env.rank,
            world_size=self._env.world,
            timeout=timedelta(seconds=timeout_s),
        )
        _keep_backend(dist.group.WORLD, before)


def new_group(timeout_s: float, members: Sequence[int] | None = None, backend: str | None = None) -> dist.ProcessGroup:
    """Creates a further process group. All ranks must call it together.

    Args:
        timeout_s: Seconds after which a collective of the group fails; the groups of torch do not inherit the limit.
        members: The ranks of the group; all by default. On any other rank, the group cannot be used.
        backend: As for `dist.new_group`.
    """
    before = _sockets()
    group = dist.new_group(members, timeout=timedelta(seconds=timeout_s), backend=backend)
    _keep_backend(group, before)
    return group


def _keep_backend(group: object, sockets_before: Mapping[int, int]) -> None:
    if isinstance(group, dist.ProcessGroup):  # not on a rank outside of the group
        _backends.append(group._get_backend(torch.device("cpu")))
        _connections.update(_sockets().keys() - sockets_before.keys())


def _sockets() -> dict[int, int]:
    """Returns the open sockets of this process: file descriptor by inode. Numbers of descriptors are used again."""
    found = {}
    for number in map(int, os.listdir("/dev/fd")):
        with suppress(OSError):  # the descriptor of the list itself is closed by now
            status = os.fstat(number)
            if stat.S_ISSOCK(status.st_mode):
                found[status.st_ino] = number
    return found


@contextmanager
def ranks(config: Config, timeout_s: float = PATIENCE_S) -> Iterator[Collectives]:
    """Joins the ranks that torchrun, srun or submitit started; leaves them at the end.

    The ranks find each other within `parallel.join_s` seconds, through a store that rank 0 hosts (torchrun: through
    torchrun's store). Each rank uses one GPU if there are GPUs. Does nothing for a single process, or inside another
    `ranks`.

    One failing rank raises the cause. If a rank died or hangs, that error names it. All other ranks raise `SystemExit`.
    If one rank is interrupted by a signal, all others raise `Stopped`. A process that waits for such a rank in an
    operation that cannot fail, as those of NCCL, is ended by its `Heartbeats`.

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
    joined = Rendezvous.of(env, config.run.dir / "ranks", next(_rendezvous_numbers), gpu, config.parallel.join_s)
    _choose_interface(joined)
    heartbeats = Heartbeats(joined.control, env.rank, joined.hosts, joined.host_of_store, end_process)
    try:
        # CPU tensors use gloo and GPU tensors NCCL.
        collectives = Collectives(env, joined, "gloo" if gpu is None else "cpu:gloo,cuda:nccl")
        collectives._init_process_group(timeout_s)
        yield collectives
        dist.destroy_process_group()
        if joined.hosted is not None:
            heartbeats.wait_until_others_left(PATIENCE_S)
    except KeyboardInterrupt as stopped:
        with suppress(RuntimeError):  # the host of the store has ended
            claim_end(joined.control, stopped.signal.name if isinstance(stopped, Stopped) else "SIGINT")
        _close_connections()
        if isinstance(stopped, Stopped) and dist.is_initialized():
            dist.destroy_process_group()  # as after success: all ranks stop, so NCCL waits for none that is lost
        raise
    except Exception as error:
        exception = _exception_to_raise(joined, env, error)
        heartbeats.reports_itself = True
        _close_connections()
        if exception is error:
            raise
        raise exception from error
    finally:
        with suppress(RuntimeError):
            heartbeats.leave()
            if joined.hosted is not None:
                heartbeats.wait_until_others_left(_HOST_STAYS_S)
        if dist.is_initialized():
            _leave_failed_group(sys.exc_info()[1])


def _choose_interface(joined: Rendezvous) -> None:
    """Makes gloo use the network by which this machine reaches rank 0, unless the user has named one.

    By itself, gloo uses the address of the host name, which on many machines is 127.0.1.1. NCCL looks for the fastest
    interfaces by itself.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_to(joined.rank0, several_hosts=len(set(joined.hosts)) > 1)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface


@contextmanager
def stopping_together() -> Iterator[None]:
    """Lets no rank raise `Stopped` before all ranks do, which have agreed on it: the first one ends the others.

    Rank 0 may still save, or send its metrics. If that fails, its error is raised, and not `Stopped`.
    """
    try:
        yield
    except Stopped:
        wait_for_all()
        raise


def _leave_failed_group(error: BaseException | None) -> None:
    """Leaves the process group after an error. A group of NCCL waits for the other ranks, for ever if one is lost."""
    if "nccl" not in dist.get_backend_config():
        dist.destroy_process_group()
        return
    # Registered last, so it runs first: what follows at exit would end NCCL's operations, which wait, too.
    atexit.register(end_process, _exit_code(error))


def _exit_code(error: BaseException | None) -> int:
    """Returns the exit code of a command that ends by an error."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1


def end_process(code: int = 1) -> NoReturn:
    """Ends this process at once: it may wait in an operation of NCCL, which cannot be interrupted."""
    for worker in multiprocessing.active_children():
        worker.kill()
    for action in _last_actions:
        with suppress(Exception):
            action()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextmanager
def before_sudden_end(action: Callable[[], None]) -> Iterator[None]:
    """Has an action done if this process is ended by `end_process` inside the `with` block."""
    _last_actions.append(action)
    try:
        yield
    finally:
        _last_actions.remove(action)


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


def _exception_to_raise(joined: Rendezvous, env: RankEnv, error: Exception) -> BaseException:
    """Decides which of the failing ranks reports the cause.

    1. If a rank was interrupted by a signal (`end`), the exception is `Stopped`, unless this rank has an error of its
       own, such as a full disk: what it was saving is lost.
    2. This rank writes `failed/RANK`: it failed, but it is alive.
    3. If a collective failed, this rank closes its connections, so that collectives of the other ranks fail too and
       they also write their key. The ranks without a key after `_FAILURE_REPORT_S` died or hang.
    4. The rank that first writes `end` raises the error. The others raise `SystemExit`.
    """
    store, is_collective = joined.control, is_collective_error(error)
    try:
        cause = cause_of_end(store)
        if cause is None:
            store.set(f"failed/{env.rank}", "")
            if is_collective:
                _close_connections()
                dead = _wait_for_failures(store, env.world)
                if dead:
                    error = _failed_collective(describe_dead(dead, joined.hosts), error)
            cause = None if claim_end(store, "failed") else cause_of_end(store)
    except RuntimeError:  # the host of the store has ended, so the ranks can no longer agree
        return _failed_collective(f"{joined.host_of_store} died", error) if is_collective else error
    if cause == "failed":
        return SystemExit(1)
    return error if cause is None or not is_collective else Stopped(signal.Signals[cause])


def _failed_collective(cause: str, error: Exception) -> RunError:
    first_line = str(error).splitlines()[0]
    return RunError(f"{cause}; a collective operation of the other ranks failed: {first_line}")


def _wait_for_failures(store: dist.Store, world: int) -> list[int]:
    """Waits for all ranks to report a failure. Returns the ranks that have not reported one in time."""
    deadline = time.monotonic() + _FAILURE_REPORT_S
    while True:
        silent = [rank for rank in range(world) if not store.check([f"failed/{rank}"])]
        if not silent or time.monotonic() > deadline or cause_of_end(store):
            return silent
        time.sleep(_POLL_S)


def _close_connections() -> None:
    """Closes the connections of gloo's process groups, and no others of this process, so that other ranks fail too.

    gloo cannot abort a collective (`ProcessGroup.abort` exists for NCCL only). A rank that waits for this one would
    wait until this process ends, and could not be told apart from a rank that died.
    """
    for inode, number in _sockets().items():
        if inode in _connections:
            # A duplicate: closing it leaves gloo's own descriptor valid, while shutdown acts on the connection.
            with suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
                connection.getpeername()  # raises for a socket that listens, whose thread gloo would abort
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
    return agree_on_stop(stop, all_reduce_sum(torch.tensor(stop_flags(stop))).tolist())


def stop_flags(stop: StopRequest) -> list[float]:
    """Returns a 1 at the signal that this rank has received, and zeros. The sums over ranks go to `agree_on_stop`."""
    return [float(signal is stop.received) for signal in _STOP_SIGNALS]


def agree_on_stop(stop: StopRequest, flags: Sequence[float]) -> bool:
    """Sets `stop.received` to the signal of highest priority that any rank had received; returns if there is one.

    A signal that arrived meanwhile is kept: it is in the flags of the next step.

    Args:
        stop: The request of this rank.
        flags: The sums over ranks of `stop_flags`.
    """
    for number, count in zip(_STOP_SIGNALS, flags, strict=True):  # in ascending priority
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


def broadcast_result(action: Callable[[], T]) -> T:
    """Calls `action` on rank 0 only, and returns its result on every rank. The result is pickled."""
    if not dist.is_initialized():
        return action()
    results = [action() if rank() == 0 else None]
    dist.broadcast_object_list(results)
    return cast(T, results[0])


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Copies tensors of rank 0 into those of the other ranks, in place.

    Args:
        tensors: Contiguous tensors, of the same shapes and dtypes in the same order on every rank.
    """
    if not dist.is_initialized():
        return
    for tensor in tensors:
        if tensor.numel():
            dist.broadcast(tensor.detach().view(-1).view(torch.uint8), 0)  # as bytes: gloo does not know every dtype


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
