"""Stage 1: one model at all its points. The loop is here.

Each step the costliest point learns the truth, and its detached logits teach the others on the same clips; the
gradients of all points add up and the optimizer moves once (ReViT, section 3.4).
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from videoadapt import losses
from videoadapt.checkpoint import Checkpoints, train_checkpoints
from videoadapt.config import Config, dump_config
from videoadapt.data.loader import Batch, steps_per_epoch, train_batches
from videoadapt.data.manifest import load_or_index
from videoadapt.data.sampling import seed_of
from videoadapt.data.transforms import mix, normalise
from videoadapt.errors import RunError, UserError
from videoadapt.log import Bar, Metrics, say, write_json
from videoadapt.model.timesformer import Heads
from videoadapt.model.weights import load_weights
from videoadapt.optim import make_schedule
from videoadapt.runtime import StopRequest, peak_memory_bytes, precision_dtype, worker_count
from videoadapt.state import Clock, State, Tally


def train(config: Config) -> dict[str, Any]:
    """Trains the model of a config to the end, going on from the run's newest checkpoint if it has one.

    Ctrl-C and SIGTERM save at the next step and raise `KeyboardInterrupt`. Raises `RunError` for a loss that is not
    finite, before anything is changed by it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("train: runs in one process, but torchrun started several (WORLD_SIZE); start one")
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
    clock = Clock(worker_count(config.data.workers), state.device)
    finished = config.run.dir / "train.json"
    if state.step == per_epoch * config.train.epochs and finished.exists():
        done: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return done
    _loop(state, per_epoch, checkpoints, clock)
    summary = _summary(state, per_epoch, checkpoints, clock)
    write_json(finished, summary)
    return summary


def _loop(state: State, per_epoch: int, checkpoints: Checkpoints, clock: Clock) -> None:
    config = state.config
    total = per_epoch * config.train.epochs
    schedule = make_schedule(state.optimizer, config.train, per_epoch)
    forward = torch.compile(state.model) if config.train.compile else state.model
    steps = train_batches(state.manifest, config, state.step, device=state.device)
    bar = Bar("train", total=total * config.train.batch, unit="clips", start=state.step * config.train.batch)
    with StopRequest() as stop, closing(Metrics(config.run.dir, state.step)) as metrics, bar:
        for batches in clock.timed(_saved_if_reading_fails(steps, state, checkpoints)):
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


def _saved_if_reading_fails(
    steps: Iterator[list[Batch]], state: State, checkpoints: Checkpoints
) -> Iterator[list[Batch]]:
    """The same steps. Where the next one cannot be read, what was trained until then is saved first."""
    begun = state.step
    try:
        yield from steps
    except Exception:
        if state.step > begun:
            checkpoints.save(state.step, *state.saved())
            say(f"saved at step {state.step}; the same command goes on from there")
        raise


def train_step(state: State, forward: Callable[..., Heads], batches: Iterable[Batch]) -> dict[str, float]:
    """One optimizer step over the parts of a global batch. Returns loss and top-1 of each point, gradient norm, rate.

    Each part backpropagates the sum of its clips' losses over `train.batch`, so that accumulation does not change the
    gradient (mixup and cutmix apart: they pair clips within a part).
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
    if not torch.isfinite(norm):
        raise RunError(
            f"step {state.step}: the gradient is not finite though the losses are; nothing was changed by this step. "
            "Lower train.lr, or set run.precision=fp32"
        )
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
    clips, labels = normalise(batch.clips, model.mean, model.std, torch.float32), batch.labels
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


def _summary(state: State, per_epoch: int, checkpoints: Checkpoints, clock: Clock) -> dict[str, Any]:
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
