"""submitit's SLURM jobs, with states from squeue: sacct needs a database that small clusters lack."""

from __future__ import annotations

from typing import Any

from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob


class SqueueWatcher(SlurmInfoWatcher):
    """Asks squeue for the states of all jobs at once."""

    def _make_command(self) -> list[str] | None:
        jobs = sorted({job.split("_")[0] for job in self._registered - self._finished})
        return ["squeue", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i|%T|%N"] if jobs else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """States and nodes by job, from what squeue printed."""
        text = string if isinstance(string, str) else string.decode()
        _, *lines = text.splitlines()
        return super().read_info("\n".join(["JobID|State|NodeList", *lines]))


class SqueueJob(SlurmJob[Any]):
    """A job that knows its state where there is no sacct."""

    watcher = SqueueWatcher(delay_s=60)


class SqueueExecutor(SlurmExecutor):
    """Submits such jobs."""

    job_class = SqueueJob

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Any]:
        jobs = super()._internal_process_submissions(delayed_submissions)
        # Those of an array come as jobs of the base class.
        return [SqueueJob(self.folder, job.job_id, tasks=list(range(job.num_tasks))) for job in jobs]
