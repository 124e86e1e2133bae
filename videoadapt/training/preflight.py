"""A look at every rank's node before the first step: what would fail, or starve, hours later is said now."""

from __future__ import annotations

import math
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import Failure, TrainClips
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import RunError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.console import print_table, say
from videoadapt.runtime.machine import available_cpus, pick_device, worker_count
from videoadapt.runtime.ranks import all_gather, rank, world_size
from videoadapt.training.groups import make_plan, split_evenly

_PROBED_CLIPS = 4


@dataclass(frozen=True)
class NodeReport:
    """What one rank finds on its node.

    `step_clips` are the clips that it decodes for each step, `clips_per_s` is what one worker decodes, and `unread`
    names a video and a cause.
    """

    node: str
    gpu: str
    cpus: int
    workers: int
    free_bytes: int
    step_clips: int
    clips_per_s: float
    unread: str
    manifest: str

    @property
    def decoding_s(self) -> float:
        """What decoding the clips of a step takes with all workers at it, as far as each has a CPU."""
        readers = max(1, min(self.workers, self.cpus))
        return self.step_clips / (self.clips_per_s * readers) if self.clips_per_s else math.inf


def preflight(config: Config, manifest: Manifest) -> None:
    """Shows what every rank finds, in one table on stderr. Every rank calls it.

    Raises `RunError` where nodes differ in the manifest, cannot read the videos, or lack room for the checkpoints.
    """
    found = all_gather(_look(config, manifest))
    if rank() == 0:
        columns = (
            "rank",
            "node",
            "GPU",
            "CPUs",
            "workers",
            "free GB",
            "clips/s a worker",
            "decoding s/step",
            "manifest",
        )
        rows = [
            (
                number,
                one.node,
                one.gpu,
                one.cpus,
                one.workers,
                f"{one.free_bytes / 1e9:.1f}",
                f"{one.clips_per_s:.1f}",
                f"{one.decoding_s:.2f}",
                one.manifest,
            )
            for number, one in enumerate(found)
        ]
        print_table("Preflight", columns, rows, to_stderr=True)
        for warning in warnings(found):
            say(warning)
    if wrong := faults(found, checkpoints_bytes(config)):
        raise RunError("preflight: " + "; ".join(wrong))
    if rank() == 0:
        slowest_s = max(one.decoding_s for one in found)
        say(
            f"decoding the clips of a step takes {slowest_s:.2f} s on the slowest rank; where computing it takes less, "
            "training waits for videos"
        )


def _look(config: Config, manifest: Manifest) -> NodeReport:
    device = pick_device(config.run.device)
    clips_per_s, unread = _decode(config, manifest)
    return NodeReport(
        node=socket.gethostname(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        cpus=available_cpus(),
        workers=worker_count(config.data.workers),
        free_bytes=shutil.disk_usage(config.run.dir).free,
        step_clips=_step_clips(config),
        clips_per_s=clips_per_s,
        unread=unread,
        manifest=manifest.hash,
    )


def _step_clips(config: Config) -> int:
    """The clips that this rank decodes for each step: its share of all, or of those that its group trains."""
    macs = {point: float(count) for point, count in point_macs(config.model).items()}
    plan = make_plan(config, world_size(), macs)
    if config.parallel.decode == "shared":
        return len(split_evenly(config.train.batch, plan.ranks)[rank()])
    return len(plan.group(rank()).positions(rank(), config.train.batch, pairs=config.data.mixes))


def _decode(config: Config, manifest: Manifest) -> tuple[float, str]:
    """Clips per second of this process on a few training videos, and what it could not read if it could read none."""
    rows = np.flatnonzero((manifest["split"] == "train") & (manifest["status"] == "ok"))
    probed = rows[np.linspace(0, len(rows) - 1, min(_PROBED_CLIPS, len(rows))).astype(int)]
    clips = TrainClips(manifest, config)
    for row in probed[:1]:  # the first one loads libraries, which made four small clips look three times as slow
        clips[0, int(row)]
    start = time.perf_counter()
    read = [clips[0, int(row)] for row in probed]
    failures = [clip for clip in read if isinstance(clip, Failure)]
    good = len(read) - len(failures)
    unread = f"{failures[0].path}: {failures[0].cause}" if failures and not good else ""
    return good / (time.perf_counter() - start), unread


def checkpoints_bytes(config: Config) -> int:
    """What the checkpoints of stage 1 take, with the one that is written before an old one is removed."""
    with torch.device("meta"):
        model_bytes = sum(tensor.nbytes for tensor in TimeSformer(config.model).state_dict().values())
    copies = 1 + (2 if config.train.optimizer == "adamw" else 1) + (config.train.ema is not None)
    return model_bytes * copies * (config.train.keep_checkpoints + 1)


def faults(found: Sequence[NodeReport], needed_bytes: int) -> list[str]:
    """What keeps the ranks from training, a sentence each."""
    wrong = []
    if len({one.manifest for one in found}) > 1:
        listed = ", ".join(f"{one.manifest} on {one.node} (rank {number})" for number, one in enumerate(found))
        wrong.append(f"the nodes see different manifests: {listed}; run.dir and the lists must be the same everywhere")
    wrong += [f"rank {n} on {one.node} can read no video ({one.unread})" for n, one in enumerate(found) if one.unread]
    free = min(one.free_bytes for one in found)
    if free < needed_bytes:
        wrong.append(
            f"run.dir has {free / 1e9:.1f} GB free, the checkpoints need {needed_bytes / 1e9:.1f} GB "
            "(fewer with train.keep_checkpoints)"
        )
    return wrong


def warnings(found: Sequence[NodeReport]) -> list[str]:
    """What will slow the run down, a sentence each."""
    short = [number for number, one in enumerate(found) if one.workers > one.cpus]
    if not short:
        return []
    first = found[short[0]]
    return [
        f"rank {', '.join(map(str, short))}: {first.workers} workers share {first.cpus} CPUs; ask for more CPUs per "
        "task (slurm.cpus_per_task), or lower data.workers"
    ]
