"""Signs of life: each rank notices within seconds that another one has died, was stopped or has failed.

Collectives do not show it: an operation of NCCL with a dead rank waits until its timeout, which is half an hour.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist

from videoadapt.errors import few
from videoadapt.runtime.console import print_error

BEAT_S = 1.0
SILENT_BEATS = 20  # beats without a sign of life after which a rank counts as dead; a thread may be held up for seconds
GRACE_BEATS = 10  # beats after the end of the job in which this process may still end by itself
_LOOK_BEATS = 3  # in which a living rank gives a sign
_LEFT = "left"


class Heartbeats:
    """Gives signs of life, looks at those of the next rank, and ends this process if the job has ended.

    The keys in the store of the ranks:

    - `alive/RANK`: a number that grows at every beat; `left` once the rank has left in order.
    - `end`: why the job ends. The first rank that writes it reports the cause.

    Two threads, because an operation of the store waits for ever if its host is stopped: one works with the store, the
    other sees whether that one gets on. Time is counted in beats of this process, not in seconds: if SLURM suspends a
    job, all its processes stand still.

    Attributes:
        reports_itself: Whether the main thread has an error to report, so that these threads print nothing.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        hosts: Sequence[str],
        host_of_store: str,
        end_process: Callable[[], NoReturn],
    ) -> None:
        """Starts the threads.

        Args:
            store: Keys that all ranks share.
            rank: The number of this rank.
            hosts: The machine of each rank.
            host_of_store: Who hosts the store, for messages.
            end_process: Ends this process.
        """
        self._store, self._rank, self._hosts, self._host_of_store = store, rank, hosts, host_of_store
        self._end_process = end_process
        self.reports_itself = False
        self._beats = 0  # with an answer of the store
        self._job_ended = False
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Ends the threads. The other ranks do not wait for signs of life any longer."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(_LOOK_BEATS * BEAT_S + 1.0)
        if not self._threads[0].is_alive():  # otherwise it waits in the store
            self._store.set(f"alive/{self._rank}", _LEFT)

    def wait_until_others_left(self, timeout_s: float) -> None:
        """Waits, on the rank that hosts the store, until no other rank needs it."""
        deadline = time.monotonic() + timeout_s
        others = [rank for rank in range(len(self._hosts)) if rank != self._rank]
        while any(self._value(f"alive/{rank}") != _LEFT.encode() for rank in others) and time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)

    def _watch(self) -> None:
        """Ends this process if the store does not answer, or if the job has ended and this process has not."""
        before = silent = since_end = 0
        while not self._stopped.wait(BEAT_S):
            since_end += self._job_ended
            silent, before = (0 if self._beats > before else silent + 1), self._beats
            if since_end > GRACE_BEATS:
                self._end_process()
            elif silent > SILENT_BEATS and not self._job_ended:
                waited = f"its store has not answered for {SILENT_BEATS * BEAT_S:g} s"
                self._print_error(f"{self._host_of_store} died or hangs: {waited}")
                self._end_process()

    def _beat(self) -> None:
        """Gives signs of life and looks at those of the next rank, until the job ends or the store is lost."""
        next_rank = f"alive/{(self._rank + 1) % len(self._hosts)}"
        last, silent = b"", 0
        with suppress(RuntimeError):  # of a lost store
            while not self._stopped.wait(BEAT_S):
                self._store.set(f"alive/{self._rank}", str(self._beats))
                if self._store.check(["end"]):
                    self._job_ended = True
                    return
                value = self._value(next_rank)
                silent, last = (0 if value != last or value == _LEFT.encode() else silent + 1), value
                if silent > SILENT_BEATS:
                    self._report_silent()
                self._beats += 1

    def _report_silent(self) -> None:
        silent = self._silent_ranks()
        if silent and not self._stopped.is_set() and claim_end(self._store, "failed"):
            waited = f"no sign of life for {SILENT_BEATS * BEAT_S:g} s"
            self._print_error(f"{describe_dead(silent, self._hosts)}: {waited}")
            time.sleep(_LOOK_BEATS * BEAT_S)  # the store may end with this process, and the others read `end` first
            self._end_process()

    def _print_error(self, message: str) -> None:
        if not self.reports_itself:
            print_error(message)

    def _silent_ranks(self) -> list[int]:
        """Looks at the signs of life of all ranks for some beats. Returns the ranks without any."""
        others = [rank for rank in range(len(self._hosts)) if rank != self._rank]
        before = [self._value(f"alive/{rank}") for rank in others]
        time.sleep(_LOOK_BEATS * BEAT_S)
        after = [self._value(f"alive/{rank}") for rank in others]
        return [rank for rank, old, new in zip(others, before, after, strict=True) if old == new != _LEFT.encode()]

    def _value(self, key: str) -> bytes:
        return self._store.get(key) if self._store.check([key]) else b""


def claim_end(store: dist.Store, cause: str) -> bool:
    """Writes why the job ends, if no rank has written it before. Returns whether this rank reports it."""
    token = f"{cause} {uuid.uuid4().hex}"
    return store.compare_set("end", "", token) == token.encode()


def cause_of_end(store: dist.Store) -> str | None:
    """Returns the first word of `end`: `failed`, or the name of a signal; None if the job goes on."""
    return store.get("end").decode().split()[0] if store.check(["end"]) else None


def describe_dead(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Returns `rank 3 of 8 (node2) died or hangs`."""
    return f"rank {few(ranks)} of {len(hosts)} ({few(dict.fromkeys(hosts[rank] for rank in ranks))}) died or hangs"
