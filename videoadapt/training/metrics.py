"""The reports of a training run: one line per step (`Metrics`) and one summary at the end (`TrainSummary`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from videoadapt.errors import UserError
from videoadapt.runtime.console import say
from videoadapt.runtime.files import read_json, replacing


class Metrics:
    """Writes the values of each step as a JSON line to `metrics.jsonl`, and to TensorBoard."""

    def __init__(self, folder: Path, step: int) -> None:
        """Opens the files of a run.

        Args:
            folder: The run folder; created if needed.
            step: The step at which training starts. Later lines are removed: they come from a run that was killed
                after its last checkpoint, and their steps are trained again.
        """
        from torch.utils.tensorboard import SummaryWriter  # here, since the import takes a second

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        damaged = [number for number, line in enumerate(lines, start=1) if _step_of(line) is None]
        if damaged and damaged != [len(lines)]:  # a crash tears the last line only, whose step is trained again
            say(f"{path}: {len(damaged)} damaged lines are removed, the first is line {damaged[0]}")
        with replacing(path) as temporary:
            kept = (f"{line}\n" for line in lines if (of := _step_of(line)) is not None and of <= step)
            temporary.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of one step, by name."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()  # so that people can follow, and a kill loses nothing
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes pending values and closes the files."""
        self._file.close()
        self._writer.close()


def _step_of(line: str) -> float | None:
    """Returns the step of a line; None if the line is damaged, or was torn by a crash."""
    try:
        values = json.loads(line)
        return float(values["step"]) if all(isinstance(value, (int, float)) for value in values.values()) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


@dataclass(frozen=True)
class PointMetrics:
    """Means over the last epoch, on the training clips; None for a point that was not drawn in it."""

    loss: float | None
    top1: float | None  # fraction of correct clips, 0 to 1


@dataclass(frozen=True)
class TrainSummary:
    """A finished run; the content of `train.json`."""

    steps: int
    epochs: int
    clips: int  # readable training clips of an epoch
    skipped: int  # clips that could not be read, over all epochs
    manifest: str  # hash
    checkpoint: str | None  # path of the newest checkpoint
    seconds: float  # time since the start or the last resume
    clips_per_s: float  # sum over all ranks
    wait_fraction: float  # fraction of the time spent waiting for data, 0 to 1
    peak_memory_bytes: int
    points: dict[str, PointMetrics]

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
            return cls(points=points, **values)
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: damaged, or of another version; {remedy}") from None
