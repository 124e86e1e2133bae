"""What a manifest holds, counted: for people, who must answer for it, and for programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from videoadapt.data.index.annotations import Listing
from videoadapt.data.video.images import IMAGE_SUFFIXES

_EXAMPLES = 10
_IMAGE_NAME = re.compile(rf"^[^:]*(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}): ", re.IGNORECASE)


def summary(rows: pd.DataFrame, manifest_hash: str, listing: Listing) -> dict[str, Any]:
    """Counts of a manifest's rows, each with its first examples; JSON-able.

    Of `missing` and `broken`, files are counted, which may be in several splits.
    `duplicates` are of a video in one split or in several: listed twice, further files of its name, files of the same
    bytes. `leaks` are between splits, as groups: the same id, the same YouTube video, the same bytes.
    """
    readable = rows[rows["status"] == "ok"]
    failed = rows[rows["status"] != "ok"]
    damaged = readable[readable["damage"].fillna("") != ""]
    return {
        "manifest": manifest_hash,
        "classes": len(listing.classes),
        "splits": {name: _split(rows[rows["split"] == name]) for name in sorted(set(rows["split"]))},
        "verified": int(readable["damage"].notna().sum()),
        "readers": {name: int(count) for name, count in readable["reader"].value_counts().items()},
        "notes": listing.notes,
        "missing": _some(failed.loc[failed["status"] == "missing", "path"].unique()),
        "broken": _by_cause(failed[failed["status"] == "broken"]),
        "damaged": _some(damaged["path"] + ": " + damaged["damage"]),
        "duplicates": {
            "listed_twice": _some(listing.twice),
            "further_files": _some(listing.copies),
            "same_content": _some(_groups(readable, "content")),
        },
        "leaks": {
            "same_id": _some(_leaks(rows.assign(id=rows["video"].where(rows["source"] != "", rows["path"])), "id")),
            "same_source": _some(_leaks(rows, "source")),
            "same_content": _some(_leaks(readable, "content")),
        },
    }


def _split(rows: pd.DataFrame) -> dict[str, Any]:
    status = rows["status"].value_counts()
    readable = rows[rows["status"] == "ok"]
    seconds = readable["duration_s"]
    return {
        "listed": len(rows),
        **{name: int(status.get(name, 0)) for name in ("ok", "missing", "broken")},
        "damaged": int((readable["damage"].fillna("") != "").sum()),
        "classes": int(readable["label"].nunique()),
        "hours": round(float(seconds.sum()) / 3600, 4),
        "seconds": [round(float(v), 3) for v in (seconds.min(), seconds.median(), seconds.max())]
        if len(seconds)
        else [],
    }


def _by_cause(broken: pd.DataFrame) -> list[dict[str, Any]]:
    """The causes, the commonest first; numbers in them, and the image of a folder, differ from video to video."""
    kinds = broken["cause"].map(lambda cause: re.sub(r"\d+", "N", _IMAGE_NAME.sub("", cause)))
    groups = [(kind, group["path"].unique()) for kind, group in broken.groupby(kinds)]
    return [{"cause": kind, **_some(paths)} for kind, paths in sorted(groups, key=lambda group: -len(group[1]))]


def _some(items: Iterable[Any]) -> dict[str, Any]:
    every = list(items)
    return {"count": len(every), "first": every[:_EXAMPLES]}


def _groups(rows: pd.DataFrame, key: str) -> list[Sequence[str]]:
    """The paths of the videos that share a key, group by group; an empty key is none."""
    shared = rows[(rows[key] != "") & rows[key].duplicated(keep=False)]
    files = shared.drop_duplicates([key, "path"])
    return [paths for paths in files.groupby(key, sort=False)["path"].agg(list) if len(paths) > 1]


def _leaks(rows: pd.DataFrame, key: str) -> list[Sequence[str]]:
    """For each key that several splits share, a video of each: `split: path`. An empty key is none."""
    known = rows[rows[key] != ""].drop_duplicates([key, "split"])
    shared = known[known[key].duplicated(keep=False)]
    named = shared["split"] + ": " + shared["path"]
    return list(named.groupby(shared[key], sort=False).agg(list))
