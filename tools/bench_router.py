"""Measures what the router costs: `python tools/bench_router.py [rounds=9] [clips=1024] [dir=runs/bench_router]`.

The model of `configs/demo.yaml` gets points that differ tenfold in cost. Weights and clips are random, and the clips
come in random order of their points. Prints a table, and writes DIR/router.json:

- the time of `Router.run` over the ideal, the sum of each point's best time of a batch for its clips;
- the longest latency of `Router.stream` for clips that arrive in time, over `max_wait_s` plus the longest pass;
- how much the memory grows in the second half of a long stream;
- the routed efficiency (speed-up over fewer MACs) of an assigner and of random points, beside the costliest point.

All forms take turns within a round. Times are CPU seconds of one thread, so that other programs change them little;
latencies are of the clock, and need a quiet machine.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from videoadapt.config.cost import point_macs
from videoadapt.config.load import load_config, parse_settings
from videoadapt.config.sections import AssignConfig, Count, Section
from videoadapt.data.clips.clip_dataset import ClipViews
from videoadapt.data.clips.views import preprocess
from videoadapt.errors import ConfigError
from videoadapt.evaluation.intervals import median_interval
from videoadapt.evaluation.speed_passes import Replayed
from videoadapt.model.timesformer import TimeSformer
from videoadapt.performance.bench.results import measured_with, print_machine
from videoadapt.routing.assigner import Assigner, assigner_macs
from videoadapt.routing.label_rules import Choice
from videoadapt.routing.policy import Assigned, Fixed, Policy, Random
from videoadapt.routing.router import Router
from videoadapt.runtime.console import Bar, print_table
from videoadapt.runtime.files import write_json

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
POINTS = ("8", "4", "4@0.5", "2")  # 8 costs 16 times as much as 2
MIX = (0.1, 0.2, 0.3, 0.4)
SIZES = (16, 32, 64, 128, 256)  # views of a pass, of which the fastest counts
STREAM = 8  # times `clips`: length of the stream
MAX_WAIT_S = 0.2
LOAD = 0.5  # of what `run` can do: how many clips of a stream arrive in a second


class Settings(Section):
    """The settings of the benchmark."""

    dir: Path = Path("runs/bench_router")
    rounds: Count = 9
    clips: Count = 1024


def main() -> None:
    """Measures everything, prints a table and writes the JSON."""
    torch.set_num_threads(1)
    try:
        settings = parse_settings(Settings, "bench_router", sys.argv[1:])
    except ConfigError as error:
        sys.exit(str(error))
    torch.manual_seed(0)
    config = load_config(CONFIG, [f"model.points=[{','.join(POINTS)}]"])
    model = TimeSformer(config.model).eval()
    shape = (settings.clips, 1, 3, config.model.num_frames, config.model.size, config.model.size)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)
    side = config.assign.size
    thumbnails = torch.randint(0, 256, (settings.clips, 3, config.assign.frames, side, side), dtype=torch.uint8)
    best = _best_batches(model, clips[:, 0])
    batches = {point: size for point, (size, _) in best.items()}
    choice = np.random.default_rng(0).choice(len(POINTS), settings.clips, p=MIX)
    result = measured_with(settings, ["torch"]) | {"batches": batches}
    policies: dict[str, Policy] = {
        "fixed": Fixed(POINTS[0]),
        "replayed": Replayed(Fixed(POINTS[0]), choice),
        "random": Random(MIX, seed=0),
        "assigned": Assigned(_assigner(config.assign, thumbnails), config.model.points, 0.5),
    }
    routers = {name: Router(model, policy, batch=batches) for name, policy in policies.items()}
    result |= _throughput(model, routers, clips, thumbnails, choice=choice, rounds=settings.rounds)
    result |= _stream(Router(model, policies["replayed"], batch=batches, max_wait_s=MAX_WAIT_S), clips, choice)
    settings.dir.mkdir(parents=True, exist_ok=True)
    write_json(settings.dir / "router.json", result)
    print_machine(result)
    print_table("router", ("figure", "value"), _rows(result))


def _best_batches(model: TimeSformer, clips: Tensor) -> dict[str, tuple[int, float]]:
    """Returns each point's fastest batch size, and its CPU seconds of a clip."""
    found = {}
    for point in POINTS:
        tried = {size: min(_pass_s(model, clips[:size], point) for _ in range(3)) for size in SIZES}
        size = min(tried, key=tried.__getitem__)
        found[point] = size, tried[size]
    return found


@torch.inference_mode()
def _pass_s(model: TimeSformer, clips: Tensor, point: str) -> float:
    """Returns the CPU seconds of a clip in a pass without a router."""
    begin = time.process_time()
    model(preprocess(model, clips, point), point).numpy()
    return (time.process_time() - begin) / len(clips)


def _assigner(config: AssignConfig, thumbnails: Tensor) -> Assigner:
    """Returns an assigner whose choices differ from clip to clip."""
    made = Assigner(config, len(POINTS))
    with torch.no_grad():
        made.train()(thumbnails)
        logits = made.eval()(thumbnails)
        made.head.weight.mul_(3 / logits.std(0)[:, None])
        made.head.bias.copy_(-(made(thumbnails) - made.head.bias).mean(0))
    return made


def _throughput(
    model: TimeSformer,
    routers: dict[str, Router],
    clips: Tensor,
    thumbnails: Tensor,
    *,
    choice: Choice,
    rounds: int,
) -> dict[str, Any]:
    """Returns the time of `run` over the ideal one, and routed efficiencies, as median and interval."""
    counts = np.bincount(choice, minlength=len(POINTS))
    batches = routers["fixed"].batches
    macs = np.array([point_macs(model.config)[point] for point in POINTS])
    mean_macs: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ("ideal", *routers)}
    with Bar("router", total=rounds + 1, unit="rounds") as bar:
        for number in range(rounds + 1):
            passes = [_pass_s(model, clips[: batches[point], 0], point) for point in POINTS]
            turn = {"ideal": float(counts @ np.array(passes))}
            for name, router in routers.items():
                begin = time.process_time()
                routed = router.run(clips, thumbnails=thumbnails)
                turn[name] = time.process_time() - begin
                assigner = router.policy.assigner
                own = assigner_macs(assigner.config, len(POINTS)) if assigner else 0
                mean_macs[name] = float(macs[routed.choice].mean()) + own
            if number:  # the first round warms up
                for name, value in turn.items():
                    seconds[name].append(value)
            bar.step(1)
    found: dict[str, Any] = {
        "tenfold": float(macs[0] / macs[-1]),
        "run_over_ideal": _ratios(seconds["replayed"], seconds["ideal"]),
        "us_per_clip": {name: 1e6 * statistics.median(times) / len(clips) for name, times in seconds.items()},
    }
    for name in ("random", "assigned"):
        fewer = mean_macs["fixed"] / mean_macs[name]
        found[f"efficiency_{name}"] = [value / fewer for value in _ratios(seconds["fixed"], seconds[name])]
    return found


def _ratios(above: list[float], below: list[float]) -> list[float]:
    """Returns the median of the ratios within the rounds, and its interval."""
    return list(median_interval([a / b for a, b in zip(above, below, strict=True)]))


def _stream(router: Router, clips: Tensor, choice: Choice) -> dict[str, Any]:
    """Returns the longest latency of a stream and its bound, and how much memory the stream's second half adds."""
    begin = time.perf_counter()
    router.run(clips)
    every_s = (time.perf_counter() - begin) / len(clips) / LOAD
    longest_s = max(
        _wall_s(lambda point=point, size=size: router._pass(clips[:size, 0], point))  # type: ignore[misc]
        for point, size in router.batches.items()
    )
    arrived: list[float] = []

    def source() -> Iterator[ClipViews]:
        start = time.perf_counter()
        for number in range(STREAM * len(clips)):
            time.sleep(max(0.0, start + number * every_s - time.perf_counter()))
            arrived.append(time.perf_counter())
            yield ClipViews(clips[number % len(clips)][None], None, None)

    process, total = psutil.Process(), STREAM * len(clips)
    latencies, memory = [], []
    with Bar("stream", total=total, unit="clips") as bar:
        for number, _ in enumerate(router.stream(source())):
            latencies.append(time.perf_counter() - arrived[number])
            memory.append(process.memory_info().rss)
            bar.step(1)
    half = total // 2
    return {
        "latency_s": {str(q): float(np.quantile(latencies, q)) for q in (0.5, 0.95, 1.0)},
        "latency_bound_s": MAX_WAIT_S + longest_s,
        "memory_grows_bytes": max(memory[half:]) - max(memory[:half]),
        "stream_clips": total,
    }


def _wall_s(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    def interval(name: str) -> str:
        middle, low, high = result[name]
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"

    latency = result["latency_s"]
    return [
        (f"cost of {POINTS[0]} over cost of {POINTS[-1]}, MACs", f"{result['tenfold']:.1f}"),
        ("time of run over the ideal", interval("run_over_ideal")),
        ("routed efficiency, random", interval("efficiency_random")),
        ("routed efficiency, assigned", interval("efficiency_assigned")),
        (
            "latency of the stream, ms: p50, p95, longest",
            ", ".join(f"{1000 * value:.0f}" for value in latency.values()),
        ),
        ("max_wait_s and the longest pass, ms", f"{1000 * result['latency_bound_s']:.0f}"),
        ("memory that the second half of the stream adds, MB", f"{result['memory_grows_bytes'] / 1e6:.1f}"),
    ]


if __name__ == "__main__":
    main()
