"""Clips for code of one's own: `ClipDataset` for torch's `DataLoader`, `read_clips` for a `Router`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from videoadapt.config.load import RUN_CONFIG, Config, ConfigSource, as_config, load_config
from videoadapt.data.clips.datasets import Clip, EvalVideos, Failure, TrainClips, VideoViews, read_views
from videoadapt.data.index.manifest import Manifest, index_folder, manifest_path
from videoadapt.data.index.sources import Split
from videoadapt.data.video.limits import Limits
from videoadapt.data.video.readers import open_video
from videoadapt.errors import UserError, VideoError
from videoadapt.runtime.console import say


class Sample(NamedTuple):
    """One item of a `ClipDataset`, or a batch of them, as torch's default collate function makes it.

    Attributes:
        clip: uint8 `(C, T, S, S)` for training, `(V, C, T, S, S)` for evaluation: V = clips x crops of the video. A
            batch has one more dimension in front. `preprocess` makes the input of a model from it.
        label: Number of the video's class; of a batch, int64 `(B,)`.
        path: The video; of a batch, a tuple.
    """

    clip: Tensor
    label: int | Tensor
    path: str | tuple[str, ...]


class SampleBatch(NamedTuple):
    """A batch that `ClipDataset.collate` makes: the fields of `Sample`, and the videos that could not be read."""

    clip: Tensor
    label: Tensor
    path: list[str]
    failures: list[Failure]


class ClipViews(NamedTuple):
    """The views of a video in memory, an item of `va.Router`.

    Attributes:
        views: uint8 `(K, X, C, T, S, S)`: X crops of each of K clips. Of one clip `(X, C, T, S, S)` or `(C, T, S, S)`.
        thumbnails: uint8 `(K, C, A, s, s)`, small whole frames for the assigner.
        right: Whether the model is right on each clip at each point, bool `(K, points)`, for policies that need the
            truth.
    """

    views: Tensor
    thumbnails: Tensor | None = None
    right: npt.NDArray[np.bool_] | None = None


def read_clips(video: str | Path, config: ConfigSource) -> ClipViews:
    """Reads the views and thumbnails of a video as an evaluation does, for `va.Router`.

    Args:
        video: The path of a video, of an image, or of a folder of frames.
        config: A `Config`, a YAML file or a run folder: model input, views, and the size of thumbnails.

    Raises:
        VideoError: The video cannot be read.
    """
    config = as_config(config)
    with open_video(video, config.data.reader, limits=Limits.of(config.data)) as reader:
        evaluate = config.evaluate
        views, thumbnails, _ = read_views(
            reader, config, temporal_views=evaluate.temporal_views, spatial_crops=evaluate.spatial_crops
        )
    return ClipViews(views, thumbnails)


class ClipDataset(Dataset[Sample | Failure]):
    """The clips of a manifest or of a folder, for `torch.utils.data.DataLoader`.

    A training clip is cut at random: where, depends on (`run.seed`, epoch, id of the video) alone, so neither workers
    nor the order of reading change it. It is the clip that `va.train` uses. Call `set_epoch` before each epoch.

    A video is never replaced by another one. A video that `index` could not read is not in the data set; `unreadable`
    lists it, and a message counts it. A video that fails later raises `VideoError`, or returns a `Failure` if
    `on_error` is `return`; `DataLoader(..., collate_fn=dataset.collate)` then makes batches without it.

    Args:
        source: A `Manifest`, a run folder, the folder that `new` writes, or a manifest's file; or a folder with a
            folder of videos per class. Such a folder is indexed in memory at once, which reads the head of each file;
            nothing is written.
        config: A `Config`, a YAML file or a run folder: seed, model input, augmentation and views.
        split: The split of the manifest: `train`, `val` or `holdout`. None: all videos.
        views: `train` gives one random augmented clip of a video, `evaluation` all its views. Default: `train` for the
            split `train` and for a folder, `evaluation` otherwise.
        on_error: `raise`, or `return` a `Failure`.

    Attributes:
        manifest: The videos in the order of the index.
        classes: Names of the classes in label order.
        unreadable: Path and cause of each video that is left out, because `index` could not read it.

    Raises:
        UserError: There is no readable video, or the source cannot be used.

    Example:
        >>> dataset = va.ClipDataset("runs/mine", "runs/mine", split="train")
        >>> loader = DataLoader(dataset, batch_size=8, shuffle=True, num_workers=4)
    """

    def __init__(
        self,
        source: Manifest | str | Path,
        config: ConfigSource,
        *,
        split: Split | None = None,
        views: Literal["train", "evaluation"] | None = None,
        on_error: Literal["raise", "return"] = "raise",
    ) -> None:
        config = as_config(config)
        listed = _manifest(source, config)
        listed = listed if split is None else listed.split(split)
        self.manifest, self.classes, self.on_error = listed.readable, listed.classes, on_error
        self.unreadable = [(row.path, row.cause) for row in listed if row.status != "ok"]
        if self.unreadable:
            first = ": ".join(self.unreadable[0])
            say(f"{len(self.unreadable)} of {len(listed)} videos cannot be read and are left out; the first: {first}")
        if not len(self.manifest):
            raise UserError(f"ClipDataset: none of the {len(listed)} videos of {source} can be read (split {split})")
        training = split == "train" or (split is None and not isinstance(source, Manifest) and Path(source).is_dir())
        self.views = views or ("train" if training else "evaluation")
        self._train = TrainClips(self.manifest, config)
        evaluate = config.evaluate
        self._evaluation = EvalVideos(
            self.manifest,
            config,
            temporal_views=evaluate.temporal_views,
            spatial_crops=evaluate.spatial_crops,
            thumbnails=False,
        )
        # In shared memory, so that `set_epoch` also reaches workers that live longer than an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.manifest)

    def __repr__(self) -> str:
        return f"<ClipDataset: {len(self)} videos of {len(self.classes)} classes, {self.views} views>"

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which decides where training clips are cut; call it before the `DataLoader` is iterated."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample | Failure:
        """Reads the clip, or the views, of one video.

        Raises:
            IndexError: There is no such video.
            VideoError: The video cannot be read, and `on_error` is `raise`.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"ClipDataset: has no video {index}; it has {len(self)}")
        row = index % len(self)
        item = self._train[int(self._epoch), row] if self.views == "train" else self._evaluation[row]
        if isinstance(item, Failure):
            if self.on_error == "return":
                return item
            raise VideoError(f"{item.path}: {item.cause}")
        return Sample(_frames(item), item.label, self.manifest.row(row).path)

    @staticmethod
    def collate(items: Sequence[Sample | Failure]) -> SampleBatch:
        """Makes a batch of the items that could be read, and lists the others; for `on_error="return"`.

        The clips of a batch without a readable video are an empty tensor.
        """
        samples = [item for item in items if isinstance(item, Sample)]
        return SampleBatch(
            clip=torch.stack([sample.clip for sample in samples]) if samples else torch.empty(0, dtype=torch.uint8),
            label=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            path=[str(sample.path) for sample in samples],
            failures=[item for item in items if isinstance(item, Failure)],
        )


def _frames(item: Clip | VideoViews) -> Tensor:
    return item.frames if isinstance(item, Clip) else item.views.flatten(0, 1)  # (K, X, ...) -> (V, C, T, S, S)


def _manifest(source: Manifest | str | Path, config: Config) -> Manifest:
    if isinstance(source, Manifest):
        return source
    path = Path(source)
    if not path.is_dir():
        return Manifest.load(path)
    in_run = manifest_path(path)
    if not in_run.exists() and (path / RUN_CONFIG).is_file():  # a folder that `new` has written
        in_run = manifest_path(load_config(path).run.dir)
        if not in_run.exists():
            raise UserError(f"ClipDataset: {path}: its run has no manifest; run `videoadapt index {path}` first")
    return Manifest.load(in_run) if in_run.exists() else index_folder(path, config)
