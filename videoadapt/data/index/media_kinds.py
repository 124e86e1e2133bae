"""Keeps one kind of media in a source: videos or images. Pictures beside videos are often thumbnails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

from videoadapt.data.index.sources import AnnotationEntry, AnnotationSource, Split
from videoadapt.data.video.suffixes import MediaKind
from videoadapt.errors import ConfigError

KindSetting: TypeAlias = Literal["auto", "videos", "images"]  # values of data.kind

_KINDS: dict[KindSetting, MediaKind] = {"videos": "video", "images": "image"}


def select_kind(source: AnnotationSource, kind: KindSetting, split: Split, path: Path) -> AnnotationSource:
    """Returns a source without the entries of the other kind. They are counted as passed over.

    Args:
        source: Entries of a list or of class folders. Tables name only videos.
        kind: `data.kind`. With `auto` the entries must be of one kind.
        split: The split of the source in the config, for error messages.
        path: The list or folder, for error messages.

    Raises:
        ConfigError: The kind is `auto`, and the source has videos and images.
    """
    entries: dict[MediaKind | None, list[AnnotationEntry]] = {"video": [], "image": [], None: []}
    for entry in source.entries:
        entries[entry.kind].append(entry)
    videos, images = entries["video"], entries["image"]
    if kind == "auto":
        if videos and images:
            raise ConfigError(
                f"data.{split}.annotations: {path} has videos ({len(videos)}) and pictures or folders of pictures "
                f"({len(images)}), such as {videos[0].name} and {images[0].name}; expected one kind, because pictures "
                "beside videos are often thumbnails; set data.kind=videos or data.kind=images; the others are counted, "
                "and left out"
            )
        return source
    dropped = images if kind == "videos" else videos
    kept = [entry for entry in source.entries if entry.kind in (_KINDS[kind], None)]
    # A folder that has only the other kind, such as `thumbnails`, is not a class.
    others = frozenset(entry.label for entry in dropped) - {entry.label for entry in kept}
    named = "pictures beside the videos" if kind == "videos" else "videos beside the pictures"
    passed_over = {f"{named} (data.kind={kind})": [entry.name for entry in dropped]} if dropped else {}
    return replace(source, entries=kept, classes=source.classes - others, passed_over=source.passed_over | passed_over)
