"""Values that change from step to step: the state that checkpoints hold, and the sums behind each step's metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import Failure
from videoadapt.data.clips.loader import steps_per_epoch
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import CheckpointError, plural, shown
from videoadapt.model.checkpoint import Checkpoint, load_tensors, optimizer_tensors, require_same, restore_optimizer
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.console import percent
from videoadapt.runtime.machine import pick_device, use_deterministic_operations
from videoadapt.training.freeze import freeze
from videoadapt.training.losses import balanced_weights
from videoadapt.training.metrics import Validation
from videoadapt.training.optim import make_optimizer
from videoadapt.training.throughput import ThroughputMeter
from videoadapt.training.trained_clips import INITIAL, TENSOR, clip_keys, clips_of_weights

# The keys that may differ between a run and its continuation, by section: they do not change the results.
RESUME_FREELY: dict[str, tuple[str, ...]] = {
    "run": ("dir", "device", "checkpoint", "deterministic"),
    "model": (),
    "loss": (),
    "train": (
        *("init", "activation_checkpointing", "compile", "save_steps", "keep_checkpoints"),
        *("validate_every", "patience", "tracker"),  # a run that was stopped too early goes on with more patience
    ),
    "data": ("root", "train", "val", "validate", "classes", "reader", "workers", "timeout_s"),
}


@dataclass
class Tally:
    """The losses and correct predictions of one point in one step, one tensor per micro-batch."""

    loss: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    videos: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor, right: Tensor, videos: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            loss: The loss of each clip, (B,).
            right: Whether the prediction is correct, (B,) bool.
            videos: Manifest rows, (B,) int64 on the host.
        """
        # Tensors are collected and not read: reading would make the host wait for the GPU in every micro-batch.
        self.loss.append(loss)
        self.right.append(right.float())
        self.videos.append(videos)

    def sums(self) -> Tensor:
        """Returns the sum of the losses, the number of correct clips, and the number of clips: (3,) float64."""
        loss, right = torch.cat(self.loss).double(), torch.cat(self.right).double()  # (clips of the step,)
        return torch.stack([loss.sum(), right.sum(), loss.new_full((), len(loss))])

    def bad_rows(self) -> list[int]:
        """Returns the manifest rows of the clips whose loss is NaN or infinite."""
        if not self.loss:
            return []
        bad = ~torch.isfinite(torch.cat(self.loss)).cpu()
        rows: list[int] = torch.cat(self.videos)[bad].tolist()
        return rows


def _validations_of(checkpoint: Checkpoint) -> list[Validation]:
    """Returns the validations that a checkpoint records; none if an older version wrote it."""
    if "validations" not in checkpoint.meta:
        return []
    try:
        return [Validation(**record) for record in checkpoint.value("validations", list)]
    except TypeError:
        raise CheckpointError(f"{checkpoint.path}: its header has no valid validations; name another one") from None


@dataclass
class State:
    """Everything that a step changes and a checkpoint holds."""

    config: Config
    manifest: Manifest
    device: torch.device
    model: TimeSformer
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None  # moving average of the weights, with `train.ema`
    step: int = 0  # steps done
    skipped: int = 0  # clips that could not be read, over all ranks
    validations: list[Validation] = field(default_factory=list)  # in order; they decide the best and the early stop
    initial_clips: Tensor = field(default_factory=lambda: clips_of_weights(None))  # that `train.init` was trained on
    init_digest: str | None = None  # `source_digest` of `train.init` at the beginning; None for a timm model

    @cached_property
    def trained_clips(self) -> Tensor:
        """What a checkpoint records of the clips of the train split, sorted int64; see `trained_clips.py`."""
        return clip_keys(self.manifest)

    @cached_property
    def order(self) -> str:
        """64 hex digits that identify the order of the train videos, from which the order of each epoch is drawn."""
        videos = self.manifest.split("train").readable["video"]
        return hashlib.sha256("\n".join(videos).encode()).hexdigest()

    @cached_property
    def class_weights(self) -> Tensor | None:
        """Weights of the classes, (classes,) on the model's device; None with `loss.class_weights: none`."""
        if self.config.loss.class_weights == "none":
            return None
        labels = self.manifest.split("train").readable["label"]
        return balanced_weights(labels, self.config.model.num_classes).to(self.device)

    @classmethod
    def start(cls, config: Config, manifest: Manifest) -> State:
        """Returns the state before the first step, with a model initialised from `run.seed`, on its device."""
        device = pick_device(config.run.device)
        if config.run.deterministic:
            use_deterministic_operations()
        torch.manual_seed(config.run.seed)
        model = TimeSformer(config.model, manifest.classes).to(device)
        freeze(model, config.train.freeze)
        state = cls(config, manifest, device, model, make_optimizer(model.named_parameters(), config.train), None)
        state.reset_ema()
        return state

    def reset_ema(self) -> None:
        """Restarts the moving average from the current weights, if the config has one."""
        if self.config.train.ema is not None:
            self.ema = ModelEmaV3(self.model, decay=self.config.train.ema)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the content of a checkpoint: tensors by name, and the rest, which becomes JSON."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.model, self.optimizer)
        if self.ema is not None:
            tensors |= {f"ema/{name}": t for name, t in self.ema.module.state_dict().items()}
        tensors[TENSOR] = self.trained_clips
        if len(self.initial_clips):
            tensors[INITIAL] = self.initial_clips
        return tensors, self.config.model_dump(mode="json") | {
            "classes": list(self.manifest.classes),
            "manifest": self.manifest.hash,
            "order": self.order,
            "skipped": self.skipped,
            "validations": [asdict(validation) for validation in self.validations],
            "init_digest": self.init_digest,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues exactly where a checkpoint was written.

        Raises:
            CheckpointError: The checkpoint belongs to another manifest, order of videos, model or recipe; the message
                names the keys.
        """
        manifest = checkpoint.value("manifest", str)
        if manifest != self.manifest.hash:
            raise CheckpointError(
                f"{checkpoint.path}: was trained on manifest {manifest[:40]}, but the lists or files now "
                f"give manifest {self.manifest.hash}; training could not continue with the same clips. Use another "
                "run.dir"
            )
        # Checkpoints of earlier versions have none: then the order is taken on trust, as it was.
        # Without steps left, it decides nothing any more.
        left = checkpoint.value("step", int) < steps_per_epoch(self.manifest, self.config) * self.config.train.epochs
        if left and checkpoint.meta.get("order", self.order) != self.order:
            raise CheckpointError(
                f"{checkpoint.path}: was trained on the same videos in another order, from which other clips would "
                "follow for the steps that are left; give the lists their order of before, or use another run.dir"
            )
        for name, free in RESUME_FREELY.items():
            require_same(checkpoint.path, getattr(self.config, name), checkpoint.value(name, dict), name, free=free)
        self._require_same_init(checkpoint)
        load_tensors(self.model, checkpoint.tensors_under("model"), checkpoint.path)
        restore_optimizer(self.model, self.optimizer, checkpoint)
        if self.ema is not None:
            load_tensors(self.ema.module, checkpoint.tensors_under("ema"), checkpoint.path)
        self.step, self.skipped = checkpoint.value("step", int), checkpoint.value("skipped", int)
        self.validations = _validations_of(checkpoint)
        # A checkpoint of an earlier version has none; then the file of `train.init`, if it is still there, tells.
        found = checkpoint.tensors.get(INITIAL)
        self.initial_clips = clips_of_weights(self.config.train.init) if found is None else found

    def _require_same_init(self, checkpoint: Checkpoint) -> None:
        """Checks that `train.init` is what the run began with. The file may have moved, or be gone by now."""
        now, then = self.config.train.init, checkpoint.value("train", dict).get("init")
        recorded = checkpoint.meta.get("init_digest")  # None in checkpoints of earlier versions, and for a timm model
        if now is not None and self.init_digest is not None and isinstance(recorded, str):
            same, change = self.init_digest == recorded, "has another content"
        else:
            same, change = Path(now or "").name == Path(str(then or "")).name, "is another one"
        if not same:
            raise CheckpointError(
                f"{checkpoint.path}: train.init: the run began with {shown(then)}, and the config names {shown(now)}, "
                f"which {change}; initial weights have no effect on a run that has begun. Use another run.dir, or the "
                "earlier train.init"
            )
        self.init_digest = recorded if isinstance(recorded, str) else self.init_digest

    def list_skipped(self, step: int, failures: Iterable[Failure]) -> None:
        """Appends the clips that could not be read in a step to `skipped.jsonl`."""
        lines = [{"step": step, "path": failure.path, "cause": failure.cause} for failure in failures]
        if not lines:
            return
        with (self.config.run.dir / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def note(self, recent: Sequence[dict[str, float]], meter: ThroughputMeter) -> str:
        """Returns the text that the progress bar shows: means over recent steps, whose values `StepReport.read` has.

        One step has few clips, so that its own loss and accuracy are mostly chance.
        """

        def mean(name: str) -> float:
            return fmean(values[name] for values in recent if name in values)

        points = [point for point in self.config.model.points if any(f"top1/{point}" in values for values in recent)]
        top1 = "/".join(percent(mean(f"top1/{p}")) for p in points)
        means = f"loss {mean(f'loss/{points[0]}'):.2f}, top-1 {top1} %" if points else "no clip could be read"
        rates = meter.rates()
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return (
            f"{rates['clips_per_s']:.1f} clips/s, {rates['wait_fraction']:.0%} waiting for data, "
            f"last {plural(len(recent), 'step')} at {'/'.join(points)}: {means}{skipped}"
        )
