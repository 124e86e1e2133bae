"""One writer in a run folder: who writes says so in a file, and who was superseded can write no more."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from videoadapt.config.load import Config
from videoadapt.errors import RunError
from videoadapt.runtime.console import say
from videoadapt.runtime.ranks import broadcast_result, rank, wait_for_file
from videoadapt.runtime.slurm import job_states, slurm_job

_WAIT_S = 45.0  # for another process to finish the file that it is writing


@dataclass(frozen=True)
class Owner:
    """A process that writes."""

    host: str
    machine: str
    pid: int
    born: str
    job: str | None  # of SLURM
    restarts: int

    @classmethod
    def this_process(cls) -> Owner:
        """Who calls."""
        job = slurm_job(os.environ)
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=pid,
            born=_born(pid),
            job=job.id if job else None,
            restarts=job.restarts if job else 0,
        )

    def __str__(self) -> str:
        job = f"job {self.job}, restart {self.restarts}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"

    def superseded_by(self, other: Owner) -> bool:
        """Whether the other is a later start of the same job; what is left of the earlier one may still run."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts

    def has_ended(self) -> bool | None:
        """Whether the process is gone; none where that cannot be found out from here."""
        if self.machine and self.machine == _machine():
            return _born(self.pid) != self.born
        states = job_states([self.job]) if self.job else None
        if states is None:
            return None
        return not any(state.split("|")[0] in {"RUNNING", "COMPLETING", "SUSPENDED"} for state in states.values())


class Lease:
    """The right of this process to write what a stage writes into a run folder, until it gives it back.

    The file `STAGE.owner` in the folder names the owner. It is read and changed under a lock of the file system, which
    a process loses when it ends; what is written under `held` is thus written by the owner, or not at all.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self.path = folder / f"{stage}.owner"
        self.owner = Owner.this_process()

    @classmethod
    @contextmanager
    def taken(cls, folder: Path, stage: str) -> Iterator[Lease]:
        """The lease of a stage, given back at the end. Raises `RunError` where another run has it.

        It is taken over from a process that has ended, and from an earlier start of this very job.
        """
        lease = cls(folder, stage)
        with lease._locked() as file:
            before = _read(file)
            if before is not None and before != lease.owner:
                lease._take_over(before)
            _write(file, lease.owner)
        try:
            yield lease
        finally:
            with lease._locked() as file:
                if _read(file) == lease.owner:
                    _write(file, None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While entered, nobody can take the lease over. Raises `RunError` if somebody has."""
        with self._locked() as file:
            owner = _read(file)
            if owner != self.owner:
                raise RunError(
                    f"{self.path}: now names {owner or 'nobody'} as the one who writes here; this process "
                    f"({self.owner}) was superseded and has written nothing since"
                )
            yield

    def _take_over(self, before: Owner) -> None:
        if before.superseded_by(self.owner):
            say(f"{self.path.parent}: taken over from {before}")
            return
        ended = before.has_ended()
        if not ended:
            unsure = f" If it is gone for certain, delete {self.path}." if ended is None else ""
            raise RunError(
                f"run.dir: {self.path.parent} is in use by {before}; let it finish, cancel it, or use another "
                f"run.dir.{unsure}"
            )

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + _WAIT_S
        with self.path.open("a+", encoding="utf-8") as file:  # opened anew each time: network file systems then look
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise RunError(
                            f"{self.path}: locked by another process for {_WAIT_S:g} s; is it stuck?"
                        ) from None
                    time.sleep(0.05)
                except OSError as error:
                    raise RunError(
                        f"{self.path}: this file system takes no locks ({error}); use a run.dir on one that does"
                    ) from None
            yield file


@contextmanager
def sole_writer(config: Config, stage: str) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """While entered, no other run of the stage writes into the run folder; gives `Lease.held`, to write under.

    It is rank 0 that writes; every rank enters. Raises `RunError` where another run writes there, or a rank does not
    see the folder that rank 0 writes into. Shards need no lease: each writes files of its own.
    """
    if config.parallel.shard is not None:
        yield nullcontext
        return
    with ExitStack() as taken:
        lease = broadcast_result(lambda: taken.enter_context(Lease.taken(config.run.dir, stage)))
        if rank() != 0:
            own = config.run.dir / lease.path.name  # the path of rank 0 may be another
            wait_for_file(own, lambda path: path.exists() and _parsed(path.read_text()) == lease.owner)
        yield lease.held if rank() == 0 else nullcontext


def _read(file: IO[str]) -> Owner | None:
    file.seek(0)
    return _parsed(file.read())


def _parsed(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):  # given back, or torn by a crash
        return None


def _write(file: IO[str], owner: Owner | None) -> None:
    file.truncate(0)
    file.write(json.dumps(asdict(owner)) if owner else "")
    file.flush()
    os.fsync(file.fileno())


def _machine() -> str:
    """Where numbers of processes mean the same: a start of a machine, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _born(pid: int) -> str:
    """When a process started, in the kernel's ticks, as its number may be used again; empty if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]
