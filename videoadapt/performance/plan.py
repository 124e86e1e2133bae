"""`plan`: before a job is started, how long its steps would take in each layout of ranks, and what it would cost.

Times of passes are measured on this machine, or follow from MACs and a rate; `forecast` makes steps of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import ConfigError, UserError
from videoadapt.performance.forecast import (
    Forecast,
    LinearTime,
    Network,
    Passes,
    StepWork,
    forecast,
    groups_setting,
    layouts,
)
from videoadapt.performance.memory import Memory, parameter_count, training_memory
from videoadapt.performance.timing import Stopwatch, fitted
from videoadapt.runtime.console import Bar, print_table
from videoadapt.runtime.files import write_json
from videoadapt.runtime.machine import pick_device
from videoadapt.training.draws import possible_draws
from videoadapt.training.groups import make_plan, split_evenly

_ROUNDS = 5  # of measuring
_SHOWN = 12  # layouts in the table
_ALIKE = 0.02  # a layout has to be so much faster to be worth groups
_FLOAT_BYTES = 4
_CPU_MACS = 25_000_000_000  # of a forward pass, in a second with its backward pass


def analytic_passes(config: Config) -> dict[str, Passes]:
    """Passes at `plan.macs_per_s`; a backward pass has twice the MACs of a forward pass.

    With `train.activation_checkpointing` it computes the forward pass again before.
    """
    rate = config.plan.macs_per_s
    assert rate is not None
    backward = 3 if config.train.activation_checkpointing else 2
    macs = point_macs(config.model)
    return {point: Passes(LinearTime(0.0, n / rate), LinearTime(0.0, backward * n / rate)) for point, n in macs.items()}


def work_of(config: Config, passes: Mapping[str, Passes], optimizer_s: float) -> StepWork:
    """A step of `train.batch` clips."""
    return StepWork(
        passes,
        possible_draws(config.model.points, config.train.draw),
        optimizer_s,
        gradient_bytes=_FLOAT_BYTES * parameter_count(config),
        logits_bytes=_FLOAT_BYTES * config.model.num_classes,
        clips=config.train.batch,
        parts=config.train.accumulate,
        pairs=config.data.mixes,
    )


def plan(config: Config, gpus: int) -> dict[str, Any]:
    """Forecasts of all layouts on so many ranks, fastest first, and the one to take; what `plan.json` in the run holds.

    `gpus` are ranks: without a GPU, processes with a core each. Raises `UserError` where no layout gives each rank a
    clip, `ConfigError` where `run.device` is not there.
    """
    if gpus < 1:
        raise UserError(f"--gpus: expected 1 or more, got {gpus}")
    device = pick_device(config.run.device)
    sizes = _sizes(config, gpus, device)
    passes, optimizer_s = (analytic_passes(config), 0.0) if config.plan.macs_per_s else _measured(config, sizes)
    work = work_of(config, passes, optimizer_s)
    # A rate is given for GPUs that need not be here.
    overlaps = device.type == "cuda" or config.plan.macs_per_s is not None
    network = Network(config.plan.bandwidth_gbps * 1e9 / 8, overlaps)
    plans = layouts(work, gpus)
    if not plans:
        raise UserError(
            f"--gpus: {gpus} ranks, but a step has only {work.clips_of_part} clips at once (train.batch / "
            "train.accumulate); take fewer ranks, or raise train.batch"
        )
    forecasts = sorted((forecast(each, work, network) for each in plans), key=lambda f: f.step_s)
    best = recommended(forecasts)
    clips = config.plan.clips or _manifest_clips(config)
    memory = training_memory(config, device)
    result = {
        "gpus": gpus,
        "device": "analytic" if config.plan.macs_per_s else device.type,
        "clips": work.clips,
        "macs_per_s": config.plan.macs_per_s,
        "measured_at_clips": None if config.plan.macs_per_s else list(sizes),
        "passes": {point: _pass_row(each) for point, each in passes.items()},
        "optimizer_s": optimizer_s,
        "gradient_bytes": work.gradient_bytes,
        "clips_an_epoch": clips,
        "epochs": config.train.epochs,
        "layouts": [
            _row(each, work, memory) | {"gpu_hours": gpu_hours(each, config, clips) if clips else None}
            for each in forecasts
        ],
        "groups_of_the_config": _configured(config, gpus, work),
        "recommended": groups_setting(best.plan),
        "why": reason_for(best, forecasts),
    }
    write_json(config.run.dir / "plan.json", result)
    return result


def _sizes(config: Config, ranks: int, device: torch.device) -> tuple[int, int]:
    """Few and many clips of a pass: a rank's share of a step and twice that; on a CPU no more than a second's work."""
    share = max(1, config.train.batch // config.train.accumulate // ranks)
    if device.type == "cpu":
        share = min(share, max(1, _CPU_MACS // max(point_macs(config.model).values())))
    return share, 2 * share


def _measured(config: Config, sizes: tuple[int, int]) -> tuple[dict[str, Passes], float]:
    torch.manual_seed(config.run.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a rank without a GPU is a core
    stopwatch, rounds = Stopwatch(config, sizes), []
    with Bar("plan: measuring passes", total=1 + _ROUNDS, unit="rounds") as bar:
        for _ in range(1 + _ROUNDS):
            rounds.append(stopwatch.measure())
            bar.step()
    torch.set_num_threads(threads)
    return fitted(rounds[1:], sizes)


def _manifest_clips(config: Config) -> int | None:
    path = config.run.dir / "manifest.parquet"
    return len(Manifest.load(path).split("train").readable) if path.exists() else None


def _configured(config: Config, gpus: int, work: StepWork) -> str | None:
    """The layout that `parallel.groups` gives now; none if it needs another number of ranks."""
    costs = {point: each.seconds(1) for point, each in work.passes.items()}
    try:
        return groups_setting(make_plan(config, gpus, costs))
    except ConfigError:
        return None


def _pass_row(passes: Passes) -> dict[str, float]:
    return {
        "forward_fixed_s": passes.forward.fixed_s,
        "forward_per_clip_s": passes.forward.per_clip_s,
        "backward_fixed_s": passes.backward.fixed_s,
        "backward_per_clip_s": passes.backward.per_clip_s,
    }


def _row(each: Forecast, work: StepWork, memory: Memory) -> dict[str, Any]:
    shares = {
        group: max(map(len, split_evenly(work.clips_of_part, len(group.ranks), pairs=work.pairs)))
        for group in each.plan.groups
    }
    return {
        "groups": groups_setting(each.plan),
        "step_s": each.step_s,
        "communication_s": each.communication_s,
        "clips_per_s": work.clips / each.step_s,
        "utilisation": each.utilisation,
        "bytes_per_rank": max(memory.bytes(group.points, clips) for group, clips in shares.items()),
    }


def gpu_hours(each: Forecast, config: Config, clips: int) -> float:
    """Of all epochs, of so many clips."""
    steps = clips // config.train.batch * config.train.epochs
    return each.plan.ranks * steps * each.step_s / 3600


def recommended(forecasts: Sequence[Forecast]) -> Forecast:
    """The fastest layout; no groups where they are slower by a little only, for they send neither logits nor clips."""
    fastest = min(forecasts, key=lambda f: f.step_s)
    plain = [f for f in forecasts if len(f.plan.groups) == 1 and f.step_s <= (1 + _ALIKE) * fastest.step_s]
    return plain[0] if plain else fastest


def reason_for(best: Forecast, forecasts: Sequence[Forecast]) -> str:
    """A sentence: why this layout and not the best of the other kind."""
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
    if gain > _ALIKE:
        return (
            f"plain data parallelism over all points beats groups by {gain:.0%}: the best of them, "
            f"{groups_setting(other.plan)}, keeps its ranks busy only {other.utilisation:.0%} of a step instead of "
            f"{best.utilisation:.0%}"
        )
    return (
        f"plain data parallelism over all points is as fast as the best groups, {groups_setting(other.plan)}, within "
        f"{_ALIKE:.0%}, and sends neither logits nor clips"
    )


def print_plan(result: dict[str, Any]) -> None:
    """The layouts, the recommended one, and why."""
    shown = [
        row
        for number, row in enumerate(result["layouts"])
        if number < _SHOWN or row["groups"] in {"null", result["groups_of_the_config"]}
    ]
    title = f"{result['gpus']} ranks ({result['device']}), a step of {result['clips']} clips: predicted"
    columns = ("parallel.groups", "step ms", "of it communication", "clips/s", "busy %", "GPU-hours", "GiB per rank")
    print_table(title, columns, [_cells(row) for row in shown])
    print("Passes: " + _how_measured(result) + "; decoding is not part of a step")
    if result["clips_an_epoch"] is None:
        print("GPU-hours: set plan.clips, or make the run's manifest with `videoadapt index`")
    else:
        print(f"GPU-hours: {result['epochs']} epochs of {result['clips_an_epoch']} clips")
    if (own := result["groups_of_the_config"]) is not None and own != result["recommended"]:
        print(f"parallel.groups is {own} now")
    print(f"recommended: parallel.groups={result['recommended']}: {result['why']}")


def _how_measured(result: dict[str, Any]) -> str:
    if result["measured_at_clips"] is None:
        return f"MACs at {result['macs_per_s']:.3g} a second (plan.macs_per_s), nothing measured"
    few, many = result["measured_at_clips"]
    return f"measured here over {few} and {many} clips, medians of {_ROUNDS} rounds"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        "none" if row["groups"] == "null" else row["groups"],
        f"{1000 * row['step_s']:.1f}",
        f"{1000 * row['communication_s']:.1f}",
        f"{row['clips_per_s']:.1f}",
        f"{100 * row['utilisation']:.0f}",
        "-" if row["gpu_hours"] is None else f"{row['gpu_hours']:.1f}",
        f"{row['bytes_per_rank'] / (1 << 30):.2f}",
    )
