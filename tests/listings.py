"""Writes annotations for tests, and lists the videos of a config."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from videoadapt.config.load import Config, make_config
from videoadapt.data.index.annotations import Listing, list_videos

SOURCE = "0wR5jVB-WPk"
CLIP = f"{SOURCE}_000417_000427"
COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")


def config_of(num_classes: int = 3, seed: int = 0, **data: Any) -> Config:
    """Returns a config with `data` settings. `train=PATH` and `val=PATH` are the annotations."""
    for split in ("train", "val"):
        if split in data:
            data[split] = {"annotations": str(data[split])}
    values = {key: str(value) if isinstance(value, Path) else value for key, value in data.items()}
    return make_config({"run": {"seed": seed}, "data": values, "model": {"num_classes": num_classes}})


def listing_of(num_classes: int = 3, **data: Any) -> Listing:
    return list_videos(config_of(num_classes, **data))


def labels_of(listing: Listing) -> dict[str, int]:
    return {video.video: video.label for video in listing.videos}


def touch(root: Path, *names: str) -> Path:
    """Creates empty files below a folder and returns the folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, rows: Iterable[Sequence[Any]], columns: Sequence[str] = COLUMNS) -> Path:
    return write(path, "".join(",".join(map(str, row)) + "\n" for row in [columns, *rows]))


def relative_paths(listing: Listing, root: Path) -> list[str]:
    return [os.path.relpath(video.path, root) for video in listing.videos]
