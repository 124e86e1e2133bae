"""Counts launches, bytes, waits of the host and graph breaks of a training step, without a GPU.

    python tools/count_step.py [--clips 8] [--points 14] [--device cuda] [--operations]

The model is TimeSformer-B on 8 frames of 224 pixels, with drop path 0.1. The script also runs on commit 294ef74:
`PYTHONPATH=/checkout/of/294ef74 python tools/count_step.py`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import videoadapt
from count_operations import Count, counting, faked, is_product
from videoadapt.model import timesformer
from videoadapt.model.timesformer import TimeSformer, compiled

_MOVED = {"config.cost": "cost", "config.load": "config", "data.clips.loader": "data.loader"}
_MOVED |= {"data.index.manifest": "data.manifest", "training.groups": "groups", "training.optim": "optim"}
_MOVED |= {"training.state": "state", "training.step": "train"}

for _new, _old in _MOVED.items():
    if (Path(videoadapt.__path__[0]) / "train.py").exists():  # 294ef74, before the package had rooms
        sys.modules[f"videoadapt.{_new}"] = _module = importlib.import_module(f"videoadapt.{_old}")
        vars(_module)["RankRole"] = SimpleNamespace(from_plan=getattr(getattr(_module, "Seat", None), "take", None))

from videoadapt.config.cost import point_macs  # noqa: E402
from videoadapt.config.load import Config, make_config  # noqa: E402
from videoadapt.data.clips.loader import Batch  # noqa: E402
from videoadapt.data.index.manifest import Manifest  # noqa: E402
from videoadapt.training.groups import make_plan  # noqa: E402
from videoadapt.training.optim import make_optimizer  # noqa: E402
from videoadapt.training.state import State  # noqa: E402
from videoadapt.training.step import RankRole, train_step  # noqa: E402

SMALL: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "num_frames": 2, "num_classes": 5, "patch": 4, "size": 56}
SMALL |= {"drop_blocks": [1], "drop_path": 0.1}
TWELVE = tuple(f"{length}{keep}" for length in (14, 10, 7) for keep in ("", "@0.9", "@0.7", "@0.5"))

Forward = Callable[[Tensor], Tensor]  # clips (B, C, T, H, W) to logits (B, classes)


def count_pass(
    make: Callable[[], tuple[nn.Module, Forward]], config: Config, clips: int, device: torch.device
) -> tuple[Count, Count]:
    """Counts a forward pass, and a forward pass with its backward pass, in training mode."""
    counts = []
    for with_backward in (False, True):
        with torch.device("meta"):
            module, forward = make()
        with counting(device) as count:
            faked(module.train(), device)
            frames, _ = _inputs(config, clips, device)
            targets = torch.empty(clips, config.model.num_classes, device=device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = forward(frames)
            loss = -(targets * F.log_softmax(logits.float(), -1)).sum()
            if with_backward:
                loss.backward()
        counts.append(count)
    return counts[0], counts[1]


def count_step(config: Config, device: torch.device) -> Count:
    """Counts one optimizer step at all points: the second one, when the optimizer has its state."""
    with torch.device("meta"):
        model = TimeSformer(config.model)
    with counting(device) as count:
        faked(model, device)
        optimizer = make_optimizer(model.named_parameters(), config.train)
        state = State(config, Manifest(pa.table({}), ()), device, model, optimizer, None)
        role = RankRole.from_plan(config, model, make_plan(config, 1, point_macs(config.model)))
        frames, labels = _inputs(config, config.train.batch, device)
        rows = range(config.train.batch)
        batch = Batch(frames.to(torch.uint8), labels, torch.tensor(rows), [*rows], [])
        train_step(state, role, [batch])
        count.reset()
        train_step(state, role, [batch])
    return count


def _inputs(config: Config, clips: int, device: torch.device) -> tuple[Tensor, Tensor]:
    model = config.model
    frames = torch.empty(clips, 3, model.num_frames, model.size, model.size, device=device)  # B C T H W
    return frames, torch.empty(clips, dtype=torch.int64, device=device)


def our_model(config: Config, point: str) -> tuple[nn.Module, Forward]:
    """Returns our model, and its forward pass at a point."""
    model = TimeSformer(config.model)
    return model, lambda clips: model(clips, point)


def peer_model(config: Config) -> tuple[nn.Module, Forward]:
    """Returns Hugging Face's TimeSformer of the same size; it has no drop path."""
    from videoadapt.performance.bench.peers import HuggingFace  # 294ef74 has none

    peer = HuggingFace(config.model)
    return peer, peer


def count_graphs(points: tuple[str, ...]) -> tuple[int, int, int]:
    """Counts what `train.compile` compiles, on the CPU, with a backend that runs graphs as they are.

    Returns:
        Graphs after a forward pass at each point, graphs after another one with a clip less at each point, and graph
        breaks. Without breaks, a point and a batch size have one graph.
    """
    model = TimeSformer(make_config({"model": SMALL | {"points": points}}).model).train()  # its sizes change no graph
    torch._dynamo.reset()
    counters.clear()
    with mock.patch("torch.compile", partial(torch.compile, backend="eager")):
        forward = compiled(model)
    counts = []
    for clips in (3, 2):
        for point in points:
            forward(torch.zeros(clips, 3, 2, 56, 56), point)
        counts.append(counters["stats"]["unique_graphs"])
    return counts[0], counts[1], sum(counters["graph_break"].values())


def _row(name: str, count: Count) -> str:
    total, products = (sum(n for op, n in count.launches.items() if keep(op)) for keep in (bool, is_product))
    return f"| {name} | {total:,} | {products:,} | {count.traffic / 1e9:.1f} | {count.waits} |"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--points", default="14,10,7")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--fused-from", type=int, help="patch tokens from which the blocks are fused, not the model's")
    parser.add_argument("--peer", action="store_true", help="also count Hugging Face's TimeSformer")
    parser.add_argument("--graphs", action="store_true", help="also count the graphs of train.compile")
    parser.add_argument("--operations", action="store_true", help="also list the operations of a training pass")
    args = parser.parse_args()
    if args.fused_from is not None:
        timesformer._LEAST_FUSED = args.fused_from
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    values = {
        "run": {"precision": "bf16"},
        "model": {"drop_path": 0.1, "points": args.points.split(",")},
        "train": {"batch": args.clips},
    }
    config = make_config(values)
    makers = {f"ours at {point}": partial(our_model, config, point) for point in args.points.split(",")}
    if args.peer:
        makers["Hugging Face's"] = partial(peer_model, config)
    print(f"{args.clips} clips, bf16 autocast, {args.device}\n")
    print("| | launches | of them products | GB outside products | waits |\n| --- | --- | --- | --- | --- |")
    details = {}
    for name, make in makers.items():
        forward, details[name] = count_pass(make, config, args.clips, device)
        print(_row(f"{name}, forward", forward))
        print(_row(f"{name}, forward and backward", details[name]))
    print(_row(f"optimizer step at {', '.join(config.model.points)}", count_step(config, device)))
    if args.graphs:
        print("\n| compiled, CPU | graphs | graphs after a clip less | breaks |\n| --- | --- | --- | --- |")
    for points in (("14", "10", "7"), TWELVE) if args.graphs else ():
        print(f"| {len(points)} points | {' | '.join(map(str, count_graphs(points)))} |")
    for name, count in details.items() if args.operations else ():
        print(f"\n| {name}, forward and backward | launches | GB |\n| --- | --- | --- |")
        for operation, size in count.bytes.most_common():
            print(f"| {operation} | {count.launches[operation]} | {size / 1e9:.2f} |")


if __name__ == "__main__":
    main()
