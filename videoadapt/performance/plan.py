"""`videoadapt plan`: predicts the step time, memory and GPU-hours of every layout of ranks before a job starts.

The times of single passes are measured on this machine, or computed from MACs and a rate (`plan.macs_per_s`).
`forecast` turns them into the time of a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from videoadapt.config.cost import backward_macs, point_macs
from videoadapt.config.load import Config
from videoadapt.data.clips.loader import steps_per_epoch
from videoadapt.data.index.manifest import Manifest, manifest_path
from videoadapt.errors import ConfigError, UserError, plural
from videoadapt.performance.memory import TrainingMemory, parameter_count, training_memory
from videoadapt.performance.timing import Stopwatch, fitted
from videoadapt.runtime.console import Bar, print_table
from videoadapt.runtime.machine import one_thread, pick_device
from videoadapt.training.forecast import (
    Forecast,
    LinearTime,
    Network,
    Passes,
    StepWork,
    best_order,
    forecast,
    groups_setting,
    layouts,
)
from videoadapt.training.groups import GroupPlan, make_plan, split_evenly
from videoadapt.training.preflight import pixels_after_resizing, try_decoding

_ROUNDS = 5  # rounds of measuring; the median of five ignores two disturbed rounds
_SHOWN = 12  # layouts in the printed table
_MIN_GAIN = 0.02  # groups must be faster by this fraction: they need more communication, and forecasts have errors
_MAX_RANKS = 4096
_MAX_LENGTHS = 6  # they have 203 partitions; ten have 115,975
_LAUNCHES_OF_A_BLOCK = 80  # in both passes: TimeSformer-B has 707 to 1,025 at a point (docs/results/step.md)
_LAUNCH_S = 5e-6  # by the host
_CLIPS_PER_GPU = 8  # TimeSformer's recipe
_WORTH_RESIZING = 0.8  # fraction of the pixels that smaller copies may have to be mentioned
_MOST_MEMORY = 0.8  # of a GPU's free memory, that measuring may take: the prediction leaves out workspaces of kernels
_CPU_MACS = 25_000_000_000  # MACs of a forward pass that takes about a second on a core, with its backward pass


@dataclass(frozen=True)
class LayoutRow:
    """One layout in the result of `plan`."""

    groups: str  # the value of `parallel.groups`
    step_s: float
    communication_s: float
    clips_per_s: float
    utilisation: float  # fraction of the ranks' time that passes take
    bytes_per_rank: int  # memory of the rank that needs most
    gpu_hours: float | None  # for all epochs; None if the clips of an epoch are unknown
    costliest_last: bool  # whether the backward pass at the costliest point comes last (`parallel.overlap`)


@dataclass(frozen=True)
class PlanSummary:
    """The result of `plan`; the names are keys of its JSON."""

    gpus: int
    device: str  # "analytic" if the times follow from MACs
    clips: int  # clips of a step
    macs_per_s: float | None  # `plan.macs_per_s`
    measured_at_clips: list[int] | None  # the two batch sizes; None if nothing was measured
    passes: dict[str, dict[str, float]]  # by point: fixed and per-clip seconds of both passes
    optimizer_s: float
    gradient_bytes: int
    clips_an_epoch: int | None
    epochs: int
    layouts: list[LayoutRow]  # fastest first
    groups_of_the_config: str | None  # None if it needs another number of ranks
    recommended: str
    why: str
    floor_s: float | None  # time of the launches of a step without groups; None if it is part of the measured times
    notes: list[str]  # on the batch, the learning rate, the order of backward passes, and decoding


def plan(config: Config, gpus: int) -> PlanSummary:
    """Predicts all layouts, and recommends one. Writes nothing.

    Args:
        config: The run's config.
        gpus: Number of ranks; without a GPU, processes with one core each.

    Raises:
        UserError: `gpus` is not from 1 to 4096, the model has more than six lengths, every layout has a rank without
            a clip, or an epoch has fewer clips than a step.
        ConfigError: `run.device` is not available.
    """
    _require_possible(config, gpus)
    manifest = _manifest(config)
    clips_an_epoch = _clips_an_epoch(config, manifest)
    device, rate = pick_device(config.run.device), config.plan.macs_per_s
    memory = training_memory(config, device, as_on_gpu=rate is not None)
    sizes = _sizes(config, gpus, device, memory)
    passes, optimizer_s = (analytic_passes(config), 0.0) if rate else _measured(config, sizes)
    work = work_of(config, passes, optimizer_s)
    # A rate describes GPUs, even if the machine that plans has none.
    network = Network(config.plan.bandwidth_gbps * 1e9 / 8, overlaps=device.type == "cuda" or rate is not None)
    plans = [each for each in layouts(work, gpus) if len(each.groups) == 1 or not config.model.shares_stem]
    if not plans:
        raise _too_many_ranks(config, gpus)
    # Stable: the layout without groups comes first among equals.
    # With `run.deterministic` the order stays, as in training.
    predict = best_order if config.parallel.overlap == "auto" and not config.run.deterministic else forecast
    forecasts = sorted(
        (_above_floor(predict(each, work, network), config, work) for each in plans), key=lambda f: f.step_s
    )
    best = recommended(forecasts)
    rows = [_layout_row(each, work, memory, config, clips_an_epoch) for each in forecasts]
    chosen = rows[forecasts.index(best)]
    notes = [
        *_batch_notes(config, gpus),
        *_overlap_notes(config, best.plan, work, network, memory),
        *(_decoding_notes(config, manifest, chosen, best, gpus) if manifest else []),
    ]
    return PlanSummary(
        gpus=gpus,
        device="analytic" if rate else device.type,
        clips=work.clips,
        macs_per_s=rate,
        measured_at_clips=None if rate else list(sizes),
        passes={point: _pass_row(each) for point, each in passes.items()},
        optimizer_s=optimizer_s,
        gradient_bytes=work.gradient_bytes,
        clips_an_epoch=clips_an_epoch,
        epochs=config.train.epochs,
        layouts=rows,
        groups_of_the_config=_groups_of_config(config, gpus),
        recommended=groups_setting(best.plan),
        why=reason_for(best, forecasts),
        floor_s=_floor_s(config, work, [config.model.points]) if rate else None,
        notes=notes,
    )


def _require_possible(config: Config, gpus: int) -> None:
    """Raises UserError for what would take minutes to find out: before passes are measured and layouts compared."""
    if not 1 <= gpus <= _MAX_RANKS:
        raise UserError(f"--gpus: expected 1 to {_MAX_RANKS}, got {gpus}")
    if len(config.model.lengths) > _MAX_LENGTHS:
        raise UserError(
            f"model.points: {len(config.model.lengths)} lengths; plan compares all ways to group them, and that of at "
            f"most {_MAX_LENGTHS}"
        )
    units = config.train.micro_batch // (2 if config.data.mixes else 1)
    if gpus > units * len(config.model.lengths):  # even with a group for each length
        raise _too_many_ranks(config, gpus)


def _too_many_ranks(config: Config, gpus: int) -> UserError:
    return UserError(
        f"--gpus: {plural(gpus, 'rank')}, but a micro-batch has only "
        f"{plural(config.train.micro_batch, 'clip')} "
        "(train.batch / train.accumulate); take fewer ranks, or raise train.batch"
    )


def analytic_passes(config: Config) -> dict[str, Passes]:
    """Returns passes by point that run at `plan.macs_per_s` and have no fixed cost.

    In the layers that are trained, a backward pass has twice the MACs of a forward pass. With
    `train.activation_checkpointing` it also repeats their forward pass.
    """
    rate = config.plan.macs_per_s
    assert rate is not None
    repeats = 1.5 if config.train.activation_checkpointing else 1.0
    passes = {}
    for point, macs in point_macs(config.model).items():
        backward = repeats * backward_macs(config.model, point, config.train.freeze)
        passes[point] = Passes(LinearTime(0.0, macs / rate), LinearTime(0.0, backward / rate))
    return passes


def work_of(config: Config, passes: Mapping[str, Passes], optimizer_s: float) -> StepWork:
    """Returns the work of a step of `train.batch` clips, given the times of its passes and of the optimizer."""
    return StepWork.of(config, passes, optimizer_s, parameter_count(config))


def _sizes(config: Config, ranks: int, device: torch.device, memory: TrainingMemory) -> tuple[int, int]:
    """Returns the batch sizes to measure: the clips of a rank in a micro-batch without groups, and twice as many.

    They are fewer where so many would take minutes on a CPU, or more memory than a GPU has free.
    """
    clips = max(1, config.train.micro_batch // ranks)
    if device.type == "cpu":
        limit = 2 * _CPU_MACS // max(point_macs(config.model).values())
    else:
        limit = memory.most_clips(config.model.points, int(_MOST_MEMORY * torch.cuda.mem_get_info(device)[0]))
    many = max(2, min(2 * clips, limit))
    return many // 2, many


def _measured(config: Config, sizes: tuple[int, int]) -> tuple[dict[str, Passes], float]:
    torch.manual_seed(config.run.seed)
    # One thread, because a rank without a GPU has one core.
    with one_thread(), Bar("plan: measuring passes", total=1 + _ROUNDS, unit="rounds") as bar:
        stopwatch, rounds = Stopwatch(config, sizes), []
        for _ in range(1 + _ROUNDS):
            rounds.append(stopwatch.measure())
            bar.step()
    return fitted(rounds[1:], sizes)  # without the warm-up


def _clips_an_epoch(config: Config, manifest: Manifest | None) -> int | None:
    """Returns the clips of an epoch, None without `plan.clips` and manifest. Raises UserError if they fill no step."""
    clips = config.plan.clips
    if clips is None and manifest is not None:
        steps_per_epoch(manifest, config)  # raises, as training does
        return len(manifest.split("train").readable)
    if clips is not None and clips < config.train.batch:
        raise UserError(f"plan.clips: {plural(clips, 'clip')} an epoch, fewer than a step of train.batch; lower it")
    return clips


def _manifest(config: Config) -> Manifest | None:
    path = manifest_path(config.run.dir)
    return Manifest.load(path) if path.exists() else None


def _floor_s(config: Config, work: StepWork, groups: Sequence[Sequence[str]]) -> float:
    """Returns the time that the launches of a step take, however few clips a rank has; the mean over draws.

    Args:
        config: The config.
        work: Gives the draws.
        groups: The points of each group. Groups launch at the same time, so that the one with most points counts.
    """
    points = sum(p * max(len({*draw} & {*group}) for group in groups) for draw, p in work.draws.items())
    return points * config.model.depth * _LAUNCHES_OF_A_BLOCK * config.train.accumulate * _LAUNCH_S


def _above_floor(each: Forecast, config: Config, work: StepWork) -> Forecast:
    """Returns a forecast from MACs whose step takes at least its launches; measured times contain them."""
    if not config.plan.macs_per_s:
        return each
    step_s = max(each.step_s, _floor_s(config, work, [group.points for group in each.plan.groups]))
    return replace(each, step_s=step_s, utilisation=each.utilisation * each.step_s / step_s)


def _batch_notes(config: Config, gpus: int) -> list[str]:
    """Returns how many clips a GPU has; for videos, also a batch and a learning rate near TimeSformer's recipe."""
    note = f"train.batch={config.train.batch} is {config.train.batch / gpus:g} clips for each GPU without groups"
    unit = config.train.accumulate * (2 if config.data.mixes else 1)  # micro-batches have whole clips, or pairs
    batch = unit * math.ceil(_CLIPS_PER_GPU * gpus / unit)
    if config.model.num_frames == 1 or batch == config.train.batch:
        return [note]
    lr = config.train.lr * batch / config.train.batch
    return [
        f"{note}; with {batch / gpus:g} (TimeSformer has {_CLIPS_PER_GPU}): train.batch={batch} train.lr={lr:.3g} by "
        "the linear rule (learning rate in proportion to the batch), with train.warmup_epochs=1 or more; not tried here"
    ]


def _overlap_notes(
    config: Config, plan: GroupPlan, work: StepWork, network: Network, memory: TrainingMemory
) -> list[str]:
    """Returns what `parallel.overlap: auto` gains and takes in a layout; nothing if no rank has an order to choose."""
    if plan.ranks == 1 or all(len(group.points) == 1 for group in plan.groups):
        return []
    usual, other = (
        _above_floor(forecast(plan, work, network, costliest_last=last), config, work) for last in (False, True)
    )
    usual_gib, other_gib = (bytes_per_rank(each, work, memory) / (1 << 30) for each in (usual, other))
    chosen = best_order(plan, work, network).costliest_last and not config.run.deterministic
    return [
        f"With the backward pass of the costliest point last, a step takes {1000 * other.step_s:.1f} instead of "
        f"{1000 * usual.step_s:.1f} ms, and a rank {other_gib:.2f} instead of {usual_gib:.2f} GiB: "
        f"parallel.overlap=auto {'would choose' if chosen else 'would not choose'} it"
    ]


def _decoding_notes(config: Config, manifest: Manifest, row: LayoutRow, layout: Forecast, gpus: int) -> list[str]:
    """Returns how many cores a GPU needs to decode for the recommended layout, and what smaller files would gain."""
    rate, error = try_decoding(config, manifest)
    if not rate:
        return [f"decoding: not measured ({error or 'the manifest has no train video that can be read'})"]
    times = len(layout.plan.groups) if config.parallel.decode == "own" else 1  # that each clip is decoded
    cores = row.clips_per_s * times / gpus / rate
    notes = [
        f"decoding: a core of this machine reads {rate:.1f} clips/s of the run's files, so each GPU needs {cores:.1f} "
        "cores for it, and one for the main process (slurm.cpus_per_task)"
    ]
    if (left := pixels_after_resizing(manifest, config)) < _WORTH_RESIZING:
        notes.append(
            f"tools/resize_videos.py would leave {left:.0%} of the pixels, and about as much of the time of decoding"
        )
    return notes


def _groups_of_config(config: Config, gpus: int) -> str | None:
    try:
        return groups_setting(make_plan(config, gpus, point_macs(config.model)))  # as training makes it
    except ConfigError:  # the config's groups need another number of ranks
        return None


def _pass_row(passes: Passes) -> dict[str, float]:
    return {
        "forward_fixed_s": passes.forward.fixed_s,
        "forward_per_clip_s": passes.forward.per_clip_s,
        "backward_fixed_s": passes.backward.fixed_s,
        "backward_per_clip_s": passes.backward.per_clip_s,
    }


def _layout_row(each: Forecast, work: StepWork, memory: TrainingMemory, config: Config, clips: int | None) -> LayoutRow:
    return LayoutRow(
        groups=groups_setting(each.plan),
        step_s=each.step_s,
        communication_s=each.communication_s,
        clips_per_s=work.clips / each.step_s,
        utilisation=each.utilisation,
        bytes_per_rank=bytes_per_rank(each, work, memory),
        gpu_hours=gpu_hours(each, config, clips) if clips else None,
        costliest_last=each.costliest_last,
    )


def bytes_per_rank(each: Forecast, work: StepWork, memory: TrainingMemory) -> int:
    """Returns the memory of the rank that needs most, in bytes."""
    found = []
    for group in each.plan.groups:
        split = split_evenly(work.clips_per_micro_batch, len(group.ranks), pairs=work.pairs)
        # The rank with the most clips of the group.
        found.append(memory.bytes(group.points, max(map(len, split)), costliest_last=each.costliest_last))
    return max(found)


def gpu_hours(each: Forecast, config: Config, clips: int) -> float:
    """Returns the GPU-hours of all `train.epochs` epochs with `clips` clips each."""
    steps = clips // config.train.batch * config.train.epochs  # the loader drops the last, smaller batch
    return each.plan.ranks * steps * each.step_s / 3600


def recommended(forecasts: Sequence[Forecast]) -> Forecast:
    """Returns the fastest layout, or the layout without groups if it is slower by at most 2 %.

    A layout without groups sends neither logits nor clips, so that a small gain does not justify groups.
    """
    fastest = min(forecasts, key=lambda f: f.step_s)
    ungrouped = [f for f in forecasts if len(f.plan.groups) == 1 and f.step_s <= (1 + _MIN_GAIN) * fastest.step_s]
    return ungrouped[0] if ungrouped else fastest


def reason_for(best: Forecast, forecasts: Sequence[Forecast]) -> str:
    """Explains in one sentence why `best` is preferred to the best layout of the other kind.

    The two kinds are groups and plain data parallelism, where every rank trains every point.
    """
    grouped = len(best.plan.groups) > 1
    others = [f for f in forecasts if (len(f.plan.groups) > 1) != grouped]
    if not others:
        return "no other kind of layout is possible: groups need a length and a rank each, and every rank needs a clip"
    other = min(others, key=lambda f: f.step_s)
    gain = other.step_s / best.step_s - 1
    if grouped:
        return (
            f"groups {groups_setting(best.plan)} beat every rank training every point by {gain:.0%}: a rank runs fewer "
            f"passes over more clips (ranks are busy {best.utilisation:.0%} of a step)"
        )
    if gain > _MIN_GAIN:
        return (
            f"plain data parallelism over all points beats groups by {gain:.0%}: the best groups, "
            f"{groups_setting(other.plan)}, keep their ranks busy only {other.utilisation:.0%} of a step instead of "
            f"{best.utilisation:.0%}"
        )
    return (
        f"plain data parallelism over all points is as fast as the best groups, {groups_setting(other.plan)}, within "
        f"{_MIN_GAIN:.0%}, and sends neither logits nor clips"
    )


def print_plan(summary: PlanSummary) -> None:
    """Prints the layouts, the recommended one, and the reason."""
    rows = [
        row
        for number, row in enumerate(summary.layouts)
        # The layout without groups and the config's groups are shown too, also beyond the limit.
        if number < _SHOWN or row.groups in {"null", summary.groups_of_the_config}
    ]
    title = f"{plural(summary.gpus, 'rank')} ({summary.device}), a step of {plural(summary.clips, 'clip')}: predicted"
    columns = ("parallel.groups", "step ms", "communication ms", "clips/s", "busy %", "GPU-hours", "GiB per rank")
    print_table(title, columns, [_cells(row) for row in rows])
    print(f"Passes: {_source_of_times(summary)}; decoding is not part of a step")
    if summary.clips_an_epoch is None:
        print("GPU-hours: set plan.clips, or make the run's manifest with `videoadapt index`")
    else:
        print(f"GPU-hours: {plural(summary.epochs, 'epoch')} of {plural(summary.clips_an_epoch, 'clip')}")
    current = summary.groups_of_the_config
    if current is not None and current != summary.recommended:
        print(f"current: parallel.groups={current}")
    print(f"recommended: parallel.groups={summary.recommended}: {summary.why}")
    if summary.floor_s is not None:
        print(
            f"A step takes at least {1000 * summary.floor_s:.1f} ms without groups: the host launches each operation. "
            "Ranks whose clips take less gain nothing"
        )
    for note in summary.notes:
        print(note)


def _source_of_times(summary: PlanSummary) -> str:
    if summary.measured_at_clips is None:
        return f"computed from {summary.macs_per_s:.3g} MACs per second (plan.macs_per_s), nothing measured"
    few, many = summary.measured_at_clips
    return f"measured on this machine with {few} and {plural(many, 'clip')}, medians of {_ROUNDS} rounds"


def _cells(row: LayoutRow) -> tuple[str, ...]:
    return (
        "none" if row.groups == "null" else row.groups,
        f"{1000 * row.step_s:.1f}",
        f"{1000 * row.communication_s:.1f}",
        f"{row.clips_per_s:.1f}",
        f"{100 * row.utilisation:.0f}",
        "-" if row.gpu_hours is None else f"{row.gpu_hours:.1f}",
        f"{row.bytes_per_rank / (1 << 30):.2f}",
    )
