"""Checks videoadapt on one GPU in minutes: are results right on CUDA, and how fast is it?

    python tools/gpu_check.py [--out gpu_check.json] [--minutes 9] [--only parity,resume]
    python tools/gpu_check.py --cpu    # the same with tiny sizes, to see that the script itself works

The parts are independent. A part that fails records its traceback, a part without time left is skipped, and the file is
written after each part. The same command goes on where it stopped: parts that have ended well with the same code, torch
and device are not run again. The exit code is 1 if a part failed or found a wrong result. Clips are random tensors:
nothing is decoded. Without transformers, the peer is left out.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bench_train_steps
import videoadapt.training.train as training
from bench_train_steps import random_batches
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, make_config
from videoadapt.config.sections import ModelConfig
from videoadapt.data.clips import loader
from videoadapt.data.clips.datasets import Clip
from videoadapt.data.index.manifest import SCHEMA, Manifest
from videoadapt.model import block, timesformer
from videoadapt.model.attention import KERNELS, attend_over_time
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.model.timesformer import TimeSformer, compiled
from videoadapt.performance.bench.peers import HuggingFace
from videoadapt.routing.policy import Fixed, Random
from videoadapt.routing.router import Router
from videoadapt.runtime.files import replacing
from videoadapt.training.groups import make_plan
from videoadapt.training.losses import cross_entropy
from videoadapt.training.preflight import Rates
from videoadapt.training.state import State
from videoadapt.training.step import RankRole, train_step
from videoadapt.training.step_report import StepReport
from videoadapt.training.utilisation import product_rate

Result = dict[str, Any]  # the result of one part; becomes JSON

SMALL: Result = {"width": 64, "depth": 2, "heads": 2, "patch": 8, "size": 32, "num_frames": 4, "num_classes": 5}
SMALL |= {"stride_frames": 1, "fps": None, "points": ["4", "4@0.5", "2"], "drop_blocks": [1]}
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the errors of logits and gradients, at keep 1
SAME_STEP = 1e-3  # largest difference of three grouped steps from those of one process, over how far these move
WARM_UP, LEAST_RUNS, MOST_RUNS = 2, 5, 50
INTERRUPTED_STEP = 5
HALF_A_KIB = 600  # characters of an error of a child process that are kept


@dataclass(frozen=True)
class Machine:
    """Where the parts run, and how large their inputs are."""

    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether the real sizes are used; the CPU only shows that the script works."""
        return self.device.type == "cuda"

    @property
    def batches(self) -> tuple[int, ...]:
        """Clips of a batch."""
        return (8, 32, 64) if self.on_gpu else (1, 2)

    def config(self, folder: str = "runs/check", *, big: bool = False, **sections: Result) -> Config:
        """Returns a small model's config; with `big`, on a GPU, TimeSformer-B 8x224 at 14, 10 and 7."""
        values: Result = {
            "run": {"dir": folder, "device": self.device.type, "precision": "bf16"},
            "model": {} if big and self.on_gpu else SMALL,
        }
        return make_config(values | {name: values.get(name, {}) | keys for name, keys in sections.items()})

    def seconds(self, work: Callable[[], object], least_s: float = 0.4) -> float:
        """Returns the median time of single runs, each waited for, after two that do not count."""
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < LEAST_RUNS or (time.perf_counter() - begin < least_s and len(times) < MOST_RUNS):
            before = time.perf_counter()
            work()
            if self.on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
        return statistics.median(times[WARM_UP:])

    def peak_bytes(self) -> int:
        """Returns the largest allocation on the GPU since `reset_peak`."""
        return torch.cuda.max_memory_allocated() if self.on_gpu else 0

    def reset_peak(self) -> None:
        """Gives cached memory back and starts a new peak."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def parity(machine: Machine, result: Result) -> None:
    """Compares logits and gradients on this device with float64 on the CPU, at every point."""
    with _fused_from(0):  # the small model uses all kernels
        _parity(machine, result)


@contextmanager
def _fused_from(tokens: int) -> Iterator[None]:
    """Runs the blocks with fused residual branches on batches of this many patch tokens and more."""
    usual, timesformer._LEAST_FUSED = timesformer._LEAST_FUSED, tokens
    try:
        yield
    finally:
        timesformer._LEAST_FUSED = usual


def _parity(machine: Machine, result: Result) -> None:
    model = machine.config().model
    torch.manual_seed(1)
    exact = TimeSformer(model).double()
    with torch.no_grad():
        for parameter in exact.parameters():  # with initial weights, most temporal attention has no effect
            parameter.add_(0.05 * torch.randn_like(parameter))
    clips = torch.randn(4, 3, model.num_frames, model.size, model.size)
    right = True
    for point in model.points:
        exact.zero_grad()
        wanted = exact(clips.double(), point)
        wanted.square().sum().backward()
        for dtype, bound in BOUNDS.items():
            ours = copy.deepcopy(exact).to(machine.device, dtype)
            ours.zero_grad()
            found = ours(clips.to(machine.device, dtype), point)
            found.float().square().sum().backward()
            error = (found.detach().cpu().double() - wanted.detach()).abs().max() / wanted.detach().abs().max()
            errors = {"logits": float(error), "gradient": _gradient_error(exact, ours)}
            result[f"{point} {str(dtype).removeprefix('torch.')}"] = errors
            if "@" not in point:  # at lower keeps, bf16 may keep other tokens, so no bound holds
                right &= all(value < bound for value in errors.values())
    result["right"] = right


def _gradient_error(exact: nn.Module, ours: nn.Module) -> float:
    """Returns the norm of the difference of all gradients, divided by the norm of the exact gradients."""
    wanted, found = (
        {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
        for model in (exact, ours)
    )
    if different := wanted.keys() ^ found.keys():
        raise RuntimeError(f"only one of the models has gradients of {', '.join(sorted(different))}")
    error = sum(float((wanted[name] - found[name]).square().sum()) for name in wanted)
    return float((error / sum(float(gradient.square().sum()) for gradient in wanted.values())) ** 0.5)


class RandomClips(torch.utils.data.Dataset[Clip]):
    """Replaces `TrainClips`, so that nothing is decoded. The clip of a key (epoch, row) depends on the key alone."""

    def __init__(self, manifest: Manifest, config: Config) -> None:
        self.manifest, self.config = manifest, config

    def __getitem__(self, key: tuple[int, int]) -> Clip:
        """Returns the clip of a row in an epoch."""
        model = self.config.model
        generator = torch.Generator().manual_seed(1000 * key[0] + key[1])
        shape = (3, model.num_frames, model.size, model.size)  # C T H W
        frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return Clip(frames, key[1] % model.num_classes, key[1])


def resume(machine: Machine, result: Result) -> None:
    """Checks that an interrupted `train`, with workers, pinned memory and streams, ends with the same bits."""
    rows = [{"video": str(i), "label": i % 5, "split": "train", "status": "ok"} for i in range(12)]
    manifest = Manifest(pa.Table.from_pylist(rows, schema=SCHEMA), tuple("abcde"))
    # This process ends after the check, so the replaced names are not restored.
    loader.TrainClips = RandomClips  # type: ignore[assignment, misc]
    training.load_or_index = lambda _: manifest  # type: ignore[assignment]
    training.preflight = lambda *_: Rates(product_rate(machine.device, torch.bfloat16), None)

    def interrupted(state: State, *rest: Any) -> StepReport:
        if state.step == INTERRUPTED_STEP:
            raise KeyboardInterrupt
        return train_step(state, *rest)

    keys = {"epochs": 3, "batch": 4, "accumulate": 2, "save_steps": 2, "optimizer": "adamw", "lr": 1e-3}
    keys |= {"ema": 0.9, "clip_grad": 1.0}
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, list[Callable[..., StepReport]]]
        runs = {"whole": [train_step], "resumed": [interrupted, train_step]}
        for name, attempts in runs.items():
            model = SMALL | {"drop_path": 0.2}
            config = machine.config(
                f"{folder}/{name}", data={"workers": 2, "mixup": 0.8}, train=dict(keys), model=model
            )
            for attempt in attempts:
                training.train_step = attempt
                with suppress(KeyboardInterrupt):
                    training.train(config)
            newest = train_checkpoints(config.run.dir).latest()
            assert newest is not None, "training ends with a checkpoint"
            ends.append(newest)
    whole, resumed = ends
    result["steps"] = resumed.meta["step"]
    differences = [(whole.tensors[n].double() - resumed.tensors[n].double()).abs().max() for n in whole.tensors]
    result["largest_difference"] = float(max(differences))
    result["tensors"] = len(whole.tensors)
    result["right"] = all(torch.equal(whole.tensors[n], resumed.tensors[n]) for n in whole.tensors)  # to the bit


def _three_steps(config: Config, world: int) -> tuple[Tensor, Tensor, RankRole]:
    """Returns all parameters before and after three steps on random clips, and the rank's role."""
    state = State.start(config, Manifest(pa.table({}), ()))
    role = RankRole.from_plan(config, state.model, make_plan(config, world, point_macs(config.model)))
    before = _flat(state.model)
    for state.step in range(3):
        train_step(state, role, random_batches(config, role, state.device))
    return before, _flat(state.model), role


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


def _rank_main(rank: int, world: int, backend: str, folder: str, machine: Machine) -> None:
    """Runs one rank of the part `ranks`, and writes its result into the folder."""
    run, train = {"precision": "fp32"}, {"batch": 8, "lr": 0.01}
    before, alone, _ = _three_steps(machine.config(run=run, train=train), 1)
    dist.init_process_group(backend, init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    groups = {"groups": "auto" if world > 1 else None}
    _, ours, role = _three_steps(machine.config(run=run, train=train, parallel=groups), world)
    dist.broadcast(first := ours.clone(), 0)
    found = {
        "plan": str(role.plan),
        "moved": float((ours - before).abs().max()),
        "ranks_equal": torch.equal(first, ours),
        "difference_to_one_process": float((ours - alone).abs().max()),
    }
    (Path(folder) / f"{world}-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def ranks(machine: Machine, result: Result) -> None:
    """Compares grouped steps with one process: 1 rank on NCCL, 2 on gloo, as NCCL refuses 2 ranks on one GPU."""
    for world, backend in ((1, "cpu:gloo,cuda:nccl" if machine.on_gpu else "gloo"), (2, "gloo")):
        with tempfile.TemporaryDirectory() as folder:
            name = f"{world} of {backend}"
            try:
                torch.multiprocessing.spawn(_rank_main, (world, backend, folder, machine), nprocs=world)
                files = sorted(Path(folder).glob("*.json"))
                result[name] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            except Exception as error:  # the other backend still runs
                result["error"] = f"{result.get('error', '')}{name}: {str(error)[-HALF_A_KIB:]}\n"
    found = [rank for several in result.values() if isinstance(several, list) for rank in several]
    result["right"] = all(
        rank["ranks_equal"] and rank["difference_to_one_process"] < SAME_STEP * rank["moved"] for rank in found
    )


def attention(machine: Machine, result: Result) -> None:
    """Times attention kernels on the temporal and the spatial shape of a few clips, in the model's layout."""
    model = machine.config(big=True).model
    patches, head_width = int(model.points[0]) ** 2, model.width // model.heads
    clips = machine.batches[0]
    shapes = {"temporal": (clips * patches, model.num_frames), "spatial": (clips * model.num_frames, patches + 1)}
    for name, (sequences, tokens) in shapes.items():
        qkv = torch.randn(
            sequences,
            tokens,
            3,
            model.heads,
            head_width,
            device=machine.device,
            dtype=torch.bfloat16,
            requires_grad=True,
        )
        for kernel in KERNELS:
            try:
                result[f"{name} {kernel}"] = _attention_times(machine, qkv, kernel)
            except RuntimeError as error:  # the kernel does not take this shape or this device
                result[f"{name} {kernel}"] = str(error).splitlines()[0][:100]
    qkv = torch.randn(clips, model.num_frames, patches, 3 * model.width, device=machine.device, dtype=torch.bfloat16)
    # Beside the rows above, it needs no transposed copies: its input and its output are (B, T, N, D).
    result["temporal ours"] = _times(machine, lambda: attend_over_time(qkv.requires_grad_(), model.heads))


def _attention_times(machine: Machine, qkv: Tensor, kernel: str) -> Result:
    return _times(machine, lambda: KERNELS[kernel](*qkv.permute(2, 0, 3, 1, 4)))  # S N 3 M d -> three of S M N d


def _times(machine: Machine, forward: Callable[[], Tensor]) -> Result:
    machine.reset_peak()
    with torch.no_grad():
        forward_s = machine.seconds(forward, 0.1)
    both_s = machine.seconds(lambda: forward().sum().backward(), 0.1)
    return {"forward_ms": 1e3 * forward_s, "both_ms": 1e3 * both_s, "peak_mib": machine.peak_bytes() >> 20}


Forward = Callable[[Tensor, str], Tensor]  # clips (B, C, T, H, W) and a point to logits (B, classes)


def _pass_s(
    machine: Machine, forward: Forward, model: ModelConfig, point: str, batch: int, *, train: bool, dtype: torch.dtype
) -> float:
    """Returns the seconds of a forward pass, with `train` also of its backward pass, over clips on the device."""
    shape = (batch, 3, model.num_frames, model.size, model.size)
    clips = torch.randn(shape, device=machine.device, dtype=dtype)
    targets = torch.full((batch, model.num_classes), 1 / model.num_classes, device=machine.device)

    def run() -> None:
        with torch.autocast(machine.device.type, torch.bfloat16, enabled=train), torch.set_grad_enabled(train):
            logits = forward(clips, point)
        if train:
            cross_entropy(logits, targets).sum().backward()

    return machine.seconds(run)


def _contestants(model: ModelConfig, result: Result) -> Generator[tuple[str, nn.Module, Forward]]:
    """Returns our model with and without kernels, and the one of Hugging Face with its own and with fused attention."""
    ours = TimeSformer(model)
    yield "ours", ours, ours
    with _fused_from(2**62):
        yield "ours, branches not fused", ours, ours
        with mock.patch.object(block, "has_kernel", lambda _: False):
            yield "ours without kernels", ours, ours
    try:
        from transformers.models.timesformer.modeling_timesformer import TimesformerSelfAttention
    except ImportError as error:
        result["HF"] = f"cannot be imported: {error}"
        return

    def fused(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2),)

    own = TimesformerSelfAttention.forward
    for name, kernel in {"HF plain": own, "HF sdpa": fused}.items():
        with mock.patch.object(TimesformerSelfAttention, "forward", kernel):
            peer = HuggingFace(model)
            yield name, peer, lambda clips, _, peer=peer: peer(clips)  # type: ignore[misc]


def speed(machine: Machine, result: Result) -> None:
    """Times every point, and the peer at the costliest one, beside the rate of a large matrix product."""
    model, side = machine.config(big=True).model, 8192 if machine.on_gpu else 512
    matrix = torch.randn(side, side, device=machine.device, dtype=torch.bfloat16)
    rate = side**3 / machine.seconds(lambda: matrix @ matrix)
    result["matmul_tmacs"] = rate / 1e12
    macs = point_macs(model)
    with closing(_contestants(model, result)) as contestants:  # also after an error, it restores what it replaced
        for name, module, forward in contestants:
            for train in (False, True):
                dtype = torch.float32 if train else torch.bfloat16
                module.to(machine.device, dtype).train(train)
                points = model.points if name == "ours" else model.points[:1]
                for batch in machine.batches:
                    for point in points:
                        machine.reset_peak()
                        key = f"{name} {'train' if train else 'infer'} {point} x{batch}"
                        try:
                            pass_s = _pass_s(machine, forward, model, point, batch, train=train, dtype=dtype)
                        except torch.cuda.OutOfMemoryError:
                            result[key] = "out of memory"
                            continue
                        done = batch * macs[point] * (3 if train else 1)  # a backward pass has twice the MACs
                        result[key] = {
                            "ms": 1e3 * pass_s,
                            "clips_per_s": batch / pass_s,
                            "fraction_of_matmul": done / pass_s / rate,
                            "peak_gib": machine.peak_bytes() / 2**30,
                        }
                module.zero_grad(set_to_none=True)
            module.to("cpu")  # the next one finds the GPU empty


def step(machine: Machine, result: Result) -> None:
    """Times `train_step` at all points, and counts how often the host waits for the device in it."""
    for batch in machine.batches:
        config = machine.config(big=True, train={"batch": batch})
        state = State.start(config, Manifest(pa.table({}), ()))
        role = RankRole.from_plan(config, state.model, make_plan(config, 1, point_macs(config.model)))
        batches = random_batches(config, role, state.device)
        step_s = machine.seconds(lambda: train_step(state, role, batches), 1.0)  # noqa: B023 - called in this pass
        result[f"x{batch}"] = {"ms": 1e3 * step_s, "clips_per_s": batch / step_s}
        if machine.on_gpu:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                train_step(state, role, batches)
                torch.cuda.set_sync_debug_mode("default")
            result[f"x{batch}"]["host_waits"] = sum("called a synchronizing" in str(w.message) for w in caught)


def routed(machine: Machine, result: Result) -> None:
    """Times `Router.run` over uint8 clips on the host, beside the same passes over normalised clips on the device."""
    model, count, batch = machine.config(big=True).model, 192 if machine.on_gpu else 6, machine.batches[-1]
    network = TimeSformer(model).to(machine.device, torch.bfloat16).eval()
    views = torch.randint(0, 256, (count, 1, 3, model.num_frames, model.size, model.size), dtype=torch.uint8)
    alone_s = {
        point: _pass_s(machine, network, model, point, batch, train=False, dtype=torch.bfloat16) / batch
        for point in model.points
    }
    mix = tuple(1 / len(model.points) for _ in model.points)
    for policy in (*map(Fixed, model.points), Random(mix)):
        router = Router(network, policy, batch=batch)
        clip_s = machine.seconds(lambda: router.run(views), 0.1) / count  # noqa: B023 - called in this pass
        pass_s = alone_s[policy.point] if isinstance(policy, Fixed) else statistics.mean(alone_s.values())
        result[policy.name] = {
            "clips_per_s": 1 / clip_s,
            "on_device_clips_per_s": 1 / pass_s,
            "efficiency": pass_s / clip_s,
        }


def compile_(machine: Machine, result: Result) -> None:
    """Times compiled beside eager passes at the costliest and the cheapest point, and one clip less."""
    changes = {"drop_path": 0.1} | ({} if machine.on_gpu else SMALL | {"depth": 1})
    model, batch = machine.config(big=True, model=changes).model, 32 if machine.on_gpu else 4
    network = TimeSformer(model).to(machine.device).train()
    fast = compiled(network)
    for point, clips in ((model.points[0], batch), (model.points[-1], batch), (model.points[-1], batch - 1)):
        begin = time.perf_counter()
        compiled_s = _pass_s(machine, fast, model, point, clips, train=True, dtype=torch.float32)
        first_use_s = time.perf_counter() - begin
        eager_s = _pass_s(machine, network, model, point, clips, train=True, dtype=torch.float32)
        result[f"{point} x{clips}"] = {
            "with_compiling_s": first_use_s,
            "compiled_ms": 1e3 * compiled_s,
            "eager_ms": 1e3 * eager_s,
        }


PARTS: dict[str, Callable[[Machine, Result], None]] = {
    "parity": parity,
    "resume": resume,
    "ranks": ranks,
    "attention": attention,
    "step": step,
    "speed": speed,
    "routed": routed,
    "compile": compile_,
}


def digest_of_code() -> str:
    """Returns a hash of the package's sources, of this script and of the one that it imports."""
    hasher = hashlib.blake2b(digest_size=8)
    for path in [
        Path(__file__),
        Path(bench_train_steps.__file__),
        *sorted(Path(training.__file__).parents[1].rglob("*.py")),
    ]:
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def finished_parts(path: Path, conditions: Result) -> Result:
    """Returns the parts in an earlier result that have ended well, if it was measured under the same conditions."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: it is no JSON
        return {}
    if not isinstance(earlier, dict) or any(earlier.get(key) != value for key, value in conditions.items()):
        return {}
    return {name: earlier[name] for name in PARTS if name in earlier and ended_well(earlier[name])}


def ended_well(part: Result) -> bool:
    """Returns whether a part has run, and found nothing wrong."""
    return not {"error", "skipped"} & part.keys() and part.get("right", True)


def main() -> None:
    """Runs the parts in turn and prints each result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default=",".join(PARTS))
    args = parser.parse_args()
    begin = time.monotonic()
    machine = Machine(torch.device("cpu") if args.cpu else torch.device("cuda", 0))
    found: Result = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(0) if machine.on_gpu else "cpu",
        "cpus": os.cpu_count(),
        "cudnn": torch.backends.cudnn.version(),
        "code": digest_of_code(),
    }
    found |= finished_parts(args.out, found)
    for name in args.only.split(","):
        if name in found:
            print(f"{name}: ended well before", flush=True)
            continue
        since = time.monotonic()
        result: Result = {}
        if since - begin > 60 * args.minutes:
            result["skipped"] = "no time left"
        else:
            try:
                PARTS[name](machine, result)
            except Exception:  # the other parts still run
                result["error"] = traceback.format_exc(limit=-4)
        found[name] = result | {"seconds": round(time.monotonic() - since, 1)}
        print(f"{name}: {json.dumps(found[name], indent=1)}", flush=True)
        with replacing(args.out) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    bad = [name for name in args.only.split(",") if not ended_well(found[name]) and "skipped" not in found[name]]
    if bad:
        sys.exit(f"failed or wrong: {', '.join(bad)}")


if __name__ == "__main__":
    main()
