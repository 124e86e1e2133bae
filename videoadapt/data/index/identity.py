"""Decides which entries of lists and folders are the same video, and drops those that a split lists again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from videoadapt.data.index.sources import Split
from videoadapt.data.video.probe import content_hash
from videoadapt.errors import UserError, VideoError


class ListedVideo(NamedTuple):
    """One video of the annotations. Its file may be missing."""

    path: str  # absolute; the expected path if no file was found
    video: str  # id: for a Kinetics clip the file name without suffix, otherwise the path in the annotations
    source: str  # by `data.source_pattern`, or the YouTube id of a Kinetics clip; otherwise empty
    label: int
    split: Split
    location: str  # file and line, or folder, for error messages
    frames: int | None = None  # number of frame images in the list, if given
    name: str = ""  # path in a list or folder, whose id is only a guess from this name; empty for a row of a table


def require_same_content(listed: Sequence[ListedVideo]) -> tuple[list[ListedVideo], list[str]]:
    """Corrects ids that were guessed from file names: `camera_left_000000_000010.mp4` looks like a Kinetics clip.

    A guess is right if all files of the id have the same bytes. Otherwise the files are different videos, and the id of
    each is its path, as for all files of the same guessed YouTube id.

    Returns:
        The videos in the same order, and messages for the user.
    """
    files: dict[str, dict[str, ListedVideo]] = {}  # guessed id -> path -> video
    certain = {video.video for video in listed if not video.name}
    for video in listed:
        if video.source and video.video not in certain:
            files.setdefault(video.video, {}).setdefault(video.path, video)
    wrong = {
        id_: list(by_path.values()) for id_, by_path in files.items() if len(by_path) > 1 and not _same_content(by_path)
    }
    sources = {video.source for videos in wrong.values() for video in videos}
    corrected = [
        video._replace(video=video.name, source="") if video.name and video.source in sources else video
        for video in listed
    ]
    if not wrong:
        return corrected, []
    first, second = next(iter(wrong.values()))[:2]
    note = (
        f"names of several different files, which are different videos: {len(wrong)}, the first: {first.video}: "
        f"{first.path} and {second.path}"
    )
    return corrected, [note]


def _same_content(paths: Iterable[str]) -> bool:
    files = list(map(Path, paths))
    try:
        if len({path.stat().st_size for path in files if path.is_file()}) > 1:  # cheaper than reading the files
            return False
        return len(set(map(content_hash, files))) == 1
    except (OSError, VideoError):
        return False  # a missing file: nothing shows that it is the same video


def keep_copies_together(listed: Sequence[ListedVideo], content: Mapping[str, str]) -> list[ListedVideo]:
    """Gives all sources that share a file the same drawn split: a copy in another split is a clip seen in training.

    Args:
        listed: The videos. All videos of a source in `train` are drawn together.
        content: Hash of the bytes of each readable file, by path.

    Returns:
        The videos in the same order. Of sources that share a file, the one with the first name decides.
    """
    drawn = {video.source or video.video: video.split for video in listed if video.split != "val"}
    parents = {source: source for source in drawn}

    def first_of(source: str) -> str:
        while parents[source] != source:
            source = parents[source]
        return source

    owners: dict[str, str] = {}  # content -> the first source that has it
    for video in listed:
        if video.split != "val" and (key := content.get(video.path)):
            source = video.source or video.video
            first, second = sorted(map(first_of, (source, owners.setdefault(key, source))))
            parents[second] = first
    return [
        video if video.split == "val" else video._replace(split=drawn[first_of(video.source or video.video)])
        for video in listed
    ]


def drop_repeated(listed: Iterable[ListedVideo]) -> tuple[list[ListedVideo], list[str]]:
    """Returns each video once per split, and a message for each repetition with the same label.

    Raises:
        UserError: A video has two labels in one split.
    """
    first: dict[tuple[Split, str], ListedVideo] = {}  # by id and by path, because each of them identifies a video
    videos, repeated = [], []
    for video in listed:
        other = first.get((video.split, video.video)) or first.get((video.split, video.path))
        if other is None:
            first[video.split, video.video] = first[video.split, video.path] = video
            videos.append(video)
        elif other.label == video.label:
            repeated.append(f"{video.video}: {other.location} and again {video.location}")
        else:
            raise UserError(
                f"{video.video} has two labels, {other.label} ({other.location}) and {video.label} "
                f"({video.location}); list it once"
            )
    return videos, repeated
