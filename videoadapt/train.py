"""Stage 1: one model at all its points. The loop is here.

Each step the costliest point learns the truth, and its detached logits teach the others on the same clips; the
gradients of all points add up and the optimizer moves once (ReViT, section 3.4).
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from videoadapt import losses
from videoadapt.checkpoint import Checkpoint, Checkpoints, fill, require_same, train_checkpoints
from videoadapt.config import Config, dump_config
from videoadapt.data.datasets import Failure
from videoadapt.data.loader import Batch, TrainLoader, steps_per_epoch
from videoadapt.data.manifest import Manifest, load_or_index
from videoadapt.data.sampling import seed_of
from videoadapt.data.transforms import mix, normalise
from videoadapt.errors import RunError
from videoadapt.log import Bar, Metrics, say, write_json
from videoadapt.model.timesformer import Heads, TimeSformer
from videoadapt.model.weights import load_weights
from videoadapt.optim import make_optimizer, make_schedule
from videoadapt.runtime import StopRequest, peak_memory_bytes, pick_device, precision_dtype


def train(config: Config) -> dict[str, Any]:
    """Trains the model of a config to the end, going on from the run's newest checkpoint if it has one.

    Ctrl-C and SIGTERM save at the next step and raise `KeyboardInterrupt`. Raises `RunError` for a loss that is not
    finite, before anything is changed by it.
    """
    manifest = load_or_index(config)
    per_epoch = steps_per_epoch(manifest, config)
    checkpoints = train_checkpoints(config.run.dir, config.train.keep_checkpoints)
    state = State.start(config, manifest)
    found = checkpoints.latest()
    if found is not None:
        state.restore(found)
    elif config.train.init:
        say(str(load_weights(state.model, config.train.init)))
        state.reset_ema()
    (config.run.dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    clock = Clock()
    if state.step < per_epoch * config.train.epochs:
        _loop(state, per_epoch, checkpoints, clock)
    summary = _summary(state, per_epoch, checkpoints, clock)
    write_json(config.run.dir / "train.json", summary)
    return summary


def _loop(state: State, per_epoch: int, checkpoints: Checkpoints, clock: Clock) -> None:
    config = state.config
    total = per_epoch * config.train.epochs
    schedule = make_schedule(state.optimizer, config.train, per_epoch)
    metrics = Metrics(config.run.dir, state.step)
    forward = torch.compile(state.model) if config.train.compile else state.model
    loader = TrainLoader(state.manifest, config)
    bar = Bar("train", total=total * config.train.batch, unit="clips", start=state.step * config.train.batch)
    with StopRequest() as stop, bar:
        for parts in _steps(loader, state.step, per_epoch, config):
            batches = clock.wait_for(parts)
            schedule.step_update(state.step)
            values = train_step(state, forward, batches)
            state.step += 1
            metrics.write(state.step, values | clock.rates())
            for failure in itertools.chain.from_iterable(batch.failures for batch in batches):
                state.skip(failure)
            bar.step(config.train.batch, state.note(values, clock))
            due = state.step % (config.train.save_steps or per_epoch) == 0
            if due or stop.requested or state.step == total:
                checkpoints.save(state.step, *state.saved())
            if stop.requested and state.step < total:
                say(f"stopped at step {state.step} of {total}; the same command goes on from there")
                raise KeyboardInterrupt
    metrics.close()


def _steps(loader: TrainLoader, step: int, per_epoch: int, config: Config) -> Iterator[Iterator[Batch]]:
    """The parts of every step that is left; nothing that lies before `step` is decoded."""
    accumulate = config.train.accumulate
    for epoch in range(step // per_epoch, config.train.epochs):
        done = step % per_epoch if epoch == step // per_epoch else 0
        batches = loader.epoch(epoch, done * accumulate)
        for _ in range(done, per_epoch):
            yield itertools.islice(batches, accumulate)


def train_step(state: State, forward: Callable[..., Heads], batches: Iterable[Batch]) -> dict[str, float]:
    """One optimizer step over the parts of a global batch. Returns loss and top-1 of each point, gradient norm, rate.

    Each part backpropagates the sum of its clips' losses over `train.batch`, so that neither accumulation nor a
    layout over ranks changes the gradient.
    """
    config, model = state.config, state.model
    model.train()
    model.activation_checkpointing = config.train.activation_checkpointing
    state.optimizer.zero_grad(set_to_none=True)
    tallies = {point: Tally() for point in config.model.points}
    for part, batch in enumerate(batches):
        if len(batch.labels):
            seed = seed_of("mix", config.run.seed, state.step, part)
            _backpropagate(batch, forward, state, tallies, seed)
    for point, tally in tallies.items():
        tally.require_finite(point, state.step)
    limit = config.train.clip_grad or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    state.optimizer.step()
    if state.ema is not None:
        state.ema.update(model)
    values = {f"loss/{point}": tally.mean("loss") for point, tally in tallies.items()}
    values |= {f"top1/{point}": tally.mean("right") for point, tally in tallies.items()}
    return values | {"grad_norm": float(norm), "lr": state.optimizer.param_groups[0]["lr"]}


def _backpropagate(
    batch: Batch, forward: Callable[..., Heads], state: State, tallies: dict[str, Tally], seed: int
) -> None:
    config, device = state.config, state.device
    data, model = config.data, config.model
    clips = normalise(batch.clips.to(device, non_blocking=True), model.mean, model.std, torch.float32)
    labels = batch.labels.to(device, non_blocking=True)
    clips, targets = mix(
        clips,
        labels,
        num_classes=model.num_classes,
        mixup=data.mixup,
        cutmix=data.cutmix,
        smoothing=config.loss.label_smoothing,
        seed=seed,
    )
    teacher: Tensor | None = None
    bf16 = config.run.precision == "bf16"
    for point in model.points:  # costliest first: it teaches the others
        with torch.autocast(device.type, precision_dtype("bf16"), enabled=bf16):
            heads = forward(clips, point, heads=True)
        loss = losses.point_loss(heads, targets, teacher, config.loss)
        (loss.sum() / config.train.batch).backward()
        logits = heads.mean().detach()
        tallies[point].add(loss.detach(), logits.argmax(-1) == labels, batch.videos)
        teacher = logits if teacher is None else teacher


@dataclass
class Tally:
    """Losses and hits of one point's clips in one step."""

    loss: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    videos: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor, right: Tensor, videos: Tensor) -> None:
        self.loss.append(loss)
        self.right.append(right.float())
        self.videos.append(videos)

    def mean(self, name: str) -> float:
        values = getattr(self, name)
        return float(torch.cat(values).mean()) if values else 0.0

    def require_finite(self, point: str, step: int) -> None:
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
        device = pick_device(config.run.device)
        torch.manual_seed(config.run.seed)
        model = TimeSformer(config.model, manifest.classes).to(device)
        state = cls(config, manifest, device, model, make_optimizer(model.named_parameters(), config.train), None)
        state.reset_ema()
        return state

    def reset_ema(self) -> None:
        if self.config.train.ema is not None:
            self.ema = ModelEmaV3(self.model, decay=self.config.train.ema)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the rest of a checkpoint."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                if value is not None:
                    tensors[f"optimizer/{names[id(parameter)]}/{key}"] = torch.as_tensor(value)
        if self.ema is not None:
            tensors |= {f"ema/{name}": t for name, t in self.ema.module.state_dict().items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        meta = {name: section for name, section in self.config.model_dump(mode="json").items()}
        return tensors, meta | {
            "classes": list(self.manifest.classes),
            "manifest": self.manifest.hash,
            "skipped": self.skipped,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on exactly where a checkpoint was made. Raises `CheckpointError` for another architecture or run."""
        for name, free in RESUME_FREELY.items():
            require_same(checkpoint.path, getattr(self.config, name), checkpoint.meta[name], name, free=free)
        fill(self.model, checkpoint.part("model"), checkpoint.path)
        parameters = dict(self.model.named_parameters())
        for name, value in checkpoint.part("optimizer").items():
            parameter_name, _, key = name.rpartition("/")
            parameter = parameters[parameter_name]
            device = "cpu" if key == "step" else parameter.device
            self.optimizer.state[parameter][key] = value.to(device)
        if self.ema is not None:
            fill(self.ema.module, checkpoint.part("ema"), checkpoint.path)
        torch.set_rng_state(checkpoint.tensors["random/cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.tensors["random/cuda"], self.device)
        self.step, self.skipped = checkpoint.meta["step"], checkpoint.meta["skipped"]
        say(f"going on from {checkpoint.path} at step {self.step}")

    def skip(self, failure: Failure) -> None:
        """Counts and lists a video that failed; nothing takes its place."""
        self.skipped += 1
        with (self.config.run.dir / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "path": failure.path, "cause": failure.cause}) + "\n")

    def note(self, values: dict[str, float], clock: Clock) -> str:
        points = self.config.model.points
        top1 = "/".join(f"{values[f'top1/{p}']:.2f}" for p in points)
        rates = clock.rates()
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return (
            f"{rates['clips_per_s']:.1f} clips/s, {rates['wait_share']:.0%} waiting for data, "
            f"loss {values[f'loss/{points[0]}']:.2f}, top-1 {top1}{skipped}"
        )


# what may differ between a run and its continuation without changing what it computes
RESUME_FREELY: dict[str, tuple[str, ...]] = {
    "model": (),
    "loss": (),
    "train": ("init", "activation_checkpointing", "compile", "save_steps", "keep_checkpoints"),
    "data": ("root", "train", "val", "classes", "reader", "workers", "timeout_s"),
}


class Clock:
    """Clips per second and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.waited = 0.0
        self.clips = 0

    def wait_for(self, parts: Iterator[Batch]) -> list[Batch]:
        before = time.monotonic()
        batches = list(parts)
        self.waited += time.monotonic() - before
        self.clips += sum(len(batch.labels) for batch in batches)
        return batches

    def rates(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.start, 1e-9)
        return {"clips_per_s": self.clips / seconds, "wait_share": self.waited / seconds}


def _summary(
    state: State, per_epoch: int, checkpoints: Checkpoints, clock: Clock
) -> dict[str, Any]:
    config = state.config
    lines = pd.read_json(config.run.dir / "metrics.jsonl", lines=True).tail(per_epoch).mean()
    newest = checkpoints.latest()
    return {
        "steps": state.step,
        "epochs": config.train.epochs,
        "clips": len(state.manifest.split("train").readable),
        "skipped": state.skipped,
        "manifest": state.manifest.hash,
        "checkpoint": str(newest.path) if newest else None,
        "seconds": round(time.monotonic() - clock.start, 1),
        **{key: round(value, 4) for key, value in clock.rates().items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "points": {
            point: {"loss": round(lines[f"loss/{point}"], 4), "top1": round(lines[f"top1/{point}"], 4)}
            for point in config.model.points
        },
    }
