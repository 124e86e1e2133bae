"""One writer in a run folder: a file names the process that may write, and a superseded process cannot write."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO

from videoadapt.config.load import Config
from videoadapt.errors import RunError, plural
from videoadapt.runtime.console import say
from videoadapt.runtime.files import remove_abandoned
from videoadapt.runtime.ranks import before_sudden_end, broadcast_result, rank, wait_for_file
from videoadapt.runtime.run_config import record_config
from videoadapt.runtime.slurm import cluster_name, job_states, slurm_job

_LOCK_TIMEOUT_S = 45.0  # the owner holds the lock while it writes a checkpoint
_POLL_S = 0.05  # between two attempts to lock
_STATE_FOLDERS = (
    "checkpoints",
    "labels",
    "assigner",
    "scores/*",
    "calibrate",
    "evaluate",
    "report",
    "restarts",
)  # of a run
# The sections of `config.yaml` that a stage replaces when it has succeeded. `train` records all when it begins.
_OWN_SECTIONS: dict[str, tuple[str, ...]] = {
    "label": ("label",),
    "assign": ("assign",),
    "calibrate": (),
    "evaluate": (),
}
_ACTIVE_STATES = {"RUNNING", "COMPLETING", "SUSPENDED"}  # SLURM states in which processes of the job may still exist


@dataclass(frozen=True)
class Owner:
    """A process that writes into a run folder. The fields are keys of the JSON in the owner file."""

    host: str
    machine: str  # process ids are unique within it; see `_machine_id`
    pid: int
    born: str  # start time of the process; a process id is used again after the process has ended
    job: str | None  # id of the SLURM job
    restarts: int  # number of restarts of the SLURM job
    cluster: str | None = None  # name of the SLURM cluster, whose numbers of jobs are those of others, too
    installation: str = ""  # id of the operating system on `host`, the same after a restart of the machine

    @classmethod
    def this_process(cls) -> Owner:
        """Returns the calling process."""
        job = slurm_job(os.environ)
        pid = os.getpid()
        return cls(
            host=socket.gethostname(),
            machine=_machine_id(),
            pid=pid,
            born=_start_time(pid),
            job=job.id if job else None,
            restarts=job.restarts if job else 0,
            cluster=cluster_name(os.environ) if job else None,
            installation=_installation_id(),
        )

    def __str__(self) -> str:
        job = f"job {self.job}, restart {self.restarts}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}"

    def superseded_by(self, other: Owner) -> bool:
        """Returns whether `other` is a later start of the same SLURM job. The earlier one may still be running."""
        return self._has_job_of(other) and self.restarts < other.restarts

    def _has_job_of(self, other: Owner) -> bool:
        known = self.cluster is not None  # not in the files of earlier versions
        return self.job is not None and self.job == other.job and (not known or self.cluster == other.cluster)

    def has_ended(self) -> bool | None:
        """Returns whether the process has ended, or None if that cannot be found out from this machine."""
        here = Owner.this_process()
        if self.machine and self.machine == here.machine:
            return _start_time(self.pid) != self.born
        if self.job is None:
            return self._was_before_the_boot_of(here) or None
        if self._has_job_of(here):
            return None  # the job goes on, with this process: it may be a step that has crashed on another node
        if self.cluster is not None and self.cluster != cluster_name(os.environ):
            return None  # the SLURM that answers here knows other jobs
        states = job_states([self.job])
        if states is None:
            return None
        # SLURM forgets a job some minutes after its end, so a job without a state has ended.
        return not any(state.split("|")[0] in _ACTIVE_STATES for state in states.values())

    def _was_before_the_boot_of(self, here: Owner) -> bool:
        """Returns whether the machine, and not only a container, was started anew since."""
        boot, _, namespace = self.machine.partition(" ")
        boot_here, _, namespace_here = here.machine.partition(" ")
        same = (self.host, self.installation, namespace) == (here.host, here.installation, namespace_here)
        return bool(same and self.installation and boot != boot_here)


class Lease:
    """The right of this process to write the files of a stage into a run folder.

    The file `STAGE.owner` in the folder names the owner. It is read and changed under a lock of the file system, which
    the kernel releases when the process ends. Therefore only the owner can write inside `lock()`.

    Args:
        folder: The run folder.
        stage: The stage, such as `train`.
    """

    def __init__(self, folder: Path, stage: str) -> None:
        self.path = folder / f"{stage}.owner"
        self.owner = Owner.this_process()

    @classmethod
    @contextmanager
    def acquire(cls, folder: Path, stage: str) -> Iterator[Lease]:
        """Makes this process the owner of a stage until the end of the `with` block.

        It replaces an owner that has ended, or that is an earlier start of this SLURM job. After an exception, what
        this call has made is removed again: the owner file, and the folder if nothing else is in it.

        Raises:
            RunError: Another process is the owner and may be running, or the folder cannot be written.
        """
        lease = cls(folder, stage)
        made = [each for each in (lease.path, folder, *folder.parents) if not each.exists()]  # innermost first
        with lease._locked_file() as file:
            previous = _read_owner(file)
            if previous is not None and previous != lease.owner:
                lease._require_replaceable(previous)
            _write_owner(file, lease.owner)
        try:
            with before_sudden_end(partial(lease._give_back, made)):
                yield lease
        except BaseException:
            lease._give_back(made)
            raise
        lease._give_back([])

    def _give_back(self, made: list[Path]) -> None:
        """Ends the ownership, unless a later start of this job has replaced it; `made` is removed if unused."""
        with self._locked_file() as file:
            if _read_owner(file) == self.owner:
                _write_owner(file, None)
                self._remove_unused(made)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Prevents other processes from becoming the owner, until the end of the `with` block.

        Raises:
            RunError: Another process has become the owner.
        """
        with self._locked_file() as file:
            owner = _read_owner(file)
            if owner != self.owner:
                raise RunError(
                    f"{self.path}: the owner is now {owner or 'nobody'}; this process ({self.owner}) was superseded "
                    "and has written nothing since"
                )
            yield

    def _remove_unused(self, made: list[Path]) -> None:
        """Removes the owner file and the folders that this call has made; folders only if nothing else is in them."""
        if made:
            self.path.unlink()
            with suppress(OSError):  # this run, or another one, has put something into the folder
                for folder in made[1:]:
                    folder.rmdir()

    def _require_replaceable(self, previous: Owner) -> None:
        if previous.superseded_by(self.owner):
            say(f"{self.path.parent}: taken over from {previous}")
            return
        ended = previous.has_ended()
        if not ended:
            unknown = f" If it has certainly ended, delete {self.path}." if ended is None else ""
            raise RunError(
                f"run.dir: {self.path.parent} is in use by {previous}; wait until it ends, cancel it, or use another "
                f"run.dir.{unknown}"
            )

    @contextmanager
    def _locked_file(self) -> Iterator[IO[str]]:
        while True:
            # Opened each time: NFS guarantees the newest content only to a process that opens the file.
            with self._open() as file:
                self._wait_for_lock(file)
                if os.fstat(file.fileno()).st_nlink:  # otherwise a call that failed has just removed the file
                    yield file  # closing the file releases the lock
                    return

    def _open(self) -> IO[str]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self.path.open("a+", encoding="utf-8")
        except OSError as error:
            raise RunError(
                f"run.dir: cannot write into {self.path.parent}: {error.strerror}; use another run.dir"
            ) from None

    def _wait_for_lock(self, file: IO[str]) -> None:
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"{self.path}: another process has locked this file for {_LOCK_TIMEOUT_S:g} s; check whether "
                        "it hangs"
                    ) from None
                time.sleep(_POLL_S)
            except OSError as error:
                raise RunError(
                    f"{self.path}: this file system does not support locks ({error}); use a run.dir on one that does"
                ) from None


@contextmanager
def sole_writer(config: Config, stage: str) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Prevents other runs of the stage from writing into the run folder. Every rank must enter it.

    Removes the temporary files of killed processes from the run folder. After success, records the config in it (see
    `record_config`). Does nothing with `parallel.shard`, because each shard writes separate files.

    Args:
        config: `run.dir` is the folder.
        stage: The name of the stage.

    Yields:
        On rank 0, which writes: `Lease.lock`, to be entered for each write. On other ranks: `nullcontext`.

    Raises:
        RunError: Another run writes into the folder, or a rank does not see the folder of rank 0.
    """
    if config.parallel.shard is not None:
        yield nullcontext
        return
    with ExitStack() as acquired:
        lease = broadcast_result(lambda: acquired.enter_context(Lease.acquire(config.run.dir, stage)))
        if rank() == 0:
            _remove_abandoned_files(config.run.dir)
        if rank() != 0:
            # If nodes have different folders under this path, this fails now instead of after the training.
            own_path = config.run.dir / lease.path.name
            wait_for_file(own_path, lambda path: path.exists() and _parse_owner(path.read_text()) == lease.owner)
        yield lease.lock if rank() == 0 else nullcontext
        if rank() == 0 and stage in _OWN_SECTIONS:
            with lease.lock():
                record_config(config, _OWN_SECTIONS[stage])


def _remove_abandoned_files(run: Path) -> None:
    folders = [run, *chain.from_iterable(run.glob(pattern) for pattern in _STATE_FOLDERS)]
    removed = [path for folder in folders for path in remove_abandoned(folder)]
    if removed:
        say(f"removed {plural(len(removed), 'temporary file')} of processes that were killed, such as {removed[0]}")


def _read_owner(file: IO[str]) -> Owner | None:
    file.seek(0)
    return _parse_owner(file.read())


def _parse_owner(text: str) -> Owner | None:
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):  # empty: released; anything else: the write was cut off by a crash
        return None


def _write_owner(file: IO[str], owner: Owner | None) -> None:
    # In place, because the lock belongs to this file: a new file of the same name would not be locked.
    file.truncate(0)
    file.write(json.dumps(asdict(owner)) if owner else "")
    file.flush()
    os.fsync(file.fileno())


def _machine_id() -> str:
    """Returns an id of this boot of the machine and of the container (pid namespace); empty if this is not Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _installation_id() -> str:
    """Returns the id that systemd gives an operating system when it is installed; empty if there is none."""
    try:
        return Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _start_time(pid: int) -> str:
    """Returns the start time of a process in clock ticks since boot; empty if it has ended.

    psutil's `create_time` does not fit: it is in seconds of the wall clock, and changes when the clock is set.
    """
    try:
        # The name of the program, in parentheses, may contain spaces and parentheses; the fields follow the last one.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]  # Z: ended, but not yet reaped by its parent; 18: `starttime`
