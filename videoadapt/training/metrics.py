"""Training curves as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

from videoadapt.runtime.files import replacing


class Metrics:
    """Training curves: one JSON object a line in `metrics.jsonl`, and the same numbers for TensorBoard.

    Lines of steps after `step` (a run that was interrupted after its last checkpoint) are dropped when it is opened.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines if _step(line) <= step), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Scalars of one step."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is pending."""
        self._file.close()
        self._writer.close()


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line torn by a crash
