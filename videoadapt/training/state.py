"""What training changes from step to step: the state that checkpoints hold, and the tallies that people watch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import Failure
from videoadapt.data.clips.loader import Batch
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import CheckpointError, RunError
from videoadapt.model.checkpoint import Checkpoint, fill, optimizer_tensors, require_same, restore_optimizer
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.console import say
from videoadapt.runtime.machine import CpuLimit, cpu_limit, pick_device
from videoadapt.training.optim import make_optimizer

# what may differ between a run and its continuation without changing what it computes
RESUME_FREELY: dict[str, tuple[str, ...]] = {
    "run": ("dir", "device", "checkpoint"),
    "model": (),
    "loss": (),
    "train": ("init", "activation_checkpointing", "compile", "save_steps", "keep_checkpoints"),
    "data": ("root", "train", "val", "classes", "reader", "workers", "timeout_s"),
}


@dataclass
class Tally:
    """Losses and hits of one point's clips in one step."""

    loss: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    videos: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor, right: Tensor, videos: Tensor) -> None:
        """Takes in a part of the batch, each `(B,)`; `videos` are manifest rows."""
        self.loss.append(loss)
        self.right.append(right.float())
        self.videos.append(videos)

    def sums(self) -> Tensor:
        """The sum of the losses, of the hits, and the number of clips: (3,) float64 on the host."""
        if not self.loss:
            return torch.zeros(3, dtype=torch.float64)
        loss, right = torch.cat(self.loss).double(), torch.cat(self.right).double()
        return torch.stack([loss.sum(), right.sum(), torch.tensor(float(len(loss)), device=loss.device)]).cpu()

    def require_finite(self, point: str, step: int) -> None:
        """Raises `RunError`, naming the clips, where a loss is NaN or infinite."""
        if not self.loss:
            return
        bad = ~torch.isfinite(torch.cat(self.loss)).cpu()
        if bad.any():
            rows = torch.cat(self.videos)[bad].tolist()
            raise RunError(
                f"step {step}, point {point}: the loss is not finite on the clips of manifest rows {rows[:8]}; "
                "nothing was changed by this step. Lower train.lr, or set train.clip_grad"
            )


@dataclass
class State:
    """All that a step changes, and that a checkpoint holds."""

    config: Config
    manifest: Manifest
    device: torch.device
    model: TimeSformer
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    step: int = 0
    skipped: int = 0

    @classmethod
    def start(cls, config: Config, manifest: Manifest) -> State:
        """A model freshly initialised from `run.seed`, on its device."""
        device = pick_device(config.run.device)
        torch.manual_seed(config.run.seed)
        model = TimeSformer(config.model, manifest.classes).to(device)
        state = cls(config, manifest, device, model, make_optimizer(model.named_parameters(), config.train), None)
        state.reset_ema()
        return state

    def reset_ema(self) -> None:
        """Starts the moving average anew, from the model as it is."""
        if self.config.train.ema is not None:
            self.ema = ModelEmaV3(self.model, decay=self.config.train.ema)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the rest of a checkpoint."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.model, self.optimizer)
        if self.ema is not None:
            tensors |= {f"ema/{name}": t for name, t in self.ema.module.state_dict().items()}
        return tensors, self.config.model_dump(mode="json") | {
            "classes": list(self.manifest.classes),
            "manifest": self.manifest.hash,
            "skipped": self.skipped,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on exactly where a checkpoint was made. Raises `CheckpointError` for another architecture or run."""
        if checkpoint.meta["manifest"] != self.manifest.hash:
            raise CheckpointError(
                f"{checkpoint.path}: was trained on manifest {checkpoint.meta['manifest']}, but the lists or files now "
                f"give {self.manifest.hash}, so that it could not go on with the same clips. Use another run.dir"
            )
        for name, free in RESUME_FREELY.items():
            require_same(checkpoint.path, getattr(self.config, name), checkpoint.meta[name], name, free=free)
        fill(self.model, checkpoint.part("model"), checkpoint.path)
        restore_optimizer(self.model, self.optimizer, checkpoint)
        if self.ema is not None:
            fill(self.ema.module, checkpoint.part("ema"), checkpoint.path)
        self.step, self.skipped = checkpoint.meta["step"], checkpoint.meta["skipped"]
        say(f"going on from {checkpoint.path} at step {self.step}")

    def list_skipped(self, failures: Iterable[Failure]) -> None:
        """Writes down the videos that failed in a step; nothing takes their places."""
        for failure in failures:
            with (self.config.run.dir / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, "path": failure.path, "cause": failure.cause}) + "\n")

    def note(self, values: dict[str, float], clock: Clock) -> str:
        """What the progress display says of a step."""
        points = [point for point in self.config.model.points if f"top1/{point}" in values]  # the step's
        top1 = "/".join(f"{values[f'top1/{p}']:.2f}" for p in points)
        drawn = f" at {'/'.join(points)}" if self.config.train.draw == "sampled" else ""
        rates = clock.rates()
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return (
            f"{rates['clips_per_s']:.1f} clips/s, {rates['wait_share']:.0%} waiting for data, "
            f"loss {values[f'loss/{points[0]}']:.2f}, top-1 {top1}{drawn}{skipped}"
        )


@dataclass(frozen=True)
class Pace:
    """So many clips in so many seconds, part of which were spent waiting for them."""

    clips: int
    seconds: float
    waited_s: float

    def __sub__(self, earlier: Pace) -> Pace:
        return Pace(self.clips - earlier.clips, self.seconds - earlier.seconds, self.waited_s - earlier.waited_s)

    @property
    def clips_per_s(self) -> float:
        """What the run does."""
        return self.clips / max(self.seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        """The part of the time in which the device had nothing to do."""
        return self.waited_s / max(self.seconds, 1e-9)

    def starvation(self, workers: int, limit: CpuLimit, *, on_gpu: bool) -> str:
        """What a run that waits is told: by how much, and what would mend it."""
        busy_s = max(self.seconds - self.waited_s, 1e-9)
        readers = f"{workers} workers deliver" if workers else "reading in the main process delivers"
        cpus = f"{limit.cpus} CPUs ({limit.source})"
        # Workers read all the time; without them, the main process reads only while it waits.
        wanted = math.ceil((workers * self.seconds if workers else self.waited_s) / busy_s)
        if not on_gpu:
            advice = f"Training and reading share {cpus}: more workers would slow the steps. Ask for more CPUs, or"
        elif wanted <= limit.cpus:
            advice = f"About {wanted} workers would do, and the job has {cpus}: set data.workers={wanted}, or"
        else:
            advice = (
                f"About {wanted} workers would do, but the job has {cpus}: ask for more CPUs per task "
                "(data.workers=auto uses them all), or"
            )
        return (
            f"loading starves training: steps could take {self.clips / busy_s:.1f} clips/s, {readers} "
            f"{self.clips_per_s:.1f}; {self.wait_share:.0%} of the time is spent waiting. "
            f"{advice} resize the videos (tools/resize_videos.py)"
        )


class Clock:
    """Clips per second and the share of time spent waiting for data; warns where reading does not keep up.

    It looks at stretches of at least 20 steps and 30 s, the first of which is warm-up, and warns of more than a tenth
    of the time; again only if that share has grown by a quarter of the time.
    """

    STRETCH_STEPS, STRETCH_S = 20, 30.0

    def __init__(self, workers: int, device: torch.device, ranks: int = 1) -> None:
        self.start = time.monotonic()
        self._ranks = ranks  # that share the clips with this one
        self._workers, self._on_gpu = workers, device.type == "cuda"
        self._clips, self._waited_s = 0, 0.0
        self._before = Pace(0, 0.0, 0.0)  # this stretch
        self._steps, self._warm = 0, False
        self._tolerated_share = 0.1

    def timed(self, steps: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """The same steps; the time until each is there counts as waiting."""
        while True:
            before = time.monotonic()
            step = next(steps, None)
            if step is None:
                return
            self._waited_s += time.monotonic() - before
            self._clips += sum(len(batch.labels) for batch in step)
            yield step
            self._look()

    def pace(self) -> Pace:
        """Since the start."""
        return Pace(self._clips, time.monotonic() - self.start, self._waited_s)

    def rates(self) -> dict[str, float]:
        """`clips_per_s` and `wait_share` since the start."""
        pace = self.pace()
        return {"clips_per_s": pace.clips_per_s * self._ranks, "wait_share": pace.wait_share}

    def _look(self) -> None:
        self._steps += 1
        stretch = self.pace() - self._before
        if self._steps < self.STRETCH_STEPS or stretch.seconds < self.STRETCH_S:
            return
        if self._warm and stretch.wait_share > self._tolerated_share:
            say(stretch.starvation(self._workers, cpu_limit(), on_gpu=self._on_gpu))
            self._tolerated_share = stretch.wait_share + 0.25
        self._before, self._steps, self._warm = self.pace(), 0, True
