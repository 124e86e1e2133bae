"""Checkpoints: one safetensors file each, tensors as tensors, the rest as JSON in its header.

Written to a temporary name, fsynced, renamed; `last` names the newest complete one. A torn or foreign file is refused
with a sentence, and where nobody named it, the one before it is used. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from videoadapt.config.sections import ModelConfig, Section
from videoadapt.errors import CheckpointError, RunError
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.console import say
from videoadapt.runtime.files import replacing

KEY = "videoadapt"
VERSION = 1
Guard = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: its file, its tensors by name (`model/...`, `ema/...`, `optimizer/...`), and the rest."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    def tensors_under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix/`, without it."""
        return {name.removeprefix(f"{prefix}/"): t for name, t in self.tensors.items() if name.startswith(f"{prefix}/")}


def save_checkpoint(path: Path, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint whole or not at all. Raises `RunError` where the disk does not take it."""
    header = {KEY: json.dumps({"kind": kind, "version": VERSION, **meta})}
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            save_file(ready, temporary, metadata=header)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot save this checkpoint ({error}); earlier checkpoints are intact") from error


def load_checkpoint(path: Path, kind: str) -> Checkpoint:
    """Reads a checkpoint of a kind (`train` or `assigner`). Raises `CheckpointError` saying what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: torn or not a checkpoint ({error}); name another one") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise CheckpointError(f"{path}: not a checkpoint of this version of videoadapt; weights go in by train.init")
    if header["kind"] != kind:
        raise CheckpointError(f"{path}: holds a checkpoint of kind {header['kind']}, expected {kind}")
    return Checkpoint(Path(path), tensors, header)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage in a folder: `step-00000120.safetensors`, ..., and `last`.

    They are written and removed inside `guard`, which raises where this process may not write any more.
    """

    folder: Path
    kind: str
    keep: int = 2
    guard: Guard = nullcontext

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of a step, points `last` to it, and removes all but the newest `keep`."""
        with self.guard():
            return self._save(step, tensors, meta)

    def _save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        path = self.folder / f"step-{step:08d}.safetensors"
        save_checkpoint(path, self.kind, tensors, {"step": step, **meta})
        try:
            with replacing(self.folder / "last") as temporary:
                temporary.write_text(path.name, encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.folder / 'last'}: cannot be written ({error}); {path} is complete") from error
        for old in self._newest_first()[self.keep :]:
            old.unlink()
        return path

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that can be read; torn ones are passed over with a message. None if there is none."""
        files = self._newest_first()
        for path in files:
            try:
                return load_checkpoint(path, self.kind)
            except CheckpointError as error:
                say(f"{error}; going back to the checkpoint before it")
        if files:
            raise CheckpointError(
                f"{self.folder}: none of its {len(files)} checkpoints can be read; move them away to start again"
            )
        return None

    def _newest_first(self) -> list[Path]:
        """What `last` names, then older ones: a file newer than `last` was never announced complete."""
        files = sorted(self.folder.glob("step-*.safetensors"), reverse=True)
        last = self.folder / "last"
        named = last.read_text(encoding="utf-8", errors="replace").strip() if last.exists() else ""
        announced = named.startswith("step-")  # else a foreign or torn file, which says nothing
        return [path for path in files if not announced or path.name <= named]


def train_checkpoints(run: Path, keep: int = 2, guard: Guard = nullcontext) -> Checkpoints:
    """Where stage 1 of a run keeps its checkpoints."""
    return Checkpoints(run / "checkpoints", "train", keep, guard)


def require_same(
    path: Path, ours: Section, theirs: Mapping[str, Any], name: str, *, free: tuple[str, ...] = ()
) -> None:
    """Raises `CheckpointError`, naming fields, where a section is not the one that a checkpoint was made with.

    A field that is younger than the checkpoint has its default there: what was done before there was a choice.
    """
    mine = ours.model_dump(mode="json")
    theirs = type(ours)().model_dump(mode="json") | dict(theirs)
    other = {
        key: [theirs.get(key), value]
        for key, value in mine.items()
        if key not in free and not _alike(key, theirs.get(key), value)
    }
    if other:
        listed = "; ".join(f"{name}.{key} is {there!r} there, {here!r} here" for key, (there, here) in other.items())
        raise CheckpointError(
            f"{path}: this checkpoint is of another architecture or run: {listed}. "
            "Use another run.dir, or set these as they were"
        )


def _alike(key: str, there: Any, here: Any) -> bool:
    """Whether a field is the same. Points stand in the order of their costs, which follows from the other fields."""
    return sorted(there) == sorted(here) if key == "points" else bool(there == here)


INITIAL = ("drop_path", "init_std", "time_init_std")  # of no consequence for weights that are there already


def load_model(source: str | Path, expected: ModelConfig | None = None) -> TimeSformer:
    """The trained model of a checkpoint file or of a run folder's newest one (its EMA where it has one), in eval mode.

    With `expected`, a checkpoint of another architecture is refused. Raises `CheckpointError`.
    """
    checkpoint = find_checkpoint(Path(source), train_checkpoints)
    if expected is not None:
        require_same(checkpoint.path, expected, checkpoint.meta["model"], "model", free=INITIAL)
    model = TimeSformer(ModelConfig(**checkpoint.meta["model"]), tuple(checkpoint.meta["classes"]))
    load_tensors(model, checkpoint.tensors_under("ema") or checkpoint.tensors_under("model"), checkpoint.path)
    return model.eval()


def find_checkpoint(source: Path, checkpoints_of: Callable[[Path], Checkpoints]) -> Checkpoint:
    """Loads a checkpoint file, or the newest checkpoint of a run folder.

    Args:
        source: A checkpoint file or a run folder.
        checkpoints_of: Gives the checkpoints of one stage of a run folder, such as `train_checkpoints`.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read, or it is of another stage.
    """
    checkpoints = checkpoints_of(source)
    if not source.is_dir():
        return load_checkpoint(source, checkpoints.kind)
    found = checkpoints.latest()
    if found is None:
        verb = "train" if checkpoints.kind == "train" else "assign"
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint there; run `videoadapt {verb}` first")
    return found


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies tensors into a module of the same structure. Raises `CheckpointError`, naming a tensor that differs."""
    own = module.state_dict()
    wrong = [n for n in own if n not in tensors or tensors[n].shape != own[n].shape] + [
        n for n in tensors if n not in own
    ]
    if wrong:
        raise CheckpointError(f"{path}: tensor {wrong[0]} (and {len(wrong) - 1} more) does not fit this architecture")
    module.load_state_dict(dict(tensors))


def weights_digest(module: nn.Module) -> str:
    """Returns 12 hex digits of SHA-256 over the names and bytes of all tensors of a module."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state by parameter name: `optimizer/PARAMETER/KEY`."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"optimizer/{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if value is not None
    }


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Puts a checkpoint's optimizer state back, each tensor beside its parameter (the step count stays on the CPU)."""
    parameters = dict(module.named_parameters())
    for name, value in checkpoint.tensors_under("optimizer").items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = value.to("cpu" if key == "step" else parameter.device)
