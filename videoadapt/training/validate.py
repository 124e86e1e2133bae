"""Validation while training: loss, top-1 and top-5 of each point, on videos that are not trained on.

A video gives one view, the clip at `evaluate.single_clip` and its centre crop; an evaluation has more. The weights are
those that inference uses: the moving average where there is one. No random number is drawn, so that validations change
nothing in the training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from videoadapt.config.load import Config
from videoadapt.config.sections import TOP5
from videoadapt.data.clips.datasets import EvalVideos, Failure, VideoViews
from videoadapt.data.clips.loader import stream
from videoadapt.data.clips.views import normalise
from videoadapt.data.index.manifest import Manifest
from videoadapt.data.index.sources import Split
from videoadapt.errors import RunError, plural
from videoadapt.model.checkpoint import Checkpoint, train_checkpoints
from videoadapt.model.timesformer import TimeSformer
from videoadapt.runtime.console import percent, say
from videoadapt.runtime.machine import autocast
from videoadapt.runtime.ranks import all_gather, all_reduce_sum, any_requested, rank, world_size
from videoadapt.runtime.seeds import seed_of
from videoadapt.runtime.signals import StopRequest
from videoadapt.training.metrics import Validation, best_metric, best_validation, out_of_patience
from videoadapt.training.state import State

_BATCH = 16  # videos of a forward pass, if `evaluate.batch` is `auto`


@dataclass(frozen=True)
class ValidationVideos:
    """The videos of the validations of a run.

    Attributes:
        rows: Their rows in the manifest, ascending.
        name: The videos in words, such as `val` or `20 % of val`.
    """

    rows: list[int]
    name: str

    @classmethod
    def of(cls, config: Config, manifest: Manifest) -> ValidationVideos | None:
        """Returns the readable videos of `data.validate`; None, with a message, if there are none."""
        where = config.data.validate
        split: Split = "holdout" if where == "holdout" else "val"
        rows = manifest.readable_rows(split).tolist()
        if not rows:
            say(
                "no validation while training: the config has no val split; set data.val.annotations, or "
                "data.holdout=0.1 and data.validate=holdout"
            )
            return None
        if isinstance(where, str):
            return cls(rows, split)
        # By the id of the video alone, so that runs with other seeds have the same videos.
        drawn = sorted(rows, key=lambda row: seed_of("validate", manifest.row(row).video))
        return cls(sorted(drawn[: math.ceil(where * len(rows))]), f"{100 * where:g} % of val")


@dataclass(frozen=True)
class Validator:
    """Validates the model of a run at the ends of epochs (`train.validate_every`).

    Attributes:
        state: The model, the step and the earlier validations.
        videos: None if the run has no validations.
        per_epoch: Steps of an epoch.
    """

    state: State
    videos: ValidationVideos | None
    per_epoch: int

    @classmethod
    def of(cls, state: State, per_epoch: int) -> Validator:
        """Returns the validator of a run."""
        wanted = state.config.train.validate_every > 0
        return cls(state, ValidationVideos.of(state.config, state.manifest) if wanted else None, per_epoch)

    def is_due(self) -> bool:
        """Returns whether the step that training has reached ends an epoch with a validation that is not yet made."""
        if self.videos is None:
            return False
        epoch, rest = divmod(self.state.step, self.per_epoch)
        train, made = self.state.config.train, self.state.validations
        wanted = epoch > 0 and not rest and (epoch % train.validate_every == 0 or epoch == train.epochs)
        return wanted and not (made and made[-1].step == self.state.step)

    def is_last(self) -> bool:
        """Returns whether training ends after the latest validation."""
        ends = self.state.step == self.per_epoch * self.state.config.train.epochs
        return ends or out_of_patience(self.state.validations, self.state.config)

    def validate(self, stop: StopRequest, progress: Callable[[str], None]) -> Validation | None:
        """Validates the model at all points. All ranks call it, and each reads its part of the videos.

        Args:
            stop: A signal ends the validation after a batch.
            progress: Is called with a note after each batch.

        Returns:
            The validation, the same on every rank. None if a rank received a signal.

        Raises:
            RunError: No video can be read.
        """
        assert self.videos is not None, "is_due"
        state, rows, batch = self.state, self.videos.rows, self.state.config.evaluate.batch
        if batch == "auto":  # the same on every rank, beside the memory of training
            batch = _BATCH
        model = state.model if state.ema is None else state.ema.module
        model.eval()
        dataset = EvalVideos(state.manifest, state.config, temporal_views=1, spatial_crops=1, thumbnails=False)
        items = stream(dataset, rows[rank() :: world_size()])
        sums = torch.zeros((len(state.config.model.points), 4), dtype=torch.float64, device=state.device)
        failures: list[Failure] = []
        # As many rounds on every rank, since all meet in `any_requested`. Rank 0 has the most videos.
        for number in range(math.ceil(len(rows[:: world_size()]) / batch)):
            found = list(itertools.islice(items, batch))
            failures += [item for item in found if isinstance(item, Failure)]
            views = [item for item in found if isinstance(item, VideoViews)]
            if views:
                sums += _sums_of(views, model, state)
            progress(f"validating, {min((number + 1) * batch * world_size(), len(rows))}/{len(rows)} videos")
            if any_requested(stop):
                return None
        totals = all_reduce_sum(sums.cpu())
        return self._validation(totals, sorted(itertools.chain(*all_gather(failures))))

    def _validation(self, totals: Tensor, failures: list[Failure]) -> Validation:
        """Returns the means of the sums over all ranks, (points, 4); see `_sums_of`."""
        assert self.videos is not None, "is_due"
        state, read = self.state, int(totals[0, 3])
        if not read:
            first = failures[0]
            raise RunError(
                f"validation: none of the {len(failures)} videos of {self.videos.name} can be read; the first: "
                f"{first.path}: {first.cause}. Training is saved: run the same command again to continue"
            )
        names = ("loss", "top1", "top5") if state.config.model.num_classes > TOP5 else ("loss", "top1")
        values = {
            f"{name}/{point}": value if math.isfinite(value) else None
            for name, sums in zip(names, totals.T.tolist(), strict=False)  # the counts have no name
            for point, value in zip(state.config.model.points, (total / read for total in sums), strict=True)
        }
        failed = [{"path": failure.path, "cause": failure.cause} for failure in failures]
        return Validation(state.step, state.step // self.per_epoch, self.videos.name, read, failed, values)


def _sums_of(videos: list[VideoViews], model: TimeSformer, state: State) -> Tensor:
    """Returns for each point the sum of the losses, the clips right at first and among five, and the clips: (P, 4)."""
    clips = torch.stack([video.views[0, 0] for video in videos]).to(state.device)  # (B, C, T, S, S)
    labels = torch.tensor([video.label for video in videos], device=state.device)
    inputs = normalise(clips, model.mean, model.std, model.head.weight.dtype)
    rows = []
    for point in state.config.model.points:
        with torch.no_grad(), autocast(state.device, state.config.run.precision):
            logits = model(inputs, point)
        logits = logits.double()  # (B, classes)
        right = logits.topk(min(TOP5, logits.shape[1])).indices == labels[:, None]  # (B, 5), best first
        right &= logits.isfinite().all(1, keepdim=True)  # the largest of NaN would be class 0
        loss = F.cross_entropy(logits, labels, reduction="sum")
        rows.append(torch.stack([loss, right[:, 0].sum(), right.sum(), loss.new_tensor(len(videos))]))
    return torch.stack(rows)


def describe(validation: Validation, seconds: float, state: State) -> str:
    """Returns a validation in one line: top-1 and loss of each point, whether it is the best so far, and its time.

    Args:
        validation: The latest of `state.validations`.
        seconds: The time that it took.
        state: Gives the points, the epochs and the earlier validations.
    """
    config = state.config

    def at(point: str) -> str:
        loss, top1 = validation.values[f"loss/{point}"], validation.values[f"top1/{point}"]
        top1_text = "-" if top1 is None else f"{percent(top1)} %"
        return f"point {point}: top-1 {top1_text}, loss {'not finite' if loss is None else f'{loss:.3f}'}"

    best = best_validation(state.validations, config)
    which = "the best so far" if best is validation else f"the best was epoch {best.epoch}" if best else "not finite"
    failed = f", {len(validation.failed)} cannot be read" if validation.failed else ""
    return (
        f"epoch {validation.epoch}/{config.train.epochs}, {plural(validation.read, 'video')} of "
        f"{validation.videos}{failed}, "
        f"{seconds:.1f} s: {'; '.join(map(at, config.model.points))} ({which} by {best_metric(config)})"
    )


def say_failed(validations: Sequence[Validation]) -> None:
    """Prints the videos that the latest validation could not read, and that no earlier one has named."""
    *earlier, latest = validations
    known = {row["path"] for each in earlier for row in each.failed}
    for row in latest.failed:
        if row["path"] not in known:
            say(f"  not validated: {row['path']}: {row['cause']}")


def selected_on_val(checkpoint: Checkpoint, chosen: bool) -> str | None:
    """Returns in words how a checkpoint was selected by its accuracy on the val split, which an evaluation must state.

    Args:
        checkpoint: A checkpoint of stage 1.
        chosen: Whether the user has named a checkpoint, as opposed to the newest.

    Returns:
        Half a sentence; None if the val split had no part in the selection.
    """
    meta = checkpoint.meta
    where = meta.get("data", {}).get("validate", "holdout")  # an older version had no validations
    if where == "holdout":
        return None
    videos = "the val split" if where == "val" else f"{100 * where:g} % of the val split"
    if chosen and train_checkpoints(checkpoint.path.parent.parent).is_best(checkpoint.path):
        return f"the best of the validations on {videos} while training"
    validations = meta.get("validations") or [{}]
    # Only the last checkpoint of a finished training records the validation of its own step.
    if validations[-1].get("step") == meta["step"] and validations[-1]["epoch"] < meta["train"]["epochs"]:
        return f"where training stopped early, by validations on {videos}"
    return None
