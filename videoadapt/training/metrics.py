"""The reports of a training run: a line per step and per validation (`Metrics`), and a summary (`TrainSummary`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from videoadapt.config.load import Config
from videoadapt.errors import UserError, plural
from videoadapt.runtime.console import percent, say
from videoadapt.runtime.files import read_json, replacing
from videoadapt.runtime.results import Result, Table
from videoadapt.training.tracker import Tracker


@dataclass(frozen=True)
class Validation:
    """One validation. It has no time, so that an interrupted run has the same validations as an uninterrupted one."""

    step: int  # steps done
    epoch: int  # epochs done
    videos: str  # in words, such as `val`
    read: int  # videos that could be read
    failed: list[dict[str, str]]  # path and cause of the others
    values: dict[str, float | None]  # `loss/POINT`, `top1/POINT`, `top5/POINT`; None if not finite

    def value(self, metric: str) -> float | None:
        """Returns the value of `train.best_metric`: of one point, or the mean over all points; None if not finite."""
        found = [value for name, value in self.values.items() if metric in (name, name.partition("/")[0])]
        numbers = [value for value in found if value is not None]
        return sum(numbers) / len(numbers) if found and len(numbers) == len(found) else None


def best_metric(config: Config) -> str:
    """Returns the name of what the best checkpoint is best in, such as `top1/14`."""
    return config.train.best_metric or f"top1/{config.model.points[0]}"


def best_validation(validations: Sequence[Validation], config: Config) -> Validation | None:
    """Returns the best validation by `train.best_metric`, of equal ones the first; None if none has a finite value.

    Validations on other videos than the latest one, from before a change of `data.validate`, are not compared.
    """
    metric = best_metric(config)
    sign = -1.0 if metric.startswith("loss") else 1.0
    comparable = [each for each in validations if each.videos == validations[-1].videos]
    finite = [(sign * value, each) for each in comparable if (value := each.value(metric)) is not None]
    return max(finite, key=lambda pair: pair[0])[1] if finite else None  # `max` returns the first of equal ones


def out_of_patience(validations: Sequence[Validation], config: Config) -> bool:
    """Returns whether the latest `train.patience` validations were not better than the best one before them."""
    best = best_validation(validations, config)
    since = len(validations) - (validations.index(best) + 1 if best else 0)
    return config.train.patience is not None and since >= config.train.patience


class Metrics:
    """Writes the values of each step to `metrics.jsonl`, those of validations to `validation.jsonl`, a JSON line each.

    TensorBoard gets them too, and so does the tracker of the run.

    Attributes:
        before_s: Seconds of training before this call, up to the last step that is kept.
    """

    def __init__(self, folder: Path, step: int, validated: int | None = None, tracker: Tracker | None = None) -> None:
        """Opens the files of a run.

        Args:
            folder: The run folder; created if needed.
            step: The step at which training starts. Later lines are removed: they come from a run that was killed
                after its last checkpoint, and their steps are trained again.
            validated: The step of the latest validation that is not repeated, 0 before the first one; later ones are
                removed. None: the run has no validation, and no file of them.
            tracker: Gets the same values.
        """
        from torch.utils.tensorboard import SummaryWriter  # here, since the import takes a second

        folder.mkdir(parents=True, exist_ok=True)
        self._file = _lines_up_to(folder / "metrics.jsonl", step, _step_of)
        self.before_s = _last_seconds(folder / "metrics.jsonl")
        self._validations: TextIOWrapper | None = None
        if validated is not None:
            self._validations = _lines_up_to(folder / "validation.jsonl", validated, _validated_step_of)
        skipped = folder / "skipped.jsonl"  # of `State.list_skipped`, whose steps count from 0
        if skipped.exists():
            _lines_up_to(skipped, step - 1, _validated_step_of).close()
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._tracker = tracker

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step, by name."""
        _write_line(self._file, {"step": step, **values})
        self._plot(step, values)

    def write_validation(self, validation: Validation, seconds: float) -> None:
        """Writes a validation and its time."""
        assert self._validations is not None, "opened without validations"
        line = {name: value for name, value in vars(validation).items() if name != "values"}
        _write_line(self._validations, line | {"seconds": round(seconds, 3)} | validation.values)
        finite = {name: value for name, value in validation.values.items() if value is not None}
        self._plot(validation.step, {f"validation_{name}": value for name, value in finite.items()})
        self._plot(validation.step, {"validation_seconds": seconds})

    def _plot(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(step, values)

    def close(self) -> None:
        """Writes pending values and closes the files."""
        self._file.close()
        if self._validations is not None:
            self._validations.close()
        self._writer.close()
        if self._tracker is not None:
            self._tracker.close()


def _lines_up_to(path: Path, step: int, step_of: Callable[[str], float | None]) -> TextIOWrapper:
    """Removes the damaged lines of a file and those after a step, and opens it to append further lines."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    damaged = [number for number, line in enumerate(lines, start=1) if step_of(line) is None]
    if damaged and damaged != [len(lines)]:  # a crash tears the last line only, whose step is trained again
        say(f"{path}: removed {plural(len(damaged), 'damaged line')}, the first is line {damaged[0]}")
    with replacing(path) as temporary:
        kept = (f"{line}\n" for line in lines if (of := step_of(line)) is not None and of <= step)
        temporary.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def _last_seconds(path: Path) -> float:
    """Returns `seconds` of the last line; 0 if there is no line, or an earlier version wrote it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1]).get("seconds", 0.0)) if lines else 0.0


def _write_line(file: TextIOWrapper, values: Mapping[str, Any]) -> None:
    try:
        file.write(json.dumps(values) + "\n")
        file.flush()  # so that people can follow, and a kill loses nothing
    except OSError as error:  # a full disk; a failed write does not say of which file it was
        error.filename = file.name
        raise


def _step_of(line: str) -> float | None:
    """Returns the step of a line; None if the line is damaged, or was torn by a crash."""
    try:
        values = json.loads(line)
        return float(values["step"]) if all(isinstance(value, (int, float)) for value in values.values()) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _validated_step_of(line: str) -> float | None:
    """Returns the step of a line of `validation.jsonl` or `skipped.jsonl`, which have more than numbers."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


@dataclass(frozen=True)
class PointMetrics:
    """Of one point. Loss and top-1 are means over the last epoch, on the training clips; None if it was not drawn."""

    loss: float | None
    top1: float | None  # fraction of correct clips, 0 to 1
    mfu: float | None = None  # since the start or the last resume, 0 to 1; None if too few steps were timed


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint that `run.checkpoint: best` selects."""

    metric: str  # such as `top1/14`
    value: float
    epoch: int  # epochs done
    step: int  # steps done
    videos: str  # of the validation, in words, such as `val`
    checkpoint: str  # path


@dataclass(frozen=True, repr=False)
class TrainSummary(Result):
    """A finished run; the content of `train.json`."""

    steps: int
    epochs: int  # done; of an early stop in an earlier version, those of the config
    clips: int  # readable training clips of an epoch
    skipped: int  # clips that could not be read, over all epochs
    manifest: str  # hash
    checkpoint: str | None  # path of the newest checkpoint
    seconds: float  # of all calls that trained the run, without the steps that were lost in an interruption
    clips_per_s: float  # sum over all ranks; since the start or the last resume, as is the next one
    wait_fraction: float  # fraction of the time spent waiting for data, 0 to 1
    peak_memory_bytes: int
    points: dict[str, PointMetrics]
    validation: dict[str, Any] | None = None  # the last one, with the fields of `Validation`; None without validation
    validation_s: float = 0.0  # time of all validations
    best: BestCheckpoint | None = None  # None without validation
    stopped_early: bool = False  # by `train.patience`
    ended: str = ""  # date, time and offset from UTC; empty in runs of earlier versions, as is `host`
    host: str = ""

    def table(self) -> Table:
        """Returns loss and top-1 of each point in the last epoch, and top-1 in the last validation."""
        values = self.validation["values"] if self.validation else {}
        rows = [
            # A point that was not drawn in the last epoch has no figures.
            (
                point,
                "-" if v.loss is None else f"{v.loss:.3f}",
                *("-" if top1 is None else percent(top1) for top1 in (v.top1, values.get(f"top1/{point}"))),
            )
            for point, v in self.points.items()
        ]
        title = f"{plural(self.steps, 'step')}, {plural(self.epochs, 'epoch')} of {plural(self.clips, 'clip')}"
        return Table(title, ("point", "train loss", "train top-1 %", "validation top-1 %"), rows)

    @classmethod
    def read(cls, path: Path) -> TrainSummary:
        """Returns the summary that was written to a file.

        Raises:
            UserError: The file is damaged.
        """
        remedy = "delete it, and run `train` again, which writes it anew from the last checkpoint"
        values = read_json(path, remedy)
        if "wait_share" in values:  # the name of the key in older runs
            values["wait_fraction"] = values.pop("wait_share")
        try:
            points = {point: PointMetrics(**metrics) for point, metrics in values.pop("points").items()}
            best = BestCheckpoint(**values.pop("best")) if values.get("best") else None
            return cls(points=points, **values | {"best": best})
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: damaged, or of another version; {remedy}") from None
