"""`videoadapt bench train`: optimizer steps at several lengths, by one rank and by groups, beside separate models.

Clips are made up and lie ready: decoding is not part of a step.
"""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_train_ranks import Prepare, slots, started
from bench_train_steps import StepTurn, matrix_product, our_step, passes, peer_step, sum_over_ranks
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, make_config, parse_settings
from videoadapt.config.points import Point
from videoadapt.config.sections import Count, Section
from videoadapt.errors import ConfigError, RunError
from videoadapt.performance.bench.machine import machine, versions
from videoadapt.performance.forecast import Network, Passes, forecast
from videoadapt.performance.memory import parameter_count
from videoadapt.performance.plan import work_of
from videoadapt.performance.timing import fitted
from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import write_json
from videoadapt.runtime.machine import pick_device
from videoadapt.training.draws import point_shares
from videoadapt.training.groups import GroupPlan, make_plan

PEER = "Hugging Face's TimeSformer"
_PASSES, _PRODUCT, _SUM = "passes", "matrix product", "sum over ranks"
_PACKAGES = ("torch", "timm", "transformers")


class Settings(Section):
    """What is measured, and how often."""

    dir: Path = Path("runs/bench")
    rounds: Count = 5  # contestants take turns, so that all meet the same noise
    batch: Count = 4  # clips of a step, over all ranks
    steps: Count = 1  # in a turn; their mean counts
    lengths: tuple[Count, ...] | None = (
        None  # the first k make the steps at k; none = the longest, then the shortest up
    )


@dataclass(frozen=True)
class Contestant:
    """A step at some points by some ranks. `kind` is alone, sequential, groups, no groups, or how a grid is drawn."""

    kind: str
    config: Config
    ranks: int

    @property
    def name(self) -> str:
        """As `groups {14, 7}, 2 ranks`."""
        points = "{" + ", ".join(self.config.model.points) + "}"
        return f"{self.kind} {points}" + (f", {self.ranks} ranks" if self.ranks > 1 else "")


def contestants(config: Config, settings: Settings) -> list[Contestant]:
    """Each length alone, the first k lengths by one rank, in groups on 2 to k ranks, and all without groups.

    Where the config has keeps, also its whole grid by one rank: all points a step, and four that are drawn.
    """
    lengths = settings.lengths or (config.model.lengths[0], *sorted(config.model.lengths[1:]))
    if len(set(lengths)) < len(lengths):
        raise ConfigError(f"bench train: lengths: expected different lengths, got {list(lengths)}")

    def of(kind: str, k: Sequence[int], ranks: int) -> Contestant:
        groups = "auto" if kind == "groups" else None
        return Contestant(kind, _changed(config, settings.batch, list(map(str, k)), groups), ranks)

    found = [of("alone", [length], 1) for length in lengths]
    for k in range(2, len(lengths) + 1):
        found.append(of("sequential", lengths[:k], 1))
        found += [of("groups", lengths[:k], ranks) for ranks in range(2, k + 1)]
    found += [of("no groups", lengths, ranks) for ranks in range(2, len(lengths) + 1)]
    grid = config.model.points
    if any(Point.parse(point).keep < 1 for point in grid):
        draws = ("all", "sampled")
        found += [Contestant(draw, _changed(config, settings.batch, grid, None, draw=draw), 1) for draw in draws]
    return found


def _changed(config: Config, batch: int, points: Sequence[str], groups: str | None, *, draw: str = "all") -> Config:
    values = config.model_dump(mode="json")
    values["model"]["points"] = list(points)
    values["train"] |= {"batch": batch, "accumulate": 1, "draw": draw}
    values["parallel"]["groups"] = groups
    return make_config(values, "bench train")


def bench_train(config: Config, words: Sequence[str] = ()) -> dict[str, Any]:
    """Measures all contestants for which there are cores or GPUs, predicts the others; returns what `train.json` holds.

    What cannot be run is named with the cause. Raises `ConfigError` for settings or a config that cannot be,
    `RunError` where the costliest length alone cannot be trained.
    """
    settings = parse_settings(Settings, "bench train", words)
    places, asked = slots(config.run.device), contestants(config, settings)
    left_out = {each.name: cause for each in asked if (cause := _impossible(each))}
    possible = [each for each in asked if each.name not in left_out]
    sizes = (max(1, settings.batch // 2), 2 * max(1, settings.batch // 2))
    whole = max(possible, key=lambda each: len(each.config.model.points)).config
    peer, steps = Contestant(PEER, asked[0].config, 1), settings.steps
    jobs = {each.name: Job(our_step, each.config, (steps,), each.ranks) for each in possible if each.ranks <= places}
    jobs |= {peer.name: Job(peer_step, peer.config, (steps,)), _PRODUCT: Job(matrix_product, whole)}
    jobs[_PASSES] = Job(passes, whole, (sizes, steps))
    if places > 1:
        jobs[_SUM] = Job(sum_over_ranks, whole, ranks=2)
    turns, failed = _measure(jobs, settings.rounds)
    for needed in (asked[0].name, _PASSES, _PRODUCT):
        if needed in failed:
            raise RunError(f"bench train: {needed}: {failed[needed]}")

    point_passes, optimizer_s = fitted([each for turn in turns[_PASSES] for each in turn[0]], sizes)
    measured = [min(turn) for turn in turns.get(_SUM, [])]
    bytes_per_s = statistics.median(measured) if measured else config.plan.bandwidth_gbps * 1e9 / 8
    device = pick_device(config.run.device).type
    network = Network(bytes_per_s, overlaps=device == "cuda")
    rows = [_about(each) | _predicted(each, point_passes, optimizer_s, network) for each in possible]
    rows.append(_about(peer) | {"predicted_s": None, "parameters": None})
    add_times(rows, turns, statistics.median(turn[0] for turn in turns[_PRODUCT]))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine() | {"device": device, "ranks": places, "load": os.getloadavg()[0]},
        "versions": versions(_PACKAGES),
        "settings": settings.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "peak_macs_per_s": statistics.median(turn[0] for turn in turns[_PRODUCT]),
        "bytes_per_s": bytes_per_s if measured else None,
        "rows": rows,
        "lengths": by_lengths(rows),
        "left_out": left_out | failed,
    }
    write_json(settings.dir / "train.json", result)
    return result


@dataclass(frozen=True)
class Job:
    """What takes turns: a function of `steps`, what it is given, and on how many ranks."""

    prepare: Prepare
    config: Config
    args: tuple[Any, ...] = ()
    ranks: int = 1


def _impossible(each: Contestant) -> str | None:
    try:
        _plan(each)
    except ConfigError as error:
        return str(error)
    return None


def _plan(each: Contestant) -> GroupPlan:
    return make_plan(each.config, each.ranks, point_macs(each.config.model))


def _measure(jobs: Mapping[str, Job], rounds: int) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The results of every turn, by rank, and why some have none."""
    turns: dict[str, list[Any]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    with ExitStack() as stack, Bar("bench train", total=len(jobs) * (1 + rounds), unit="turns") as bar:
        running = {}
        for name, job in jobs.items():
            bar.step(note=f"{name}: getting ready")
            running[name] = stack.enter_context(started(job.ranks, job.prepare, job.config, *job.args))
            with _noted(failed, name):
                running[name].ready()  # one by one: all at once may not fit into memory
        for _ in range(rounds):
            for name, ranks in running.items():
                bar.step(note=name)
                if name not in failed:
                    with _noted(failed, name):
                        turns[name].append(ranks.turn())
    return {name: each for name, each in turns.items() if name not in failed}, failed


@contextmanager
def _noted(failed: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
    except RunError as error:
        failed[name] = str(error)


def _about(each: Contestant) -> dict[str, Any]:
    macs, shares = point_macs(each.config.model), point_shares(each.config)
    return {
        "name": each.name,
        "kind": each.kind,
        "points": list(macs),
        "ranks": each.ranks,
        "plan": str(_plan(each)),
        # Of all forward passes of a step, the mean over draws.
        "macs": sum(shares[point] * macs[point] for point in macs) * each.config.train.batch,
        "clips": each.config.train.batch,
        "parameters": parameter_count(each.config),
    }


def _predicted(each: Contestant, all_: Mapping[str, Passes], optimizer_s: float, network: Network) -> dict[str, float]:
    work = work_of(each.config, {point: all_[point] for point in each.config.model.points}, optimizer_s)
    return {"predicted_s": forecast(_plan(each), work, network).step_s}


def add_times(rows: list[dict[str, Any]], turns: Mapping[str, Sequence[Sequence[StepTurn]]], peak: float) -> None:
    """Adds to each row what was measured; None where nothing was. The first row is the costliest length alone.

    Relations between contestants are medians over rounds of the relation within a round.
    """
    alone = [_slowest(turn) for turn in turns[rows[0]["name"]]]
    for row in rows:
        taken = turns.get(row["name"])
        row["flops_bound"] = row["macs"] / rows[0]["macs"]
        row |= dict.fromkeys(_MEASURED) if taken is None else _times(row, taken, alone, peak)


_MEASURED = ("step_s", "rounds_s", "times_alone", "times_bound", "communication", "waited_s", "prediction_error") + (
    "clips_per_s",
    "peak_fraction",
    "peak_bytes",
)


def _slowest(turn: Sequence[StepTurn]) -> float:
    return max(rank.seconds for rank in turn)


def _times(row: Mapping[str, Any], turns: Sequence[Sequence[StepTurn]], alone: Sequence[float], peak: float) -> Any:
    seconds = [_slowest(turn) for turn in turns]
    step_s = statistics.median(seconds)
    times = statistics.median(one / base for one, base in zip(seconds, alone, strict=True))
    silent = [1 - max(rank.alone_s for rank in turn) / one for turn, one in zip(turns, seconds, strict=True)]
    return {
        "step_s": step_s,
        "rounds_s": seconds,
        "times_alone": times,
        "times_bound": times / row["flops_bound"],
        "communication": statistics.median(silent) if row["ranks"] > 1 else None,
        "waited_s": statistics.median(max(rank.waited_s for rank in turn) for turn in turns),
        "prediction_error": row["predicted_s"] and row["predicted_s"] / step_s - 1,
        "clips_per_s": row["clips"] / step_s,
        "peak_fraction": 3 * row["macs"] / step_s / (peak * row["ranks"]),  # a backward pass has twice the MACs
        "peak_bytes": max(rank.peak_bytes for rank in turns[-1]),
    }


def by_lengths(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For k = 1 and more lengths: one model by one rank and with a rank for each length, beside k separate models.

    The separate models are trained one after the other by one rank. A time that was not measured is predicted.
    """
    alone = {row["points"][0]: row for row in rows if row["kind"] == "alone"}
    first = next(iter(alone.values()))
    table = []
    for one in (first, *(row for row in rows if row["kind"] == "sequential")):
        k = len(one["points"])
        group = next(
            (r for r in rows if r["kind"] == "groups" and r["points"] == one["points"] and r["ranks"] == k), one
        )
        separate = [alone[point] for point in one["points"] if point in alone]
        table.append(
            {
                "points": one["points"],
                "sequential_s": one["step_s"],
                "grouped_s": group["step_s"] or group["predicted_s"],
                "grouped_is_predicted": group["step_s"] is None,
                "separate_s": sum_or_none(row["step_s"] for row in separate),
                "parameters": one["parameters"],
                "separate_parameters": sum(row["parameters"] for row in separate),
                "peak_bytes": one["peak_bytes"],
                "grouped_peak_bytes": group["peak_bytes"],
                "separate_peak_bytes": sum_or_none(row["peak_bytes"] for row in separate),
            }
        )
    return table


def sum_or_none(values: Iterable[float | None]) -> float | None:
    """The sum; none if one is missing."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)
