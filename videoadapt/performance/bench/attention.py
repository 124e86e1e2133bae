"""`videoadapt bench attention`: measures the kernels of attention at a model's shapes, and writes rules for `attend`.

The kernels take turns in a random order. The speed of a kernel is relative to torch's own choice in the same round.
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
from videoadapt.evaluation.intervals import median_interval
from videoadapt.model.attention import DEFAULT_RULES, KERNELS, Rule, kernel_for
from videoadapt.performance.bench.results import markdown_table, measured_with, print_machine, with_interval
from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import Summary, replacing, write_json
from videoadapt.runtime.machine import now, pick_device, precision_dtype

_USUAL = "fused"  # torch's own choice
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
    """One kernel at one shape in `attention.json`. Lists are a median over rounds and its 95 % interval."""

    sequences: int
    tokens: int
    precision: str
    training: bool  # whether the backward pass is measured, too
    kernel: str
    seconds: list[float]
    speed: list[float]  # time of torch's own choice / time of this kernel


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
        for shape in shapes(config.model, settings.batch)
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
                except RuntimeError as error:  # the kernel does not take this shape, or not on this device
                    failed[f"{case.kernel} over {case.shape.tokens} tokens"] = str(error).splitlines()[0]
                bar.step(note=f"{case.shape.tokens} tokens, {case.kernel}")
    rows = [_row(case, rounds[1:]) for case in rounds[-1]]
    rows.sort(
        key=lambda row: (row.tokens, row.sequences, row.precision, row.training, row.kernel != _USUAL, row.kernel)
    )
    result = measured_with(settings, ("torch",), config) | {
        "device": device.type,
        "failed": failed,
        "rows": [dataclasses.asdict(row) for row in rows],
        "rules": [rule._asdict() for rule in rules_of(rows, device.type)],
    }
    write_json(settings.dir / "attention.json", result)
    with replacing(settings.dir / "attention.md") as temporary:
        temporary.write_text(markdown(rows), encoding="utf-8")
    return result


def shapes(model: ModelConfig, clips: int) -> list[Shape]:
    """Returns the shapes of attention within frames and over time, at each length with all its tokens."""
    within = [Shape(clips * model.num_frames, 1 + length**2) for length in model.lengths]
    over_time = [Shape(clips * length**2, model.num_frames) for length in model.lengths]
    return list(dict.fromkeys(within + (over_time if model.temporal else [])))


def _seconds(case: _Case, model: ModelConfig, device: torch.device) -> float:
    size = (case.shape.sequences, case.shape.tokens, 3, model.heads, model.width // model.heads)
    dtype = precision_dtype(case.precision)
    qkv = torch.randn(size, dtype=dtype, device=device, requires_grad=case.training)
    begin = now(device)
    with torch.set_grad_enabled(case.training):
        out: Tensor = KERNELS[case.kernel](*qkv.permute(2, 0, 3, 1, 4))  # S N 3 M d -> three of S M N d
    if case.training:
        out.sum().backward()
    return now(device) - begin


def _row(case: _Case, rounds: Sequence[Mapping[_Case, float]]) -> AttentionRow:
    usual = case._replace(kernel=_USUAL)
    return AttentionRow(
        *case.shape,
        case.precision,
        case.training,
        case.kernel,
        seconds=list(median_interval([by_case[case] for by_case in rounds])),
        speed=list(median_interval([by_case[usual] / by_case[case] for by_case in rounds])),
    )


def rules_of(rows: Sequence[AttentionRow], device: str) -> list[Rule]:
    """Returns the rules that follow from the rows of one device: a kernel is taken up to a length that was measured.

    It is the fastest of the kernels that are faster than torch's own choice beyond the interval, at every number of
    sequences; without one, torch chooses.
    """
    measured: dict[tuple[str, bool], dict[int, dict[str, list[AttentionRow]]]] = {}
    for row in rows:
        by_kernel = measured.setdefault((row.precision, row.training), {}).setdefault(row.tokens, {})
        by_kernel.setdefault(row.kernel, []).append(row)
    return [
        Rule(device, precision, training, tokens, _best(by_kernel))
        for (precision, training), by_tokens in measured.items()
        for tokens, by_kernel in sorted(by_tokens.items())
    ]


def _best(rows: Mapping[str, Sequence[AttentionRow]]) -> str:
    faster = {name: min(row.speed[0] for row in own) for name, own in rows.items() if all(r.speed[1] > 1 for r in own)}
    return max(faster, key=faster.__getitem__, default=_USUAL)


_COLUMNS = ("tokens", "sequences", "precision", "passes", "kernel", "ms (95 %)", "torch's choice / this (95 %)")


def markdown(rows: Sequence[AttentionRow]) -> str:
    """Returns the rows as a markdown table."""
    return markdown_table(_COLUMNS, [_cells(row) for row in rows])


def _cells(row: AttentionRow) -> tuple[str, ...]:
    passes = "forward and backward" if row.training else "forward"
    return (
        str(row.tokens), str(row.sequences), row.precision, passes, row.kernel,
        with_interval(row.seconds, 1000, 2), "" if row.kernel == _USUAL else with_interval(row.speed),
    )  # fmt: skip


def print_bench_attention(result: Mapping[str, Any]) -> None:
    """Prints the machine, the table and the rules of a content of `attention.json`."""
    print_machine(result)
    print(
        f"{result['device']}, {result['machine']['threads']} threads, load {result['machine']['load']:.1f}, medians of "
        f"{result['settings']['rounds']} rounds, {result['settings']['batch']} clips\n"
    )
    print(markdown([AttentionRow(**row) for row in result["rows"]]))
    for what, cause in result["failed"].items():
        print(f"not measured: {what}: {cause}")
    other = [rule for rule in (Rule(**values) for values in result["rules"]) if rule.kernel != _built_in(rule)]
    for rule in other:
        passes = "with the backward pass" if rule.training else "in the forward pass"
        tokens = f"{rule.precision}, up to {rule.longest} tokens, {passes}"
        print(f"{tokens}: take {rule.kernel}, not {_built_in(rule)}, which is built in")
    if other:
        file = Path(result["settings"]["dir"]) / "attention.json"
        print(f"to take these: export VIDEOADAPT_ATTENTION={file.resolve()}")
    else:
        print("no kernel is faster beyond its interval than those that are built in")


def _built_in(rule: Rule) -> str:
    return kernel_for(rule.device, rule.precision, rule.longest, training=rule.training, rules=DEFAULT_RULES)
