"""Checkpoints: one safetensors file each, with all other data as JSON in the header of the file.

A file is written to a temporary name, synced to disk and renamed, so that a crash leaves no half-written checkpoint
under the final name. The header has a checksum of all tensors and values, because a disk or a network can change bits
that safetensors reads without an error. Loading never unpickles. The names of the tensors on disk begin with a prefix:
`model/`, `ema/`, `optimizer/`, `trained/`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from videoadapt.config.load import RUN_CONFIG, load_config
from videoadapt.config.parse import require_regular
from videoadapt.config.sections import ModelConfig, Section
from videoadapt.errors import CheckpointError, RunError, shown
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.console import say
from videoadapt.runtime.files import replacing
from videoadapt.runtime.inputs import NO_EFFECT_ONCE_TRAINED, different_settings

V = TypeVar("V")

KEY = "videoadapt"  # key of our JSON in the safetensors header; other programs use other keys
VERSION = 1  # version of the format; a file of another version is refused
Guard = Callable[[], AbstractContextManager[None]]  # see `Checkpoints.guard`
_CHECKSUM = "checksum"  # key in our JSON
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
# What safetensors and JSON raise for a file that is damaged, or that somebody has written by hand.
_DAMAGE = (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError, RuntimeError)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    path: Path
    tensors: dict[str, Tensor]  # by name: `model/head.bias`, `ema/head.bias`, `optimizer/head.bias/exp_avg`
    meta: dict[str, Any]  # the JSON of the header, with `kind`, `version` and `step`, without the checksum

    def tensors_under(self, prefix: str) -> dict[str, Tensor]:
        """Returns the tensors whose names begin with `prefix/`, named without it."""
        return {name.removeprefix(f"{prefix}/"): t for name, t in self.tensors.items() if name.startswith(f"{prefix}/")}

    def value(self, key: str, kind: type[V]) -> V:
        """Returns a value of the header.

        Raises:
            CheckpointError: It is missing, or of another type: the header was written by hand.
        """
        found = self.meta.get(key)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise CheckpointError(
                f"{self.path}: its header has no valid {key}, but {shown(found)}; name another checkpoint"
            )
        return found


def save_checkpoint(path: Path, kind: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint atomically: after an error, no partial file is left.

    Args:
        path: The file, replaced if it exists. Missing folders are created.
        kind: The stage of the checkpoint: `train` or `assigner`.
        tensors: Tensors by name. They may be views or parameters, on any device.
        meta: Values that JSON can represent.

    Raises:
        RunError: The file cannot be written, for example because the disk is full. An earlier file is unchanged.
    """
    values = {"kind": kind, "version": VERSION, **meta}
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}  # no transposed views
    header = {KEY: json.dumps(values | {_CHECKSUM: _checksum(ready, values)})}
    try:
        with replacing(path) as temporary:
            save_file(ready, temporary, metadata=header)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot save this checkpoint ({error}); earlier checkpoints are intact") from error


def load_checkpoint(path: Path, kind: str) -> Checkpoint:
    """Reads a checkpoint onto the CPU, and compares it with its checksum.

    Prints a message about a file without a checksum, which an older version wrote.

    Args:
        path: The file.
        kind: The expected stage: `train` or `assigner`.

    Raises:
        CheckpointError: The file does not exist, is damaged, is not a checkpoint, or belongs to another stage.
    """
    try:
        require_regular(Path(path))
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except _DAMAGE as error:  # ValueError: the header is not JSON
        raise CheckpointError(f"{path}: torn or not a checkpoint ({str(error)[:200]}); name another one") from None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: not a checkpoint of this version of videoadapt. Pretrained weights are loaded with train.init"
        )
    recorded = header.pop(_CHECKSUM, None)
    if recorded is None:
        say(f"{path}: was written without a checksum, by an older version; damage in it cannot be found")
    elif recorded != _checksum(tensors, header):
        raise CheckpointError(f"{path}: damaged, its tensors or settings differ from its checksum; name another one")
    if header.get("kind") != kind:
        raise CheckpointError(
            f"{path}: expected a checkpoint of kind {kind}, got one of kind {str(header.get('kind'))[:40]}"
        )
    return Checkpoint(Path(path), tensors, header)


def _checksum(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> str:
    """Returns 64 hex digits of SHA-256 over the values as JSON, and over name, type, shape and bytes of the tensors."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    # As uint8, because numpy has no bfloat16.
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage: `step-00000120.safetensors` and so on in a folder, and the texts `last` and `best`.

    `last` names the newest complete checkpoint. It is written after the checkpoint itself. `best` names the best one of
    the validations while training.
    """

    folder: Path
    kind: str  # `train` or `assigner`
    keep: int = 2  # number of checkpoints to keep: two, so that one remains if the newest is damaged
    guard: Guard = nullcontext  # entered around every write; raises if this process no longer owns the run folder

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of a step, points `last` to it, and removes all but the newest `keep` and the best one.

        Args:
            step: The number of optimizer steps that are done.
            tensors: Tensors by name, with a prefix; see `save_checkpoint`.
            meta: Values that JSON can represent; `step` is added.

        Returns:
            The file.

        Raises:
            RunError: The checkpoint or `last` cannot be written, or `guard` refuses the write.
        """
        with self.guard():
            return self._save(step, tensors, meta)

    def _save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        path = self.path_of(step)
        save_checkpoint(path, self.kind, tensors, {"step": step, **meta})
        self._point("last", path)
        # Only now: until `last` names the new checkpoint, a resumed run would load an older one.
        best = self.named_by("best")
        for old in self._files(up_to=step)[self.keep :]:
            if old != best:
                old.unlink()
        return path

    def mark_best(self, step: int) -> None:
        """Points `best` to the checkpoint of a step, which then stays whatever `keep` is.

        Raises:
            RunError: `best` cannot be written, or `guard` refuses the write.
        """
        with self.guard():
            self._point("best", self.path_of(step))

    def best(self) -> Checkpoint:
        """Returns the checkpoint that `best` names.

        Raises:
            CheckpointError: Training had no validation, or the file is missing or damaged.
        """
        path = self.named_by("best")
        if path is None:
            raise CheckpointError(
                f"{self.folder / 'best'}: names no checkpoint; train with train.validate_every above 0, or leave out "
                "run.checkpoint=best"
            )
        return load_checkpoint(path, self.kind)

    def is_best(self, path: Path) -> bool:
        """Returns whether `best` names this file."""
        return self.named_by("best") == path

    def named_by(self, pointer: str) -> Path | None:
        """Returns the file that the text file `best` or `last` names; None if it is missing or damaged."""
        try:
            name = _NAME.fullmatch((self.folder / pointer).read_text(encoding="utf-8", errors="replace").strip())
        except OSError:
            return None
        return self.folder / name[0] if name else None

    def path_of(self, step: int) -> Path:
        """Returns the file of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}.safetensors"  # zeros in front: names sort by step

    def _point(self, pointer: str, path: Path) -> None:
        try:
            with replacing(self.folder / pointer) as temporary:
                temporary.write_text(path.name, encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.folder / pointer}: cannot be written ({error}); {path} is complete") from error

    def exist(self) -> bool:
        """Returns whether the folder has a checkpoint, readable or not."""
        return bool(self._files())

    def latest(self) -> Checkpoint | None:
        """Returns the newest checkpoint that can be read, or None if the folder has none.

        A damaged checkpoint is skipped with a message, and the previous one is read.

        Raises:
            CheckpointError: There are checkpoints, but none can be read, or all are newer than `last` says. A silent
                restart would lose the run.
        """
        files = self._announced()
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

    def _announced(self) -> list[Path]:
        """Returns the files up to the one that `last` names, newest first; prints a message if `last` is not in order.

        A file newer than `last` names is left out: its save did not come to its end.
        """
        files, last = self._files(), self.folder / "last"
        text = last.read_text(encoding="utf-8", errors="replace").strip() if last.exists() else ""
        named = _NAME.fullmatch(text)
        if named is None:
            if last.exists() and files:
                say(f"{last}: damaged; {files[0].name}, the newest file, is used")
            return files
        announced = self._files(up_to=int(named[1]))
        newer = files[: len(files) - len(announced)]
        if newer and not announced:
            raise CheckpointError(
                f"{last}: names {text}, but only newer checkpoints are there, such as {newer[-1].name}; delete {last} "
                "to use the newest of them, or move all of them away to start again"
            )
        if newer:
            say(f"{newer[0]}: not used, because {last} names {text}")
        if announced and announced[0].name != text:
            say(f"{self.folder / text}: no such file, although {last} names it; {announced[0].name} is used")
        return announced

    def _files(self, up_to: int | None = None) -> list[Path]:
        """Returns the checkpoint files up to a step, newest first."""
        steps = {path: int(name[1]) for path in self.folder.glob("step-*") if (name := _NAME.fullmatch(path.name))}
        return sorted((p for p in steps if up_to is None or steps[p] <= up_to), key=lambda p: steps[p], reverse=True)


def train_checkpoints(run: Path, keep: int = 2, guard: Guard = nullcontext) -> Checkpoints:
    """Returns the checkpoints of stage 1 (training) of a run folder."""
    return Checkpoints(run / "checkpoints", "train", keep, guard)


def require_same(
    path: Path,
    ours: Section,
    theirs: Mapping[str, Any],
    name: str,
    *,
    free: tuple[str, ...] = (),
    otherwise: str = "use another run.dir",
) -> None:
    """Checks that a section of the config equals the section in a checkpoint, by `different_settings`.

    Args:
        path: The checkpoint's file, for the message.
        ours: The section of the present config.
        theirs: The section in the checkpoint, as JSON values.
        name: The name of the section in the config, such as `model`.
        free: Fields that may differ.
        otherwise: What to do to keep the present values, for the message.

    Raises:
        CheckpointError: Fields differ; the message names each of them with both values.
    """
    differ = different_settings(type(ours)(), ours.model_dump(mode="json"), theirs, free)
    if differ:
        listed = "; ".join(
            f"{name}.{key} is {shown(recorded)} in the checkpoint, {shown(present)} in the config"
            for key, recorded, present in differ
        )
        raise CheckpointError(
            f"{path}: this checkpoint was trained with other settings: {listed}. "
            f"Use the checkpoint's values, or {otherwise}"
        )


def load_model(source: str | Path, expected: ModelConfig | None = None) -> TimeSformer:
    """Loads a trained model.

    Args:
        source: A run folder, whose newest checkpoint is loaded, or a checkpoint file. `RUN/checkpoints/best` is the
            best one of the validations while training.
        expected: The architecture that the model must have.

    Returns:
        The model on the CPU in eval mode, with the moving average of the weights (EMA) if the checkpoint has one.

    Raises:
        CheckpointError: There is no checkpoint, it cannot be read, its architecture is not the expected one, or its
            weights are NaN or infinite.
    """
    return restore_model(find_checkpoint(Path(source), train_checkpoints), expected)


def restore_model(checkpoint: Checkpoint, expected: ModelConfig | None = None) -> TimeSformer:
    """Builds the model of a checkpoint of stage 1; see `load_model`."""
    try:
        config, classes = ModelConfig(**checkpoint.meta["model"]), tuple(map(str, checkpoint.meta["classes"]))
    except (KeyError, TypeError, ValueError) as error:  # ValueError: pydantic's, and ours
        raise CheckpointError(
            f"{checkpoint.path}: its settings describe no model ({' '.join(str(error).split())[:200]})"
        ) from None
    if expected is not None:
        require_same(checkpoint.path, expected, checkpoint.meta["model"], "model", free=NO_EFFECT_ONCE_TRAINED)
    model = TimeSformer(config, classes)
    load_tensors(model, checkpoint.tensors_under("ema") or checkpoint.tensors_under("model"), checkpoint.path)
    return model.eval()


def find_checkpoint(source: Path, checkpoints_of: Callable[[Path], Checkpoints]) -> Checkpoint:
    """Loads a checkpoint file, or the newest checkpoint of a run folder.

    Args:
        source: A checkpoint file, `best` or `last` in a folder of checkpoints, a run folder, or a folder with a config
            whose run is meant, as `new` writes it.
        checkpoints_of: Returns the checkpoints of one stage of a run folder, such as `train_checkpoints`.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or it cannot be read, or it is of another stage.
    """
    checkpoints = checkpoints_of(source)
    if source.is_file() or source.suffix == ".safetensors" or (not source.is_dir() and source.name in ("best", "last")):
        folder = Checkpoints(source.parent, checkpoints.kind)
        named = folder.named_by(source.name) if source.name in ("best", "last") else None
        return load_checkpoint(named or source, checkpoints.kind)  # no other file if the user's file is damaged
    found = checkpoints.latest()
    if found is None and (source / RUN_CONFIG).is_file():
        checkpoints = checkpoints_of(load_config(source).run.dir)
        found = checkpoints.latest()
    if found is None:
        verb = "train" if checkpoints.kind == "train" else "assign"
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint there; run `videoadapt {verb}` first")
    return found


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies tensors into a module of the same structure.

    Args:
        module: Filled in place; unchanged if the tensors do not fit.
        tensors: One tensor for each entry of the module's state dict, by the same name, and no others.
        path: The file of the tensors, for the message.

    Raises:
        CheckpointError: A tensor is missing, has another shape, is not in the module, or has NaN or infinite values;
            the message names it.
    """
    expected = module.state_dict()
    wrong = [n for n in expected if n not in tensors or tensors[n].shape != expected[n].shape]
    wrong += [n for n in tensors if n not in expected]
    if wrong:
        raise CheckpointError(f"{path}: tensor {wrong[0]} (and {len(wrong) - 1} more) does not fit this architecture")
    require_finite(tensors, path)
    module.load_state_dict(dict(tensors))


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Checks that weights can give an answer: the logits of a NaN are NaN, and their largest is the first class.

    Args:
        tensors: The tensors by name; those that are not floating point are not checked.
        path: The file of the tensors, for the message.

    Raises:
        CheckpointError: A tensor has NaN or infinite values; the message names it.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{path}: {count} of {tensor.numel()} values of {name} are NaN or infinite, so that the model has no "
                "answers. Move the file away to use the checkpoint before it, or train again with a lower train.lr"
            )


def weights_digest(module: nn.Module) -> str:
    """Returns 12 hex digits of SHA-256 over the names and bytes of all tensors of a module."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()[:12]


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state as tensors named `optimizer/PARAMETER/KEY`, such as `optimizer/head.bias/exp_avg`.

    torch identifies parameters by numbers. Names do not depend on the order of parameter groups.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        f"optimizer/{names[id(parameter)]}/{key}": torch.as_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if value is not None  # SGD without momentum keeps None
    }


def restore_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Restores an optimizer's state from a checkpoint, in place, on the devices of the module's parameters.

    Raises:
        CheckpointError: A tensor belongs to no parameter, or has NaN or infinite values.
    """
    parameters = dict(module.named_parameters())
    tensors = checkpoint.tensors_under("optimizer")
    require_finite(tensors, checkpoint.path)
    for name, value in tensors.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters.get(parameter_name)
        if parameter is None or value.numel() not in (1, parameter.numel()):
            raise CheckpointError(f"{checkpoint.path}: tensor optimizer/{name} does not fit this architecture")
        # The step count, too: fused optimizers keep it on the device.
        optimizer.state[parameter][key] = value.to(parameter.device)
