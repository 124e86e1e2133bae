"""Checks of every rank's node before the first step: faults that would otherwise appear after hours."""

from __future__ import annotations

import math
import os
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import Failure, TrainClips
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import RunError, few, plural
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.console import advise, print_table
from videoadapt.runtime.machine import available_cpus, pick_device, precision_dtype, worker_count
from videoadapt.runtime.ranks import all_gather, broadcast_result, rank, wait_for_all, world_size
from videoadapt.training.forecast import SUMMED_BYTES
from videoadapt.training.groups import GroupPlan, split_evenly
from videoadapt.training.utilisation import product_rate

_TRIED_CLIPS = 4  # enough to see that videos can be read; more would delay every start
_WORTH = 1.2  # a gain that is mentioned; a few clips measure less than that badly
_PROBE_BYTES, _SUMS = 32_000_000, 3


@dataclass(frozen=True)
class NodeReport:
    """The facts that one rank finds about its node."""

    node: str  # host name
    gpu: str  # "none" on a CPU
    cpus: int  # CPUs that this rank may use
    workers: int  # processes that decode for this rank
    free_bytes: int  # free space on the disk of the run folder
    step_clips: int  # clips that this rank decodes for each step
    clips_per_s: float  # decoded by one process
    error: str  # if no video can be read: one of them and the cause; otherwise empty
    pyav_clips_per_s: float | None = None  # the same clips by PyAV; None if PyAV reads them anyway
    has_bf16: bool = True  # whether the device computes in bf16 itself
    macs_per_s: float = math.nan  # of a large matrix product
    networks: str = ""  # what gloo and NCCL use, by their variables

    @property
    def decoding_s(self) -> float:
        """Seconds for decoding the clips of a step, with as many workers as have a CPU."""
        readers = max(1, min(self.workers, self.cpus))  # without workers, the rank itself reads
        return self.step_clips / (self.clips_per_s * readers) if self.clips_per_s else math.inf


class Rates(NamedTuple):
    """What the preflight has measured."""

    macs_per_s: float  # of a large matrix product on this rank, in the precision of the run
    bytes_per_s: float | None  # from one rank to the next in a sum over all ranks; None for a single process


def preflight(config: Config, manifest: Manifest, plan: GroupPlan) -> Rates:
    """Prints a table of all ranks' nodes to stderr, with warnings. All ranks call it.

    Args:
        config: The config of the run.
        manifest: The videos.
        plan: The groups of all ranks.

    Returns:
        What it has measured on the way.

    Raises:
        RunError: A rank can read no video, or the disk has no space for the checkpoints.
    """
    reports = all_gather(report_of_this_node(config, manifest, plan))
    sum_s = _measured_sum(pick_device(config.run.device))
    if rank() == 0:
        _print_reports(reports)
        for note in [*warnings(reports, config.run.precision), *decoding_notes(reports, manifest, config)]:
            advise(note)
        if sum_s is not None:
            advise(
                f"a sum of {_PROBE_BYTES / 1e6:.0f} MB over {world_size()} ranks takes {1000 * sum_s:.1f} ms "
                f"({_PROBE_BYTES / 1e9 / sum_s:.2f} GB/s); a step sums "
                f"{SUMMED_BYTES[config.parallel.sums]} bytes for each trained parameter"
            )
    found = faults(reports, broadcast_result(lambda: missing_bytes(config)))
    if found:  # on every rank, so that all stop
        raise RunError("preflight: " + "; ".join(found))
    if rank() == 0:
        slowest_s = max(report.decoding_s for report in reports)
        advise(
            f"decoding the clips of a step takes {slowest_s:.2f} s on the slowest rank; if computing the step takes "
            "less, training waits for videos"
        )
    # A ring all-reduce sends 2 (n - 1) / n of the bytes from each rank to the next.
    bytes_per_s = None if sum_s is None else 2 * (world_size() - 1) / world_size() * _PROBE_BYTES / sum_s
    return Rates(reports[rank()].macs_per_s, bytes_per_s)


def _print_reports(reports: Sequence[NodeReport]) -> None:
    if len(reports) == 1:
        (one,) = reports
        workers = plural(one.workers, "worker") if one.workers else "no workers"
        advise(
            f"preflight: {one.gpu if one.gpu != 'none' else plural(one.cpus, 'CPU')}; {workers} to read videos, "
            f"{one.clips_per_s:.1f} clips/s each; {one.free_bytes / 1e9:.0f} GB of disk free"
        )
        return
    columns = "rank,node,GPU,matrix TMAC/s,CPUs,workers,free GB,clips/s a worker,decoding s/step,network".split(",")
    rows = [
        (
            number,
            report.node,
            report.gpu,
            f"{report.macs_per_s / 1e12:.2f}",
            report.cpus,
            report.workers,
            f"{report.free_bytes / 1e9:.1f}",
            f"{report.clips_per_s:.1f}",
            f"{report.decoding_s:.2f}",
            report.networks,
        )
        for number, report in enumerate(reports)
    ]
    print_table("Preflight", columns, rows, to_stderr=True)


def report_of_this_node(config: Config, manifest: Manifest, plan: GroupPlan) -> NodeReport:
    """Returns the report of this rank. Decodes a few training videos for it."""
    device = pick_device(config.run.device)
    clips_per_s, error = try_decoding(config, manifest)
    pyav_clips_per_s = None
    if config.data.reader != "pyav" and not error and (manifest["reader"] == "decord").any():
        with_pyav = config.model_copy(update={"data": config.data.model_copy(update={"reader": "pyav"})})
        pyav_clips_per_s, _ = try_decoding(with_pyav, manifest)
    return NodeReport(
        node=socket.gethostname(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        cpus=available_cpus(),
        workers=worker_count(config.data.workers),
        free_bytes=shutil.disk_usage(config.run.dir).free,
        step_clips=clips_decoded_per_step(config, plan, rank()),
        clips_per_s=clips_per_s,
        error=error,
        pyav_clips_per_s=pyav_clips_per_s,
        has_bf16=device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False),
        networks=_networks(device),
        macs_per_s=product_rate(device, precision_dtype(config.run.precision)),
    )


def _networks(device: torch.device) -> str:
    """Returns the network interfaces of this rank's collectives; empty for a single process."""
    if world_size() == 1:
        return ""
    named = {"gloo": os.environ.get("GLOO_SOCKET_IFNAME", "by host name")}
    if device.type == "cuda":
        named["NCCL"] = os.environ.get("NCCL_SOCKET_IFNAME", "its own choice")
    return ", ".join(f"{name}: {interface}" for name, interface in named.items())


def _measured_sum(device: torch.device) -> float | None:
    """Returns the seconds of a sum of `_PROBE_BYTES` over all ranks, as gradients have it; None for one process."""
    if world_size() == 1:
        return None
    values = torch.zeros(_PROBE_BYTES // 4, device=device)  # float32
    seconds = []
    for _ in range(_SUMS):  # the first one opens connections
        wait_for_all()
        start = time.perf_counter()
        dist.all_reduce(values)
        float(values[0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return float(max(all_gather(min(seconds[1:]))))


def decoding_notes(reports: Sequence[NodeReport], manifest: Manifest, config: Config) -> list[str]:
    """Returns how many cores these files need, and what another reader or smaller files would gain, a sentence each."""
    rates = [report.clips_per_s for report in reports if report.clips_per_s]
    if not rates:
        return []
    rate = median(rates)
    notes = [
        f"a core decodes {rate:.1f} clips/s of these files: a GPU that trains N clips/s needs N / {rate:.1f} cores"
    ]
    gains = [one.pyav_clips_per_s / one.clips_per_s for one in reports if one.pyav_clips_per_s and one.clips_per_s]
    if gains and (gain := median(gains)) > _WORTH:
        notes.append(
            f"PyAV decodes {gain:.1f} times as many clips/s of these files, with the same frames: data.reader=pyav"
        )
    if (left := pixels_after_resizing(manifest, config)) < 1 / _WORTH:
        notes.append(
            f"these files have more pixels than training uses: tools/resize_videos.py leaves {left:.0%} of them, and "
            "decoding takes time about in proportion"
        )
    return notes


def pixels_after_resizing(manifest: Manifest, config: Config) -> float:
    """Returns the fraction of the training videos' pixels that copies with the needed short side have, at most 1.

    Images count as 1: tools/resize_videos.py makes videos.
    """
    videos = manifest.split("train").readable
    short = np.minimum(videos["width"], videos["height"]).astype(float)
    needed = config.data.short_side[1] if config.data.short_side else config.model.size
    left = np.where(videos["reader"] == "image", 1.0, np.minimum(1.0, (needed / short) ** 2))
    return float(left.mean()) if len(left) else 1.0


def clips_decoded_per_step(config: Config, plan: GroupPlan, rank: int) -> int:
    """Returns the number of clips that a rank decodes for each step.

    With shared decoding all ranks split the global batch; otherwise the ranks of each group do.
    """
    if config.parallel.decode == "shared":
        return len(split_evenly(config.train.batch, plan.ranks)[rank])
    return len(plan.group(rank).positions(rank, config.train.batch, pairs=config.data.mixes))


def try_decoding(config: Config, manifest: Manifest) -> tuple[float, str]:
    """Decodes a few training videos. Returns clips per second, and an error if none of them can be read."""
    rows = manifest.readable_rows("train")
    # Spread over the list: neighbours often lie in the same folder of the same disk.
    tried = rows[np.linspace(0, len(rows) - 1, min(_TRIED_CLIPS, len(rows))).astype(int)]
    clips = TrainClips(manifest, config)
    for row in tried[:1]:  # not timed: the first one loads libraries, which took twice as long as four small clips
        clips[0, int(row)]
    start = time.perf_counter()
    items = [clips[0, int(row)] for row in tried]
    failures = [item for item in items if isinstance(item, Failure)]
    read = len(items) - len(failures)
    error = f"{failures[0].path}: {failures[0].cause}" if failures and not read else ""
    return read / (time.perf_counter() - start), error


def checkpoints_bytes(config: Config) -> int:
    """Returns the disk space that the checkpoints of stage 1 need, in bytes."""
    with torch.device("meta"):  # shapes without memory
        model_bytes = sum(tensor.nbytes for tensor in TimeSformer(config.model).state_dict().values())
    # The model, two moments of AdamW or one of SGD, and the moving average.
    copies = 1 + (2 if config.train.optimizer == "adamw" else 1) + (config.train.ema is not None)
    # The best one stays too, and a new one is written before one is removed.
    return model_bytes * copies * (config.train.keep_checkpoints + (config.train.validate_every > 0) + 1)


def missing_bytes(config: Config) -> int:
    """Returns the disk space that checkpoints still need: those of an interrupted run have their space already."""
    files = (config.run.dir / "checkpoints").glob("step-*.safetensors")
    return checkpoints_bytes(config) - sum(file.stat().st_size for file in files)


def faults(reports: Sequence[NodeReport], needed_bytes: int) -> list[str]:
    """Returns the faults that stop the ranks from training, a sentence each.

    Args:
        reports: The reports of all ranks, in the order of the ranks.
        needed_bytes: Disk space of the checkpoints.
    """
    found = []
    for number, report in enumerate(reports):
        if report.error:
            found.append(f"rank {number} on {report.node} can read no video ({report.error})")
    free = min(report.free_bytes for report in reports)
    if free < needed_bytes:
        found.append(
            f"run.dir has {free / 1e9:.1f} GB free, the checkpoints need {needed_bytes / 1e9:.1f} GB; free some, or "
            "lower train.keep_checkpoints"
        )
    return found


def warnings(reports: Sequence[NodeReport], precision: str = "fp32") -> list[str]:
    """Returns the problems that will slow the run down, a sentence each.

    Args:
        reports: The reports of all ranks, in the order of the ranks.
        precision: `run.precision`.
    """
    found = []
    short = [number for number, report in enumerate(reports) if report.workers > report.cpus]
    if short:
        first = reports[short[0]]
        found.append(
            f"rank {few(short)}: {plural(first.workers, 'worker')} share {plural(first.cpus, 'CPU')}; ask for more "
            "CPUs per task (slurm.cpus_per_task), or lower data.workers"
        )
    slow = [number for number, report in enumerate(reports) if not report.has_bf16]
    if slow and precision == "bf16":
        found.append(
            f"rank {few(slow)}: {reports[slow[0]].gpu} does not compute in bf16 itself, so run.precision=bf16 is "
            "slower than fp32 there; use run.precision=fp32 (fp16 is not supported)"
        )
    return found
