"""Processes that wait for their turns: the ranks of one contestant, each on a core or GPU of its own."""

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

Turn = Callable[[], Any]
Prepare = Callable[..., Turn]  # a function of a module: it travels to the processes

_DIED = "its process has died; if memory has ended, take a smaller batch or fewer lengths"
_TIMEOUT_S = 1800.0  # of a turn


def slots(device: str) -> int:
    """How many ranks can run here without sharing a GPU, or a core where there is none."""
    return torch.cuda.device_count() if pick_device(device).type == "cuda" else len(os.sched_getaffinity(0))


class Ranks:
    """So many processes; `turn` runs on all of them at once what `prepare` has returned, and gives their results."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def ready(self) -> None:
        """Waits until all have prepared. Raises `RunError` with the cause where one cannot."""
        self._answers()

    def turn(self) -> list[Any]:
        """The results, by rank. Raises `RunError` where a rank fails or takes too long."""
        try:
            for connection in self._connections:
                connection.send(None)
        except OSError:  # as from the system's killer of processes when memory ends
            raise RunError(_DIED) from None
        return self._answers()

    def _answers(self) -> list[Any]:
        answers = [self._answer(connection) for connection in self._connections]
        for failed, answer in answers:
            if failed:
                raise RunError(answer)
        return [answer for _, answer in answers]

    def _answer(self, connection: Connection) -> tuple[bool, Any]:
        try:
            if not connection.poll(_TIMEOUT_S):
                return True, f"no answer after {_TIMEOUT_S:.0f} s"
            return connection.recv()
        except (EOFError, OSError):
            return True, _DIED


@contextmanager
def started(count: int, prepare: Prepare, config: Config, *args: Any) -> Iterator[Ranks]:
    """Ranks that prepare for a config; they are stopped on the way out, whatever they are at."""
    context = multiprocessing.get_context("spawn")
    cores, port, pairs, processes = sorted(os.sched_getaffinity(0)), _free_port(), [], []
    on_cpu = pick_device(config.run.device).type == "cpu"
    try:
        for number in range(count):
            here, there = context.Pipe()
            rank = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count}
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **rank}
            work = (cores[number % len(cores)] if on_cpu else None, prepare, config, *args)
            process = context.Process(target=_serve, args=(there, environment, *work), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            pairs.append(here)
        yield Ranks(pairs)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(
    connection: Connection, environment: dict[str, Any], core: int | None, prepare: Prepare, config: Config, *args: Any
) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    if core is not None:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
    try:
        with ranks(config):
            turn = prepare(config, *args)
            _return_memory()
            connection.send((False, None))
            while True:
                connection.recv()
                connection.send((False, turn()))
                _return_memory()
    except EOFError:  # the benchmark has ended
        return
    except Exception as error:  # whatever a library throws: the table says so
        connection.send((True, reason(error)))


def _return_memory() -> None:
    """What torch and the C library keep for later: many contestants wait at once, each with what a step needed."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
