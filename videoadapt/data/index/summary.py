"""Summary of a manifest: counts of videos, failures, duplicates and leaks, each with its first examples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from videoadapt.data.index.annotations import Listing
from videoadapt.data.index.find_files import is_clip_id
from videoadapt.data.video.suffixes import IMAGE_SUFFIXES

_EXAMPLES = 10
# The name of an image at the start of a cause, as in `img_7.jpg: cannot be read`.
_IMAGE_NAME = re.compile(rf"^[^:]*(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}): ", re.IGNORECASE)


@dataclass(frozen=True)
class Examples:
    """A count and the first ten of the counted items: paths, messages, or groups of them."""

    count: int
    first: list[str] | list[list[str]]


@dataclass(frozen=True)
class Cause:
    """Files that cannot be read for the same reason."""

    cause: str
    count: int
    first: list[str]  # paths


@dataclass(frozen=True)
class SplitSummary:
    """One split. `damaged` videos are readable and counted in `ok`. `classes` and times count readable videos only."""

    listed: int
    ok: int
    missing: int
    broken: int
    unprobed: int  # the process that read them was killed
    damaged: int
    classes: int
    hours: float
    seconds: list[float]  # length of the shortest, median and longest video; empty without a readable video


@dataclass(frozen=True)
class Duplicates:
    """Videos that occur more than once, in one split or in several."""

    listed_twice: Examples
    further_files: Examples  # files that are not used because another has the same name
    same_content: Examples  # groups of files with equal bytes
    other_class: Examples  # those of these groups whose files have different classes: at least one label is wrong


@dataclass(frozen=True)
class Leaks:
    """Groups of videos that several splits share: by id, by YouTube video, by bytes of the file."""

    same_id: Examples
    same_source: Examples
    same_content: Examples


@dataclass(frozen=True)
class IndexSummary:
    """Content of `index.json`. `missing` and `broken` count files, and a file may be in several splits."""

    manifest: str  # hash of the population
    classes: int
    splits: dict[str, SplitSummary]
    verified: int  # videos that were decoded completely
    readers: dict[str, int]  # videos by reader
    notes: list[str]
    passed_over: dict[str, Examples]  # by kind: files and lines that are not videos of the population
    missing: Examples
    broken: list[Cause]  # the most frequent cause first
    unprobed: list[Cause]
    damaged: Examples
    duplicates: Duplicates
    leaks: Leaks


def summary(rows: pd.DataFrame, manifest_hash: str, listing: Listing) -> IndexSummary:
    """Summarises a manifest.

    Args:
        rows: The rows of the manifest, with the columns of `manifest.Row`.
        manifest_hash: Hash of the population.
        listing: The listing that the rows were made from.
    """
    readable = rows[rows["status"] == "ok"]
    failed = rows[rows["status"] != "ok"]
    damaged = readable[readable["damage"].fillna("") != ""]
    return IndexSummary(
        manifest=manifest_hash,
        classes=len(listing.classes),
        splits={name: _summarise_split(rows[rows["split"] == name]) for name in sorted(set(rows["split"]))},
        verified=int(readable["damage"].notna().sum()),
        readers={name: int(count) for name, count in readable["reader"].value_counts().items()},
        notes=listing.notes,
        passed_over={kind: _examples(items) for kind, items in listing.passed_over.items()},
        missing=_examples(failed.loc[failed["status"] == "missing", "path"].unique()),
        broken=_causes(failed[failed["status"] == "broken"]),
        unprobed=_causes(failed[failed["status"] == "unprobed"]),
        damaged=_examples(damaged["path"] + ": " + damaged["damage"]),
        duplicates=Duplicates(
            listed_twice=_examples(listing.repeated),
            further_files=_examples(listing.ignored_files),
            same_content=_groups(readable),
            other_class=_other_classes(readable, listing.classes),
        ),
        leaks=Leaks(
            same_id=_leaks(rows.assign(id=rows["video"].where(_are_clips(rows), rows["path"])), "id"),
            same_source=_leaks(rows, "source"),
            same_content=_leaks(readable, "content"),
        ),
    )


def _are_clips(rows: pd.DataFrame) -> pd.Series[bool]:
    """Returns whether each row is a Kinetics clip, the same video everywhere; `a/1.mp4` may exist below two roots.

    Without a source, the name of a clip was found to be that of different files.
    """
    return (rows["source"] != "") & rows["video"].map(is_clip_id)


def _summarise_split(rows: pd.DataFrame) -> SplitSummary:
    readable = rows[rows["status"] == "ok"]
    seconds = readable["duration_s"]
    spread = (seconds.min(), seconds.median(), seconds.max()) if len(seconds) else ()
    return SplitSummary(
        listed=len(rows),
        ok=len(readable),
        missing=int((rows["status"] == "missing").sum()),
        broken=int((rows["status"] == "broken").sum()),
        unprobed=int((rows["status"] == "unprobed").sum()),
        damaged=int((readable["damage"].fillna("") != "").sum()),
        classes=int(readable["label"].nunique()),
        hours=round(float(seconds.sum()) / 3600, 4),
        seconds=[round(float(value), 3) for value in spread],
    )


def _causes(broken: pd.DataFrame) -> list[Cause]:
    """Groups broken files by cause, the most frequent first.

    Numbers and the image's name are removed from a cause: they differ between files that fail for the same reason.
    """
    texts = broken["cause"].map(lambda cause: re.sub(r"\d+", "N", _IMAGE_NAME.sub("", cause)))
    groups = [(text, list(group["path"].unique())) for text, group in broken.groupby(texts)]
    by_count = sorted(groups, key=lambda group: -len(group[1]))
    return [Cause(text, len(paths), paths[:_EXAMPLES]) for text, paths in by_count]


def _examples(items: Iterable[str]) -> Examples:
    every = list(items)
    return Examples(len(every), every[:_EXAMPLES])


def _groups(rows: pd.DataFrame) -> Examples:
    """Returns groups of the paths of files with equal bytes."""
    shared = rows[(rows["content"] != "") & rows["content"].duplicated(keep=False)]
    files = shared.drop_duplicates(["content", "path"])  # one file in two splits is not a duplicate
    groups = [paths for paths in files.groupby("content", sort=False)["path"].agg(list) if len(paths) > 1]
    return Examples(len(groups), groups[:_EXAMPLES])


def _other_classes(rows: pd.DataFrame, classes: Sequence[str]) -> Examples:
    """Returns groups `path (class)` of files with equal bytes and different classes."""
    known = rows[rows["content"] != ""].drop_duplicates(["content", "path", "label"])
    shared = known[known.groupby("content")["label"].transform("nunique") > 1]
    named = shared["path"] + " (" + shared["label"].map(dict(enumerate(classes))).astype(str) + ")"
    groups = list(named.groupby(shared["content"], sort=False).agg(list))
    return Examples(len(groups), groups[:_EXAMPLES])


def _leaks(rows: pd.DataFrame, key: str) -> Examples:
    """Returns groups `split: path`, one video for each split that shares a value of `key`. Empty values are ignored."""
    known = rows[rows[key] != ""].drop_duplicates([key, "split"])
    shared = known[known[key].duplicated(keep=False)]
    named = shared["split"] + ": " + shared["path"]
    groups = list(named.groupby(shared[key], sort=False).agg(list))
    return Examples(len(groups), groups[:_EXAMPLES])
