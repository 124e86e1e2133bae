"""Runs a real SLURM on this machine to try jobs out: one controller, virtual nodes, fake GPUs.

    python tools/slurm_cluster.py start FOLDER     # prints the export that makes sbatch find it
    export SLURM_CONF=FOLDER/slurm.conf
    python tools/slurm_cluster.py status FOLDER
    python tools/slurm_cluster.py stop FOLDER

It needs the packages `slurmctld slurmd slurm-client` of Debian or Ubuntu, but no systemd, munge or database. It writes
only into FOLDER. Jobs are not authenticated, and every user of the machine can reach its ports: do not use it on a
shared machine.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd")
TOOLS = ("srun", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
CPUS, GPUS, GPU_TYPE, MEMORY_MB = 8, 8, "a100", 64_000  # what each node reports; the machine may have others
START_S, STOP_S = 30.0, 15.0  # time limits

CONF = """\
ClusterName=onemachine
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# Without this default a job takes the whole memory of a node.
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
Licenses=matlab:4
# Jobs keep their account and their WCKey without a database, too.
TrackWCKey=yes
JobRequeue=1
ReturnToService=2
# Seconds until a silent node counts as failed.
SlurmdTimeout=10
KillWait=2
MinJobAge=600
CompleteWait=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# The names of nodes are addresses: a rank can then connect to a node by its name, without DNS.
NODE = (
    "NodeName=127.0.0.{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 "
    "SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory={memory_mb} Gres=gpu:{gpu_type}:{gpus} "
    "State=UNKNOWN"
)


class ClusterError(RuntimeError):
    """The cluster cannot start, or does not run."""


class Cluster:
    """The cluster of a folder.

    Its methods raise `ClusterError` if a daemon or one of SLURM's tools fails.

    Attributes:
        folder: Configuration, logs, state and process ids.
        conf: The path of slurm.conf.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.conf = self.folder / "slurm.conf"
        self._pids = self.folder / "pids.json"

    @property
    def environment(self) -> dict[str, str]:
        """Returns the environment variables with which SLURM's tools find this cluster."""
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        # Variables of an enclosing job would change the options of ours.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"PATH": path, "SLURM_CONF": str(self.conf)}

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        """Runs one of SLURM's tools and returns its standard output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=timeout_s
        )
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def start(self, nodes: int = 3) -> None:
        """Starts the daemons and waits until all nodes are idle."""
        if absent := missing():
            raise ClusterError(f"not installed: {', '.join(absent)}; apt-get install slurmctld slurmd slurm-client")
        if any(map(alive, self.daemons().values())):
            raise ClusterError(f"{self.folder}: a cluster already runs there")
        names = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
        for name in ("state", "log", "dev", *(f"spool/{node}" for node in names)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_conf(nodes)
        # -D: in the foreground, so that the process id is known; -c: without the jobs of an earlier cluster.
        controller = {"slurmctld": self._spawn("slurmctld", "slurmctld", "-D", "-c", "-i", "-f", str(self.conf))}
        self._pids.write_text(json.dumps(controller | {node: self._start_node(node) for node in names}))
        try:
            _wait_until(lambda: self._idle(nodes), START_S, f"{nodes} idle nodes; see {self.folder / 'log'}")
        except ClusterError:
            self.stop()
            raise

    def daemons(self) -> dict[str, int]:
        """Returns the process ids of the controller and of the nodes' daemons by name."""
        found: dict[str, int] = json.loads(self._pids.read_text()) if self._pids.exists() else {}
        return found

    @contextmanager
    def reserved(self, name: str, node: str) -> Iterator[None]:
        """Reserves a node for the jobs of this user with `--reservation=NAME`."""
        options = ("StartTime=now", "Duration=60", f"Users={getpass.getuser()}", f"Nodes={node}", "Flags=IGNORE_JOBS")
        self.run("scontrol", "create", "reservation", f"ReservationName={name}", *options)
        try:
            yield
        finally:
            self.run("scontrol", "delete", f"ReservationName={name}")

    def kill_node(self, node: str, *, spare: int | None = None) -> None:
        """Kills a node's daemon and all processes of its jobs, like a power cut.

        Args:
            node: The name of the node.
            spare: A process that goes on with its children, like a job that SLURM has lost track of.
        """
        for pid in (self.daemons()[node], *self._step_processes(node)):
            if spare is None or spare not in (pid, _parent(pid)):
                _send(pid, signal.SIGKILL)

    def revive_node(self, node: str) -> None:
        """Starts the daemon of a killed node again."""
        self._pids.write_text(json.dumps(self.daemons() | {node: self._start_node(node)}))

    def stop(self) -> None:
        """Cancels all jobs and stops the daemons."""
        daemons = self.daemons()
        if alive(daemons.get("slurmctld", 0)):  # jobs outlive their daemons, so they are cancelled first
            self.run("scancel", "--full", f"--user={getpass.getuser()}")
            _wait_until(lambda: not self.run("squeue", "--noheader").strip(), STOP_S, "jobs to end", strict=False)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in daemons.values():
                _send(pid, number)
            _wait_until(lambda: not any(map(alive, daemons.values())), STOP_S, "daemons to end", strict=False)
        self._pids.unlink(missing_ok=True)

    def _write_conf(self, nodes: int) -> None:
        lines = [
            NODE.format(number=number, port=_free_port(), cpus=CPUS, gpu_type=GPU_TYPE, gpus=GPUS, memory_mb=MEMORY_MB)
            for number in range(1, nodes + 1)
        ]
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        self.conf.write_text(
            CONF.format(host=host, port=_free_port(), user=user, folder=self.folder, nodes="\n".join(lines))
        )
        for number in range(GPUS):  # SLURM accepts any character device as a GPU
            device = self.folder / "dev" / f"gpu{number}"
            device.unlink(missing_ok=True)
            device.symlink_to("/dev/null")
        gpus = f"AutoDetect=off\nName=gpu Type={GPU_TYPE} File={self.folder}/dev/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(gpus)

    def _start_node(self, node: str) -> int:
        return self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))

    def _spawn(self, name: str, *command: str) -> int:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal does not reach the daemons
            ).pid

    def _idle(self, nodes: int) -> bool:
        if dead := [name for name, pid in self.daemons().items() if not alive(pid)]:
            raise ClusterError(f"{', '.join(dead)} exited during the start; see {self.folder / 'log'}")
        try:
            # One line "3 idle": as long as nodes differ in state, sinfo prints a line for each state.
            return self.run("sinfo", "--noheader", "--format=%D %t").split() == [str(nodes), "idle"]
        except ClusterError:  # the controller does not answer yet
            return False

    def _step_processes(self, node: str) -> list[int]:
        """Returns the processes of the node's jobs.

        The step daemons come first: killed after their tasks, they would report the end of the tasks to the controller.
        """
        tasks = [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if f"SLURMD_NODENAME={node}" in _read(folder / "environ").split("\0")
            and f"SLURM_CONF={self.conf}" in _read(folder / "environ").split("\0")
        ]
        parents = {_parent(pid) for pid in tasks}
        return [pid for pid in parents if _read(Path(f"/proc/{pid}/cmdline")).startswith("slurmstepd")] + tasks


def missing() -> list[str]:
    """Returns the programs of SLURM that are not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in (*DAEMONS, *TOOLS) if shutil.which(name, path=path) is None]


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # the process has ended, or belongs to another user
        return ""


def alive(pid: int) -> bool:
    """Returns whether a process runs. A zombie, which nobody has waited for, does not run."""
    stat = _read(Path(f"/proc/{pid}/stat"))
    # The name in parentheses can contain spaces and parentheses; the state follows the last one.
    return bool(stat) and stat.rpartition(")")[2].split()[0] != "Z"


def _parent(pid: int) -> int:
    stat = _read(Path(f"/proc/{pid}/stat"))
    return int(stat.rpartition(")")[2].split()[1]) if stat else 0


def _send(pid: int, number: signal.Signals) -> None:
    if alive(pid):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def _wait_until(done: Callable[[], bool], seconds: float, what: str, *, strict: bool = True) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            if strict:
                raise ClusterError(f"waited {seconds:g} s for {what}")
            return
        time.sleep(0.1)


def main() -> None:
    """Starts or stops the cluster of a folder, or prints its status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop", "status"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=3, help="virtual nodes [default: 3]")
    given = parser.parse_args()
    cluster = Cluster(given.folder)
    try:
        if given.action == "start":
            cluster.start(given.nodes)
            print(f"export SLURM_CONF={cluster.conf}")
        elif given.action == "stop":
            cluster.stop()
        else:
            for name, pid in cluster.daemons().items():
                print(f"{name:12} {pid:8} {'runs' if alive(pid) else 'has ended'}")
    except ClusterError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
