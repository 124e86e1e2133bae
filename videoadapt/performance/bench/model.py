"""`videoadapt bench model`: forward passes and training steps beside other implementations with the same weights.

Everything takes turns in a random order, so that noise on the machine meets all. Times are compared within a round, and
speeds with a large matrix product of the same round. Clips are random and normalised, on the device.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, parse_settings
from videoadapt.config.sections import Count, Section
from videoadapt.evaluation.intervals import median_interval
from videoadapt.model.timesformer import TimeSformer, compiled
from videoadapt.model.weights.load import load_weights
from videoadapt.performance.bench.peak import peak_bytes, reset_peak_bytes
from videoadapt.performance.bench.peers import peer_of, peer_side
from videoadapt.performance.bench.results import markdown_table, measured_with, print_machine, with_interval
from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import Summary, replacing, write_json
from videoadapt.runtime.machine import autocast, now, pick_device, precision_dtype
from videoadapt.training.losses import cross_entropy
from videoadapt.training.optim import make_optimizer
from videoadapt.training.utilisation import PRODUCT_SIDE, matrix_product

Precision = Literal["fp32", "bf16"]
Forward = Callable[[Tensor], Tensor]  # clips (B, C, T, H, W) to logits (B, classes)


class Settings(Section):
    """The settings of the benchmark."""

    dir: Path = Path("runs/bench")
    rounds: Count = 7
    batches: tuple[Count, ...] = (8,)  # clips of a pass
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager",)
    passes: tuple[Literal["forward", "step"], ...] = ("forward", "step")


@dataclass(frozen=True)
class ModelRow:
    """One case in `model.json`. Lists are a median over rounds and its 95 % interval (below 6 rounds, the range)."""

    model: str  # "ours" or a peer
    point: str
    kind: str  # "forward", or "step": forward, backward and optimizer
    precision: str
    mode: str
    batch: int
    clips_per_s: float
    seconds: list[float]
    product: list[float]  # MACs per second / those of a large matrix product; a step counts as three forward passes
    speed: list[float] | None  # of our model at the costliest point: the peer's time / ours
    peak_bytes: int  # above what was there before: of the device on a GPU, of the process on a CPU


@dataclass(frozen=True)
class _Case:
    model: str
    point: str
    kind: str
    precision: str
    mode: str
    batch: int
    run: Callable[[], object]

    def like(self, other: _Case) -> bool:
        """Returns whether the two differ in nothing but the model."""
        keys = ("point", "kind", "precision", "mode", "batch")
        return all(getattr(self, key) == getattr(other, key) for key in keys)


def bench_model(config: Config, words: Sequence[str] = ()) -> Summary:
    """Measures all cases, and writes `model.json` and `model.md`.

    Args:
        config: Gives the model, the optimizer, the device and the seed.
        words: Settings as `key=value`.

    Returns:
        The content of `model.json`.

    Raises:
        ConfigError: A setting is wrong, or `run.device` is not available.
    """
    settings = parse_settings(Settings, "bench model", words)
    device = pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    # Peers have no drop path.
    config = config.model_copy(update={"model": config.model.model_copy(update={"drop_path": 0.0})})
    ours = TimeSformer(config.model)
    peers = peer_of(config.model)
    for peer in peers.values():
        load_weights(ours, peer.get_submodule("model").state_dict())
    cases = [
        case
        for precision in settings.precisions
        for mode in settings.modes
        for name, module in {"ours": ours, **peers}.items()
        for case in _cases(name, module, config, settings, precision, mode, device)
    ]
    products = {p: matrix_product(device, precision_dtype(p)) for p in settings.precisions}
    rounds: list[dict[int, float]] = []
    rates: list[dict[str, float]] = []
    peaks: dict[int, int] = {}
    with Bar("bench model", total=(1 + settings.rounds) * len(cases), unit="passes") as bar:
        for number in range(1 + settings.rounds):
            rates.append({p: PRODUCT_SIDE[device.type] ** 3 / _seconds(run, device) for p, run in products.items()})
            seconds = {}
            for index in random.Random(number).sample(range(len(cases)), len(cases)):
                before = _reset_peak(device)
                seconds[index] = _seconds(cases[index].run, device)
                peaks[index] = _peak(device) - before
                bar.step(note=f"{cases[index].model} {cases[index].kind}")
            rounds.append(seconds)
    macs = point_macs(config.model)
    rows = [_row(index, cases, rounds[1:], rates[1:], macs, peaks[index]) for index in range(len(cases))]
    result = measured_with(settings, ("torch", "timm", "transformers"), config) | {
        "device": device.type,
        "difference": {name: _difference(ours, peer, config) for name, peer in peers.items()},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_json(settings.dir / "model.json", result)
    with replacing(settings.dir / "model.md") as temporary:
        temporary.write_text(markdown(rows, settings.rounds), encoding="utf-8")
    return result


def _cases(  # noqa: PLR0917 - the axes of the table
    name: str, module: nn.Module, config: Config, settings: Settings, precision: str, mode: str, device: torch.device
) -> list[_Case]:
    """Returns the cases of a model; forward passes have weights in the precision, steps have autocast."""
    points = config.model.points if name == "ours" else config.model.points[:1]
    side = config.model.size if name == "ours" else peer_side(config.model)
    cases = []
    for kind in settings.passes:
        is_step = kind == "step"
        copy = deepcopy(module).to(device, torch.float32 if is_step else precision_dtype(precision)).train(is_step)
        forward: nn.Module = copy
        if mode == "compiled":
            forward = compiled(copy) if isinstance(copy, TimeSformer) else torch.compile(copy)  # type: ignore[assignment]
        for batch in settings.batches:
            shape = (batch, 3, config.model.num_frames, side, side)  # B C T H W
            clips = torch.randn(shape, device=device, dtype=next(copy.parameters()).dtype)
            for point in points:
                call = partial(forward, point=point) if name == "ours" else forward
                run = partial(_step if is_step else _forward, call, clips)
                if is_step:
                    run = partial(run, copy, make_optimizer(copy.named_parameters(), config.train), precision)
                cases.append(_Case(name, point, kind, precision, mode, batch, run))
    return cases


@torch.inference_mode()
def _forward(forward: Forward, clips: Tensor) -> Tensor:
    return forward(clips)


def _step(forward: Forward, clips: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> None:
    optimizer.zero_grad(set_to_none=True)
    with autocast(clips.device, precision):
        logits = forward(clips)
    targets = torch.full_like(logits, 1 / logits.shape[1], dtype=torch.float32)
    cross_entropy(logits, targets).mean().backward()
    optimizer.step()


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    begin = now(device)
    run()
    return now(device) - begin


def _reset_peak(device: torch.device) -> int:
    """Starts a new peak of memory, and returns the bytes at present."""
    if device.type != "cuda":
        return reset_peak_bytes()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes()


@torch.inference_mode()
def _difference(ours: TimeSformer, peer: nn.Module, config: Config) -> float:
    """Returns the largest difference of our logits from a peer's, over its largest logit; the weights are the same."""
    side = peer_side(config.model)
    clips = torch.randn(1, 3, config.model.num_frames, side, side)
    expected, found = peer.eval()(clips), ours.eval()(clips, config.model.points[0])
    return float((found - expected).abs().max() / expected.abs().max())


def _row(  # noqa: PLR0917
    index: int,
    cases: Sequence[_Case],
    rounds: Sequence[Mapping[int, float]],
    rates: Sequence[Mapping[str, float]],
    macs: Mapping[str, int],
    peak: int,
) -> ModelRow:
    case = cases[index]
    work = case.batch * macs[case.point] * (3 if case.kind == "step" else 1)
    seconds = median_interval([by_case[index] for by_case in rounds])
    product = [work / s[index] / rate[case.precision] for s, rate in zip(rounds, rates, strict=True)]
    peers = [i for i, other in enumerate(cases) if i != index and case.model == "ours" and case.like(other)]
    return ModelRow(
        case.model, case.point, case.kind, case.precision, case.mode, case.batch,
        clips_per_s=case.batch / seconds[0],
        seconds=list(seconds),
        product=list(median_interval(product)),
        speed=list(median_interval([s[peers[0]] / s[index] for s in rounds])) if peers else None,
        peak_bytes=peak,
    )  # fmt: skip


_COLUMNS = (
    *(
        "pass",
        "precision",
        "mode",
        "clips",
        "model",
        "point",
        "ms ({level})",
        "clips/s",
        "of the product's rate",
        "MiB",
    ),
    "peer's time / ours ({level})",
)


def markdown(rows: Sequence[ModelRow], rounds: int) -> str:
    """Returns the rows, measured in so many rounds, as a markdown table."""
    return markdown_table(_COLUMNS, [_cells(row) for row in rows], rounds)


def _cells(row: ModelRow) -> tuple[str, ...]:
    return (
        row.kind, row.precision, row.mode, str(row.batch), row.model, row.point,
        with_interval(row.seconds, 1000, 1), f"{row.clips_per_s:.2f}", with_interval(row.product),
        f"{row.peak_bytes / 2**20:.0f}", "" if row.speed is None else with_interval(row.speed),
    )  # fmt: skip


def print_bench_model(result: Mapping[str, Any]) -> None:
    """Prints the machine and the table of a content of `model.json`."""
    print_machine(result)
    print(
        f"{result['device']}, {result['machine']['threads']} threads, load {result['machine']['load']:.1f}, "
        f"medians of {result['settings']['rounds']} rounds\n"
    )
    for peer, difference in result["difference"].items():
        print(f"same weights as {peer}: logits differ by {difference:.1e} of the largest")
    print(markdown([ModelRow(**row) for row in result["rows"]], result["settings"]["rounds"]))
