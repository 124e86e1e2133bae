"""Stage 1: trains one model at all its points. The loop is `run_epochs`; one pass of it is `step.train_step`."""

from __future__ import annotations

import math
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.data.clips.loader import Batch, steps_per_epoch, train_batches
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import plural
from videoadapt.model.checkpoint import Checkpoints, train_checkpoints
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.facts import require_normalisation
from videoadapt.model.weights.initial import load_initial_weights
from videoadapt.model.weights.load import load_weights
from videoadapt.model.weights.sources import source_digest
from videoadapt.runtime.console import Bar, percent, print_table, say
from videoadapt.runtime.files import write_json
from videoadapt.runtime.lease import sole_writer
from videoadapt.runtime.machine import peak_memory_bytes, pick_device, worker_count
from videoadapt.runtime.ranks import (
    agree_on_stop,
    all_gather,
    broadcast_result,
    broadcast_tensors,
    rank,
    ranks,
    stopping_together,
    world_size,
)
from videoadapt.runtime.run_config import record_config
from videoadapt.runtime.signals import StopRequest
from videoadapt.training.ddp import gradient_waits, has_foreign_statistics, share_statistics
from videoadapt.training.exchange import ClipExchange, broadcast_checkpoint
from videoadapt.training.groups import make_plan
from videoadapt.training.metrics import (
    BestCheckpoint,
    Metrics,
    PointMetrics,
    TrainSummary,
    Validation,
    best_metric,
    best_validation,
    out_of_patience,
)
from videoadapt.training.optim import make_schedule
from videoadapt.training.overlap import with_best_order
from videoadapt.training.preflight import preflight
from videoadapt.training.state import State
from videoadapt.training.step import RankRole, train_step
from videoadapt.training.step_report import Reports, StepReport
from videoadapt.training.throughput import ThroughputMeter
from videoadapt.training.tracker import open_tracker, require_tracker
from videoadapt.training.trained_clips import clips_of_weights
from videoadapt.training.utilisation import utilisation
from videoadapt.training.validate import Validator, describe, say_failed

_STEPS_SHOWN = 20  # whose mean the progress shows


def train(config: Config, after_validation: Callable[[], None] | None = None) -> TrainSummary:
    """Trains the model of a config to the end, from the run's newest checkpoint if there is one.

    The ranks of a job share the work by `parallel.groups`; the result is the same for every plan, up to rounding. All
    ranks call this function.

    Args:
        config: The config; `run.dir` receives checkpoints, `metrics.jsonl`, `skipped.jsonl` and `train.json`.
        after_validation: Called on rank 0 after each validation, whose lines are then in the files.

    Returns:
        The content of `train.json`. A finished run is not trained again.

    Raises:
        RunError: A loss is not finite (before it changes anything), another process writes into the run folder, the
            preflight finds a fault, or videos cannot be read.
        CheckpointError: The checkpoint belongs to another model, recipe or manifest.
        Stopped: Ctrl-C or SIGTERM was received; the state is saved at the end of the step.
    """
    summary_file = config.run.dir / "train.json"
    with ranks(config) as collectives, sole_writer(config, "train") as guard:
        checkpoints = train_checkpoints(config.run.dir, config.train.keep_checkpoints, guard)
        # Before indexing, which may take hours: what is cheap to refuse.
        require_tracker(config)
        plan = make_plan(config, world_size(), point_macs(config.model))
        broadcast_result(lambda: require_startable(config, checkpoints))
        manifest = broadcast_result(lambda: load_or_index(config))
        collectives.set_timeout(config.parallel.step_s)  # indexing may take hours; a step that takes hours has hung
        per_epoch = steps_per_epoch(manifest, config)
        state = start_or_resume(config, manifest, checkpoints)
        # A run that was killed between its last checkpoint and its summary still writes the summary.
        done = state.step == per_epoch * config.train.epochs or out_of_patience(state.validations, config)
        finished = done and broadcast_result(lambda: _summarises(summary_file, state.step))
        if not finished:
            say_splits(manifest, config)
            if state.step:
                say(f"continuing from {checkpoints.folder} at step {state.step}")
            rates = preflight(config, manifest, plan)
            role = RankRole.from_plan(config, state.model, plan)  # after set_timeout: it creates process groups
            role = with_best_order(role, state, rates.bytes_per_s)
            meter = run_epochs(state, role, checkpoints, per_epoch, rates.macs_per_s, after_validation=after_validation)
            own_mfu = utilisation(role.clocks, rates.macs_per_s, config)
            mfu = _report_ranks(role, meter, own_mfu, on_gpu=state.device.type == "cuda")
            if rank() == 0:
                with checkpoints.guard():
                    write_json(summary_file, _summarise(state, per_epoch, checkpoints, meter, mfu).to_json())
        summary = broadcast_result(lambda: TrainSummary.read(summary_file))
        if finished:
            # The folder may have moved since the summary was written.
            summary = replace(summary, checkpoint=str(checkpoints.folder / Path(summary.checkpoint or "").name))
            say_finished(summary)
        return summary


def say_splits(manifest: Manifest, config: Config) -> None:
    """Prints the number of readable clips of each split, and whether no stage uses those of `data.holdout`."""
    counts = {split: len(manifest.split(split).readable) for split in ("train", "holdout", "calibrate", "val")}
    say("readable clips: " + ", ".join(f"{split} {count:,}" for split, count in counts.items() if count))
    validated = config.train.validate_every and config.data.validate == "holdout"
    if counts["holdout"] and config.label.source == "train" and not validated:
        say(
            f"no stage uses the {plural(counts['holdout'], 'clip')} of data.holdout, because label.source is train: "
            "set label.source=holdout, or data.holdout=0 to train on them"
        )


def run_epochs(
    state: State,
    role: RankRole,
    checkpoints: Checkpoints,
    per_epoch: int,
    macs_per_s: float,
    *,
    after_validation: Callable[[], None] | None = None,
) -> ThroughputMeter:
    """Runs the training loop from `state.step` to the end of the last epoch.

    Args:
        state: Changed in place, step by step.
        role: The role of this rank.
        checkpoints: Where rank 0 saves, every `train.save_steps` steps and at the end.
        per_epoch: Steps of an epoch.
        macs_per_s: Of a large matrix product on this rank.
        after_validation: As in `train`.

    Returns:
        The meter, with the throughput since the start of the loop.

    Raises:
        Stopped: A rank received a signal; all ranks stop at the same step, after saving.
    """
    config = state.config
    last_step = per_epoch * config.train.epochs
    save_steps = config.train.save_steps or per_epoch
    meter = ThroughputMeter(worker_count(config.data.workers), state.device, len(role.group.ranks))
    schedule = make_schedule(state.optimizer, config.train, per_epoch)
    validator = Validator.of(state, per_epoch)
    _announce(state, role, checkpoints)
    bar = Bar("train", total=last_step * config.train.batch, unit="clips", start=state.step * config.train.batch)
    recent: deque[dict[str, float]] = deque(maxlen=_STEPS_SHOWN)
    writer = closing(_open_metrics(validator)) if rank() == 0 else nullcontext()
    with stopping_together(), writer as metrics, StopRequest() as stop, bar:
        if metrics is not None:
            meter.before_s = metrics.before_s

        def take(report: StepReport, alone: bool) -> bool:
            values = report.read(state, alone=alone)
            if metrics is not None:  # rank 0; its values are sums over all ranks
                mfu = {f"mfu/{p}": value for p, value in utilisation(role.clocks, macs_per_s, config).items()}
                times = {"seconds": round(meter.seconds(), 1)} | meter.rates() | _waits(role, meter)
                metrics.write(report.step + 1, values | times | mfu)
            recent.append(values)
            bar.step(config.train.batch, state.note(recent, meter))
            return agree_on_stop(stop, report.stop_flags)  # every rank stops if any rank received a signal

        reports = Reports(state.device, take)
        steps = meter.timed(_save_if_reading_fails(_read_steps(state, role), state, role, checkpoints, reports))
        if validator.is_due():  # the run was interrupted before or in a validation
            _validate(validator, role, checkpoints, metrics, meter, stop, bar, after_validation)
        while not out_of_patience(state.validations, config) and (micro_batches := next(steps, None)) is not None:
            schedule.step_update(state.step)  # from the step alone, so that a resumed run has the same rates
            report = train_step(state, role, micro_batches, stop)
            state.step += 1
            stopping = reports.add(report)
            if stopping or validator.is_due() or state.step % save_steps == 0 or state.step == last_step:
                stopping |= reports.take_all()  # raises if a step was bad: nothing is saved after it
                _save(state, role, checkpoints)  # before a validation: it may be interrupted, or find this one the best
            if stopping and state.step < last_step:
                say(f"stopped and saved at step {state.step} of {last_step}")
                stop.stop()
            if validator.is_due():
                _validate(validator, role, checkpoints, metrics, meter, stop, bar, after_validation)
    return meter


def _waits(role: RankRole, meter: ThroughputMeter) -> dict[str, float]:
    """Returns the fractions of the time in which this rank waited for teacher logits and for sums of gradients."""
    if world_size() == 1:
        return {}
    seconds = max(meter.since_start().seconds, 1e-9)
    teacher_s = role.teacher_logits.waits.read()[0] if role.teacher_logits else 0.0
    return {
        "teacher_wait_fraction": teacher_s / seconds,
        "gradient_wait_fraction": gradient_waits(role.module) / seconds,
    }


def _report_ranks(
    role: RankRole, meter: ThroughputMeter, mfu: Mapping[str, float], *, on_gpu: bool
) -> dict[str, float]:
    """Prints what each rank waited for and its MFU. All ranks call it. Returns the MFU by point, means over ranks."""
    waits = [meter.rates()["wait_fraction"], *_waits(role, meter).values()]
    reached = ", ".join(f"{point}: {percent(value)}" for point, value in mfu.items())
    row = (socket.gethostname(), ", ".join(role.group.points), *map(percent, waits), reached)
    rows, utilisations = zip(*all_gather((row, mfu)), strict=True)
    if rank() == 0 and len(rows) > 1:
        columns = ("rank", "node", "points", *(f"waits for {what} %" for what in ("data", "teacher", "gradients")))
        print_table("Ranks", (*columns, "MFU %"), [(number, *row) for number, row in enumerate(rows)], to_stderr=True)
    elif rank() == 0 and reached and on_gpu:
        say(f"MFU in %, by point: {reached}")
    return pd.DataFrame(list(utilisations)).mean().to_dict()


def _validate(  # noqa: PLR0917 - what the loop has
    validator: Validator,
    role: RankRole,
    checkpoints: Checkpoints,
    metrics: Metrics | None,
    meter: ThroughputMeter,
    stop: StopRequest,
    bar: Bar,
    after_validation: Callable[[], None] | None,
) -> None:
    """Validates the state that was just saved, and points `best` to its checkpoint if it is the best so far.

    Raises:
        Stopped: A rank received a signal; the continued run repeats the validation.
    """
    state, start = validator.state, time.monotonic()
    validation = validator.validate(stop, partial(bar.step, 0))
    if validation is None:
        say(f"stopped in the validation after step {state.step}, which is saved; the validation will be repeated")
        stop.stop()
    state.validations.append(validation)
    seconds = time.monotonic() - start
    if metrics is not None:  # rank 0
        metrics.write_validation(validation, seconds)
        if after_validation is not None:
            after_validation()
        say(describe(validation, seconds, state))
        say_failed(state.validations)
        if best_validation(state.validations, state.config) is validation:
            checkpoints.mark_best(state.step)
    meter.exclude(time.monotonic() - start)
    if validator.is_last():
        _save(state, role, checkpoints)  # again: now it records the last validation, too


def require_startable(config: Config, checkpoints: Checkpoints) -> None:
    """Checks the device, and that the weights of `train.init` exist and fit, if the run has not begun.

    Raises:
        ConfigError: There is no CUDA device, and the config asks for one.
        CheckpointError: The weights cannot be read, or do not fit the model.
    """
    pick_device(config.run.device)
    if config.train.init and not checkpoints.exist():
        with torch.device("meta"):  # shapes without memory: the weights themselves are loaded after indexing
            model = TimeSformer(config.model)
        report = load_weights(model, config.train.init, which=config.train.weights, resample=config.train.resample)
        require_normalisation(config.model, config.train.init, report.normalisation)


def _summarises(path: Path, step: int) -> bool:
    """Returns whether a summary exists, and is of this step: an early stop that went on has left an older one."""
    return path.exists() and TrainSummary.read(path).steps == step


def say_finished(summary: TrainSummary) -> None:
    """Prints that the run is trained already, when and where."""
    ended = f"ended {summary.ended} on {summary.host}" if summary.ended else "of an earlier version"
    say(
        f"already trained, nothing to do: {plural(summary.steps, 'step')}, {ended}, in {summary.checkpoint}. Another "
        "run.dir begins a new training"
    )


def start_or_resume(config: Config, manifest: Manifest, checkpoints: Checkpoints) -> State:
    """Returns the state of the newest checkpoint; without one, a new model, with the weights of `train.init` if set.

    Raises:
        CheckpointError: The checkpoint belongs to another model, recipe or manifest, or none can be read.
    """
    state = State.start(config, manifest)
    state.init_digest = broadcast_result(lambda: source_digest(config.train.init) if config.train.init else None)
    checkpoint = broadcast_checkpoint(checkpoints.latest)
    if checkpoint is not None:
        state.restore(checkpoint)
    elif config.train.init:
        if rank() == 0:
            load_initial_weights(state.model, config.train.init, config)
            state.initial_clips = clips_of_weights(config.train.init)  # rank 0 saves them
        broadcast_tensors(state.model.state_dict().values())
        state.reset_ema()  # otherwise the moving average would start from the random weights
    return state


def _open_metrics(validator: Validator) -> Metrics:
    """Opens the files of a run's metrics, and its tracker."""
    state, validated = validator.state, None
    if validator.videos is not None:
        validated = state.validations[-1].step if state.validations else 0
    return Metrics(state.config.run.dir, state.step, validated, open_tracker(state.config))


def _announce(state: State, role: RankRole, checkpoints: Checkpoints) -> None:
    """Writes the config into the run folder, and prints the plan of several ranks."""
    if world_size() > 1:
        say(f"{world_size()} ranks, by point: {role.plan}")
    if rank() == 0:
        with checkpoints.guard():  # raises if another process has taken over the run folder
            record_config(state.config)


def _read_steps(state: State, role: RankRole) -> Iterator[list[Batch]]:
    """Returns an iterator of this rank's micro-batches of each step, from `state.step` on."""
    config, device, exchange = state.config, state.device, None  # without an exchange, each group decodes for itself
    # With a single group, no clip is decoded twice.
    if config.parallel.decode == "shared" and len(role.plan.groups) > 1:
        exchange = ClipExchange(state.manifest, config, role.plan, pin=device.type == "cuda")
    positions = partial(role.positions, pairs=config.data.mixes)  # mixed clips stay on one rank
    return train_batches(state.manifest, config, state.step, device=device, positions=positions, exchange=exchange)


def _save_if_reading_fails(
    steps: Iterator[list[Batch]], state: State, role: RankRole, checkpoints: Checkpoints, reports: Reports
) -> Iterator[list[Batch]]:
    """Yields the same steps. If the next step cannot be read, saves the steps trained so far and raises the error.

    Saves only if this rank has the whole state: a collective is not possible here, since the other ranks may be waiting
    in a different collective. So rank 0 saves nothing if another rank fails that reads for itself.
    """
    start = state.step
    try:
        yield from steps
    except Exception:
        reports.take_all(alone=True)  # raises instead if a step was bad
        if state.step > start and not has_foreign_statistics(state.model, role.plan) and rank() == 0:
            checkpoints.save(state.step, *state.saved())
            say(f"saved at step {state.step}; run the same command again to continue")
        raise


def _save(state: State, role: RankRole, checkpoints: Checkpoints) -> None:
    """Writes a checkpoint on rank 0. All ranks call it at the same step."""
    # Share the statistics of the moving average too: it has its own buffers.
    for module in filter(None, (state.model, state.ema and state.ema.module)):
        share_statistics(module, role.plan)
    if rank() == 0:
        checkpoints.save(state.step, *state.saved())


def _summarise(
    state: State, per_epoch: int, checkpoints: Checkpoints, meter: ThroughputMeter, mfu: Mapping[str, float]
) -> TrainSummary:
    """Returns the summary of a finished run; losses and accuracies are means over the steps of the last epoch."""
    config = state.config
    # One line per step. A point has NaN in steps that do not draw it, and `mean` leaves NaN out.
    means = pd.read_json(config.run.dir / "metrics.jsonl", lines=True).tail(per_epoch).mean()
    newest = checkpoints.latest()
    rates = meter.rates()
    best = best_validation(state.validations, config)
    return TrainSummary(
        steps=state.step,
        epochs=state.step // per_epoch,
        clips=len(state.manifest.split("train").readable),
        skipped=state.skipped,
        manifest=state.manifest.hash,
        checkpoint=str(newest.path) if newest else None,
        seconds=round(meter.seconds(), 1),
        clips_per_s=round(rates["clips_per_s"], 4),
        wait_fraction=round(rates["wait_fraction"], 4),
        peak_memory_bytes=peak_memory_bytes(),
        points={
            point: PointMetrics(
                _rounded(means.get(f"loss/{point}")), _rounded(means.get(f"top1/{point}")), _rounded(mfu.get(point))
            )
            for point in config.model.points
        },
        validation=asdict(state.validations[-1]) if state.validations else None,
        validation_s=round(_validation_s(config.run.dir), 1),
        best=_describe_best(best, checkpoints, config) if best else None,
        stopped_early=state.step < per_epoch * config.train.epochs,
        ended=datetime.now().astimezone().isoformat(" ", timespec="minutes"),
        host=socket.gethostname(),
    )


def _validation_s(run: Path) -> float:
    path = run / "validation.jsonl"  # missing without validations
    return float(pd.read_json(path, lines=True).get("seconds", pd.Series(dtype=float)).sum()) if path.exists() else 0.0


def _describe_best(best: Validation, checkpoints: Checkpoints, config: Config) -> BestCheckpoint:
    metric = best_metric(config)
    value = best.value(metric)
    assert value is not None, "the best validation has a finite value"
    return BestCheckpoint(metric, value, best.epoch, best.step, best.videos, str(checkpoints.path_of(best.step)))


def _rounded(value: float | None) -> float | None:
    """Returns None for a point that was not drawn in the last epoch: its column is missing, or all NaN."""
    return None if value is None or math.isnan(value) else round(value, 4)
