"""Times optimizer steps at several lengths: by one rank, by groups of ranks, and beside separate models.

    python tools/bench_train.py CONFIG rounds=5 batch=4 'lengths=[14,7,10]' [section.key=value ...] [--json]

The clips are random and already in memory: decoding is not part of a step. Cases that need more cores or GPUs than
this machine has are predicted as `videoadapt plan` predicts them. Results are printed, and written to DIR/train.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_train_results import Row, by_lengths, print_bench_train, with_times
from bench_train_steps import all_reduce, matrix_product, our_step, passes, peer_step
from rank_processes import Prepare, slots, started
from videoadapt.config.cost import backward_macs, point_macs
from videoadapt.config.load import Config, load_config, make_config, parse_settings
from videoadapt.config.points import Point
from videoadapt.config.sections import Count, Section
from videoadapt.errors import ConfigError, RunError, UserError
from videoadapt.performance.bench.results import measured_with
from videoadapt.performance.memory import parameter_count
from videoadapt.performance.plan import work_of
from videoadapt.performance.timing import fitted
from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import write_json
from videoadapt.runtime.machine import pick_device
from videoadapt.training.draws import point_probabilities
from videoadapt.training.forecast import Network, Passes, forecast
from videoadapt.training.groups import GroupPlan, make_plan

PEER = "Hugging Face's TimeSformer"
_PASSES, _PRODUCT, _REDUCE = "passes", "matrix product", "sum over ranks"  # names of jobs that are not cases
_PACKAGES = ("torch", "timm", "transformers")


class Settings(Section):
    """The settings of the benchmark."""

    dir: Path = Path("runs/bench")
    rounds: Count = 5  # cases take turns in every round, so that noise on the machine meets all of them
    batch: Count = 4  # clips of a step, over all ranks
    steps: Count = 1  # steps of a turn; their mean counts
    lengths: tuple[Count, ...] | None = None  # in the order in which they are added; None: the longest, then ascending
    kinds: tuple[str, ...] | None = None  # of cases that are measured, besides the first case; None: all


@dataclass(frozen=True)
class Case:
    """A step at some points by some ranks."""

    kind: str  # alone, sequential, groups, no groups, the peer's name or, for a grid, a value of `train.draw`
    config: Config
    ranks: int
    costliest_last: bool = False  # the order of `parallel.overlap`

    @property
    def name(self) -> str:
        """The name in tables, such as `groups {14, 7}, 2 ranks`."""
        points = "{" + ", ".join(self.config.model.points) + "}"
        order = f", {self.config.model.points[0]} last" if self.costliest_last else ""
        return f"{self.kind} {points}" + (f", {self.ranks} ranks" if self.ranks > 1 else "") + order

    @property
    def plan(self) -> GroupPlan:
        """The groups of all ranks. Raises `ConfigError` if a rank has no clip."""
        return make_plan(self.config, self.ranks, point_macs(self.config.model))


@dataclass(frozen=True)
class _Job:
    """A measurement that alternates with others: `prepare(config, *args)` on some ranks."""

    prepare: Prepare
    config: Config
    args: tuple[Any, ...] = ()
    ranks: int = 1


def cases(config: Config, settings: Settings) -> list[Case]:
    """Returns our cases; the first is the costliest length alone, to which the others are compared.

    They are each length alone, the first k lengths by one rank and in groups on 2 to k ranks, and all lengths without
    groups, also with the backward pass of the costliest length last. A config with keeps also gives its whole grid by
    one rank, with all points and with sampled points.

    Raises:
        ConfigError: The lengths repeat, or do not fit the model.
    """
    lengths = settings.lengths or (config.model.lengths[0], *sorted(config.model.lengths[1:]))
    if len(set(lengths)) < len(lengths):
        raise ConfigError(f"bench_train: lengths: expected different lengths, got {list(lengths)}")

    def case(kind: str, members: Sequence[int], ranks: int) -> Case:
        groups = "auto" if kind == "groups" else None
        return Case(kind, _changed(config, settings.batch, list(map(str, members)), groups), ranks)

    found = [case("alone", [length], 1) for length in lengths]
    for k in range(2, len(lengths) + 1):
        found.append(case("sequential", lengths[:k], 1))
        found += [case("groups", lengths[:k], ranks) for ranks in range(2, k + 1)]
    for ranks in range(2, len(lengths) + 1):
        together = case("no groups", lengths, ranks)
        found += [together, dataclasses.replace(together, costliest_last=True)]
    grid = config.model.points
    if any(Point.parse(point).keep < 1 for point in grid):
        draws = ("all", "sampled")
        found += [Case(draw, _changed(config, settings.batch, grid, None, draw=draw), 1) for draw in draws]
    return found


def _changed(config: Config, batch: int, points: Sequence[str], groups: str | None, *, draw: str = "all") -> Config:
    values = config.model_dump(mode="json")
    values["model"]["points"] = list(points)
    values["train"] |= {"batch": batch, "accumulate": 1, "draw": draw}
    values["parallel"]["groups"] = groups
    values["evaluate"] |= {"cascade": [], "leap": []}  # they may name points that this case has not
    return make_config(values, "bench_train")


def bench_train(config: Config, words: Sequence[str] = ()) -> dict[str, Any]:
    """Measures the cases for which the machine has enough cores or GPUs, and predicts the others.

    Args:
        config: Gives the model, the optimizer, the precision and the device.
        words: Settings as `key=value`.

    Returns:
        The content of `train.json`. Cases that cannot run are in `left_out` with the cause.

    Raises:
        ConfigError: A setting is wrong, or does not fit the config.
        RunError: The costliest length alone cannot be trained.
    """
    settings = parse_settings(Settings, "bench_train", words)
    available, ours = slots(config.run.device), cases(config, settings)
    impossible = {case.name: cause for case in ours if (cause := _why_impossible(case))}
    possible = [case for case in ours if case.name not in impossible]
    half = max(1, settings.batch // 2)
    sizes = (half, 2 * half)  # batch sizes of the single passes
    peer = Case(PEER, ours[0].config, 1)
    jobs = _jobs([case for case in possible if case.ranks <= available], peer, sizes, settings.steps)
    if settings.kinds is not None:
        left = {case.name for case in [*ours[1:], peer] if case.kind not in settings.kinds}
        jobs = {name: job for name, job in jobs.items() if name not in left}
    if available > 1:  # gives the bytes per second for the predictions
        jobs[_REDUCE] = _Job(all_reduce, jobs[_PASSES].config, ranks=2)
    multiprocessing.set_forkserver_preload(["bench_train_steps"])  # imports torch once instead of once per rank
    turns, failed = _measure(jobs, settings.rounds)
    for required in (ours[0].name, _PASSES, _PRODUCT):
        if required in failed:
            raise RunError(f"bench_train: {required}: {failed[required]}")

    rates = [min(turn) for turn in turns.get(_REDUCE, [])]  # the slower rank
    device = pick_device(config.run.device).type
    bytes_per_s = statistics.median(rates) if rates else config.plan.bandwidth_gbps * 1e9 / 8
    network = Network(bytes_per_s, overlaps=device == "cuda")
    point_passes, optimizer_s = fitted([each for turn in turns[_PASSES] for each in turn[0]], sizes)
    rows = [_row(case, _predict(case, point_passes, optimizer_s, network)) for case in possible]
    rows.append(dataclasses.replace(_row(peer, None), parameters=None))  # ours are counted, not the peer's
    peak_macs_per_s = statistics.median(turn[0] for turn in turns[_PRODUCT])
    rows = with_times(rows, turns, peak_macs_per_s)
    result = measured_with(settings, _PACKAGES, config) | {
        "device": device,
        "ranks": available,
        "peak_macs_per_s": peak_macs_per_s,
        "bytes_per_s": bytes_per_s if rates else None,
        "rows": [dataclasses.asdict(row) for row in rows],
        "lengths": [dataclasses.asdict(row) for row in by_lengths(rows)],
        "left_out": impossible | failed,
    }
    write_json(settings.dir / "train.json", result)
    return result


def _jobs(ours: Sequence[Case], peer: Case, sizes: tuple[int, int], steps: int) -> dict[str, _Job]:
    jobs = {case.name: _Job(our_step, case.config, (steps, case.costliest_last), case.ranks) for case in ours}
    whole = max(ours, key=lambda case: len(case.config.model.points)).config  # has every point that is predicted
    return jobs | {
        peer.name: _Job(peer_step, peer.config, (steps,)),
        _PRODUCT: _Job(matrix_product, whole),
        _PASSES: _Job(passes, whole, (sizes, steps)),
    }


def _why_impossible(case: Case) -> str | None:
    try:
        case.plan  # noqa: B018 - evaluated for its error
    except ConfigError as error:
        return str(error)
    return None


def _measure(jobs: Mapping[str, _Job], rounds: int) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Runs the jobs in turn. Returns the results of each job's turns, by rank, and the cause of each failed job."""
    turns: dict[str, list[Any]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    with ExitStack() as stack, Bar("bench_train", total=len(jobs) * (1 + rounds), unit="turns") as bar:
        running = {}
        for name, job in jobs.items():
            bar.step(note=f"{name}: preparing")
            running[name] = stack.enter_context(started(job.ranks, job.prepare, job.config, *job.args))
            with _recorded(failed, name):
                running[name].ready()  # one job after the other: together they may not fit into memory
        for _ in range(rounds):
            for name, processes in running.items():
                bar.step(note=name)
                if name not in failed:
                    with _recorded(failed, name):
                        turns[name].append(processes.turn())
    return {name: results for name, results in turns.items() if name not in failed}, failed


@contextmanager
def _recorded(failed: dict[str, str], name: str) -> Iterator[None]:
    try:
        yield
    except RunError as error:
        failed[name] = str(error)


def _row(case: Case, predicted_s: float | None) -> Row:
    model, fractions = case.config.model, point_probabilities(case.config)
    macs = {p: forward + backward_macs(model, p, case.config.train.freeze) for p, forward in point_macs(model).items()}
    return Row(
        name=case.name,
        kind=case.kind,
        points=list(macs),
        ranks=case.ranks,
        plan=str(case.plan),
        macs=sum(fractions[point] * macs[point] for point in macs) * case.config.train.batch,
        clips=case.config.train.batch,
        parameters=parameter_count(case.config),
        predicted_s=predicted_s,
    )


def _predict(case: Case, point_passes: Mapping[str, Passes], optimizer_s: float, network: Network) -> float:
    needed = {point: point_passes[point] for point in case.config.model.points}
    work = work_of(case.config, needed, optimizer_s)
    return forecast(case.plan, work, network, costliest_last=case.costliest_last).step_s


def main() -> None:
    """Measures and prints. Exit code 2: the input is wrong; 1: the benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML config")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of the benchmark and section.key=value")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    given = parser.parse_intermixed_args()
    # Threads that spin at barriers slow training down if other processes use the cores. The ranks inherit the variable.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    overrides = [word for word in given.words if "." in word.partition("=")[0]]
    settings = [word for word in given.words if word not in overrides]
    try:
        result = bench_train(load_config(given.config, overrides), settings)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    if given.json:
        print(json.dumps(result, indent=2))
    else:
        print_bench_train(result)


if __name__ == "__main__":
    main()
