"""`videoadapt bench attention`: measures the kernels of attention at a model's shapes, and writes rules for `attend`.

The kernels take turns in a random order. The speed of a kernel is relative to the built-in choice in the same round.
Inputs are random, in the layout of the model.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from videoadapt.config.load import Config, parse_settings
from videoadapt.config.sections import Count, ModelConfig, Section
from videoadapt.evaluation.intervals import has_interval, median_interval
from videoadapt.model.attention import DEFAULT_RULES, KERNELS, Rule, has_kernel, kernel_for
from videoadapt.performance.bench.results import markdown_table, measured_with, print_machine, with_interval
from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import Summary, replacing, write_json
from videoadapt.runtime.machine import now, pick_device, precision_dtype

_CALLS = {"cpu": 1, "cuda": 10}  # of a turn: a single call on a GPU is mostly the host's time
_CANDIDATES = {"cpu": ("fused", "explicit"), "cuda": tuple(KERNELS)}


class Settings(Section):
    """The settings of the benchmark."""

    dir: Path = Path("runs/bench")
    rounds: Count = 15
    batch: Count = 8  # clips
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")


class Shape(NamedTuple):
    """Sequences of tokens; each of the model's heads computes attention for each sequence."""

    sequences: int
    tokens: int


@dataclass(frozen=True)
class AttentionRow:
    """One kernel at one shape in `attention.json`. Lists: a median over rounds and its 95 % interval, or its range."""

    sequences: int
    tokens: int
    precision: str
    training: bool  # whether the backward pass is measured, too
    kernel: str
    built_in: str  # the kernel that `attend` takes without a file of rules
    seconds: list[float]  # of one call
    speed: list[float]  # time of the built-in kernel / time of this one


class _Case(NamedTuple):
    shape: Shape
    precision: Literal["fp32", "bf16"]
    training: bool
    kernel: str


def bench_attention(config: Config, words: Sequence[str] = ()) -> Summary:
    """Measures all kernels at the shapes of all lengths, and writes `attention.json` and `attention.md`.

    Args:
        config: Gives the model and the device.
        words: Settings as `key=value`.

    Returns:
        The content of `attention.json`. `failed` names the kernels that refused a shape.

    Raises:
        ConfigError: A setting is wrong, or `run.device` is not available.
    """
    settings = parse_settings(Settings, "bench attention", words)
    device = pick_device(config.run.device)
    torch.manual_seed(config.run.seed)
    cases = [
        _Case(shape, precision, training, kernel)
        for shape in shapes(config.model, settings.batch, device)
        for precision in settings.precisions
        for training in (False, True)
        for kernel in _CANDIDATES[device.type]
    ]
    rounds: list[dict[_Case, float]] = []
    failed: dict[str, str] = {}
    with Bar("bench attention", total=(1 + settings.rounds) * len(cases), unit="passes") as bar:
        for number in range(1 + settings.rounds):
            rounds.append({})
            for case in random.Random(number).sample(cases, len(cases)):
                try:
                    rounds[-1][case] = _seconds(case, config.model, device)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # the kernel does not take this shape, or not on this device
                    what = f"{case.kernel}, {case.precision}, {_passes(case.training)}, {case.shape.tokens} tokens"
                    failed[what] = str(error).splitlines()[0]
                bar.step(note=f"{case.shape.tokens} tokens, {case.kernel}")
    rows = [_row(case, rounds[1:], device.type, config.model) for case in cases if case in rounds[-1]]
    rules = rules_of(rows, device.type, _head_width(config.model)) if has_interval(settings.rounds) else []
    result = measured_with(settings, ("torch",), config) | {
        "device": device.type,
        "failed": failed,
        "rows": [dataclasses.asdict(row) for row in rows],
        "rules": [rule._asdict() for rule in rules],
    }
    write_json(settings.dir / "attention.json", result)
    with replacing(settings.dir / "attention.md") as temporary:
        temporary.write_text(markdown(rows, settings.rounds), encoding="utf-8")
    return result


def shapes(model: ModelConfig, clips: int, device: torch.device) -> list[Shape]:
    """Returns the shapes of attention within frames and over time, at each length with all its tokens.

    Over time, GPUs run the kernel of `model/kernels/`, whose shapes are left out.
    """
    frames = model.num_frames
    # Students have a distillation token, too.
    extra = {length: 2 if model.distill_token and length < model.lengths[0] else 1 for length in model.lengths}
    within = [Shape(clips * frames, extra[length] + length**2) for length in model.lengths]
    over_time = [Shape(clips * length**2, frames) for length in model.lengths]
    has_own = not model.temporal or has_kernel(torch.empty(1, frames, device=device))
    return list(dict.fromkeys(within if has_own else within + over_time))


def _head_width(model: ModelConfig) -> int:
    return model.width // model.heads


def _seconds(case: _Case, model: ModelConfig, device: torch.device) -> float:
    """Returns the seconds of a call."""
    size = (case.shape.sequences, case.shape.tokens, 3, model.heads, _head_width(model))
    dtype = precision_dtype(case.precision)
    qkv = torch.randn(size, dtype=dtype, device=device, requires_grad=case.training)
    gradient = torch.randn((size[0], size[3], size[1], size[4]), dtype=dtype, device=device)  # S M N d
    calls = _CALLS[device.type]
    begin = now(device)
    for _ in range(calls):
        with torch.set_grad_enabled(case.training):
            out: Tensor = KERNELS[case.kernel](*qkv.permute(2, 0, 3, 1, 4))  # S N 3 M d -> three of S M N d
        if case.training:
            out.backward(gradient)
    return (now(device) - begin) / calls


def _row(case: _Case, rounds: Sequence[Mapping[_Case, float]], device: str, model: ModelConfig) -> AttentionRow:
    like = Rule(device, case.precision, case.training, _head_width(model), case.shape.tokens, "fused")
    built_in = case._replace(kernel=kernel_for(like, DEFAULT_RULES))
    return AttentionRow(
        *case.shape,
        case.precision,
        case.training,
        case.kernel,
        built_in.kernel,
        seconds=list(median_interval([by_case[case] for by_case in rounds])),
        speed=list(median_interval([by_case[built_in] / by_case[case] for by_case in rounds])),
    )


def rules_of(rows: Sequence[AttentionRow], device: str, width: int) -> list[Rule]:
    """Returns the rules that differ from the built-in ones: a kernel is taken up to a length that was measured.

    It is the fastest of the kernels that are faster than the built-in one beyond the interval, at every number of
    sequences.

    Args:
        rows: The rows of one device.
        device: `cpu` or `cuda`.
        width: Of a head.
    """
    measured: dict[tuple[str, bool, int], dict[str, list[AttentionRow]]] = {}
    for row in rows:
        measured.setdefault((row.precision, row.training, row.tokens), {}).setdefault(row.kernel, []).append(row)
    best = {key: _best(by_kernel) for key, by_kernel in sorted(measured.items())}
    # A rule holds up to its length, and so a shorter sequence with the built-in kernel needs a rule of its own.
    built_in = {(row.precision, row.training, row.tokens): row.built_in for row in rows}
    changed = {key[:2] for key, kernel in best.items() if kernel != built_in[key]}
    return [
        Rule(device, precision, training, width, tokens, kernel)
        for (precision, training, tokens), kernel in best.items()
        if (precision, training) in changed
    ]


def _best(rows: Mapping[str, Sequence[AttentionRow]]) -> str:
    faster = {name: min(row.speed[0] for row in own) for name, own in rows.items() if all(r.speed[1] > 1 for r in own)}
    return max(faster, key=faster.__getitem__, default=next(iter(rows.values()))[0].built_in)


def _passes(training: bool) -> str:
    return "forward and backward" if training else "forward"


_COLUMNS = ("tokens", "sequences", "precision", "passes", "kernel", "ms ({level})", "built-in / this ({level})")


def markdown(rows: Sequence[AttentionRow], rounds: int) -> str:
    """Returns the rows, measured in so many rounds, as a markdown table."""
    return markdown_table(_COLUMNS, [_cells(row) for row in rows], rounds)


def _cells(row: AttentionRow) -> tuple[str, ...]:
    return (
        str(row.tokens), str(row.sequences), row.precision, _passes(row.training), row.kernel,
        with_interval(row.seconds, 1000, 2), "built in" if row.kernel == row.built_in else with_interval(row.speed),
    )  # fmt: skip


def print_bench_attention(result: Mapping[str, Any]) -> None:
    """Prints the machine, the table and the rules of a content of `attention.json`."""
    print_machine(result)
    print(
        f"{result['device']}, {result['machine']['threads']} threads, load {result['machine']['load']:.1f}, medians of "
        f"{result['settings']['rounds']} rounds, {result['settings']['batch']} clips\n"
    )
    print(markdown([AttentionRow(**row) for row in result["rows"]], result["settings"]["rounds"]))
    for what, cause in result["failed"].items():
        print(f"not measured: {what}: {cause}")
    rules = [Rule(**values) for values in result["rules"]]
    for rule in rules:
        print(f"{rule.precision}, {_passes(rule.training)}, up to {rule.longest} tokens: {rule.kernel}")
    if rules:
        file = Path(result["settings"]["dir"]) / "attention.json"
        print(f"to use these kernels: export VIDEOADAPT_ATTENTION={file.resolve()}")
    elif not has_interval(result["settings"]["rounds"]):
        print("too few rounds for an interval, and so for rules; take 6 or more")
    else:
        print("no kernel is faster than the built-in one beyond its interval")
