"""Runs benchmark code on several ranks, each in its own process on its own core or GPU.

The processes stay alive between measurements, so that the cases of a benchmark can take turns.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from videoadapt.config.load import Config
from videoadapt.data.video.files import reason
from videoadapt.errors import RunError
from videoadapt.runtime.machine import pick_device
from videoadapt.runtime.ranks import ranks

Turn = Callable[[], Any]  # measures once and returns the result of this rank
Prepare = Callable[..., Turn]  # pickled by name, so it must be a function of an importable module

_DIED = "its process has died; if memory has run out, take a smaller batch or fewer lengths"
_TIMEOUT_S = 1800.0  # limit of a turn; compiling a model for the first turn takes minutes


def slots(device: str) -> int:
    """Returns how many ranks fit on this machine with one GPU each or, for a CPU `device`, one core each."""
    return torch.cuda.device_count() if pick_device(device).type == "cuda" else len(os.sched_getaffinity(0))


class RankProcesses:
    """The processes of one benchmark case, as `started` makes them."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections  # by rank

    def ready(self) -> None:
        """Waits until all ranks have prepared.

        Raises:
            RunError: A rank failed; the message has the cause.
        """
        self._results()

    def turn(self) -> list[Any]:
        """Runs one turn on all ranks at once and returns their results by rank.

        Raises:
            RunError: A rank failed, died, or took longer than 30 minutes.
        """
        try:
            for connection in self._connections:
                connection.send(None)
        except OSError:  # a broken pipe: the process was killed while it waited, often for lack of memory
            raise RunError(_DIED) from None
        return self._results()

    def _results(self) -> list[Any]:
        # All answers are read before an error is raised: an unread answer would count for the next turn.
        answers = [self._answer(connection) for connection in self._connections]
        for failed, result in answers:
            if failed:
                raise RunError(result)
        return [result for _, result in answers]

    def _answer(self, connection: Connection) -> tuple[bool, Any]:
        """Receives whether the rank failed, and its result or the cause."""
        try:
            if not connection.poll(_TIMEOUT_S):
                return True, f"no answer after {_TIMEOUT_S:.0f} s"
            return connection.recv()
        except (EOFError, OSError):
            return True, _DIED


@contextmanager
def started(count: int, prepare: Prepare, config: Config, *args: Any) -> Iterator[RankProcesses]:
    """Starts ranks that call `prepare(config, *args)` and then run the returned turn on request.

    Args:
        count: Number of ranks. On a CPU each is pinned to a core; ranks share cores if there are too few.
        prepare: A function at the top level of an importable module.
        config: The config; `run.device` decides where the ranks compute.
        *args: Further arguments of `prepare`; they must be picklable.

    Yields:
        The running processes. They are killed at the end, also in the middle of a turn.
    """
    # Forked from a server without threads or CUDA, and so as safe as spawn. A caller that sets the server's preload
    # before the first process starts saves the imports of every rank.
    context = multiprocessing.get_context("forkserver")
    cores, port = sorted(os.sched_getaffinity(0)), _free_port()
    on_cpu = pick_device(config.run.device).type == "cpu"
    connections, processes = [], []
    try:
        for rank in range(count):
            ours, theirs = context.Pipe()
            env = {
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
            }
            core = cores[rank % len(cores)] if on_cpu else None
            process = context.Process(target=_serve, args=(theirs, env, core, prepare, config, *args), daemon=True)
            process.start()
            theirs.close()  # otherwise a dead rank would not end the connection
            processes.append(process)
            connections.append(ours)
        yield RankProcesses(connections)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(
    connection: Connection, env: dict[str, str], core: int | None, prepare: Prepare, config: Config, *args: Any
) -> None:
    os.environ.update(env)
    if core is not None:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
    try:
        with ranks(config):
            turn = prepare(config, *args)
            _release_memory()
            connection.send((False, None))
            while True:
                connection.recv()
                connection.send((False, turn()))
                _release_memory()
    except EOFError:  # the main process has closed the connection: the benchmark is over
        return
    except Exception as error:  # any library may raise anything; the main process reports it
        connection.send((True, reason(error)))


def _release_memory() -> None:
    """Returns cached memory to the system: many cases wait at once, and each would keep the memory of a step."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
