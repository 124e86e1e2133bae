"""The manifest: the population of a run, one row for each video that was listed, readable or not, with a hash."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from videoadapt.config import Config
from videoadapt.data.annotations import Listed, Split, list_videos
from videoadapt.data.probe import VideoInfo
from videoadapt.data.probing import Finding, probe_files
from videoadapt.errors import UserError
from videoadapt.log import replacing, say
from videoadapt.runtime import worker_count

_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("path", "video")),
        *((name, pa.int64()) for name in ("label", "frames")),
        ("fps", pa.float64()),
        *((name, pa.int64()) for name in ("width", "height")),
        ("duration_s", pa.float64()),
        *((name, pa.string()) for name in ("codec", "container")),
        ("rotation", pa.int64()),
        ("reader", pa.string()),
        ("bytes", pa.int64()),
        *((name, pa.string()) for name in ("content", "damage", "split", "status", "cause")),
    ]
)
_KEY = b"videoadapt"  # of the metadata in the Parquet file
_HASH_DIGITS = 12
_NOTHING = VideoInfo(0, 0.0, 0, 0, 0.0, "", "", 0, "pyav", 0, "")
_FAILED_SHOWN = 10


class Row(NamedTuple):
    """One video. `status` is `ok`, `missing` or `broken`, with a `cause`; what was not found is 0 or empty."""

    path: str  # absolute
    video: str  # id: the path as the source has it
    label: int
    frames: int
    fps: float
    width: int
    height: int
    duration_s: float
    codec: str
    container: str
    rotation: int
    reader: Literal["decord", "pyav", "image"]
    bytes: int
    content: str
    damage: str | None  # none = the file was not decoded whole
    split: Split
    status: Literal["ok", "missing", "broken"]
    cause: str

    @property
    def info(self) -> VideoInfo:
        """What `probe` found."""
        return VideoInfo(**{name: getattr(self, name) for name in VideoInfo.__dataclass_fields__})


class Manifest:
    """A table of videos with the columns of `Row`, and the class names in label order.

    `manifest["label"]` is a column, `manifest.row(i)` a row, `manifest.table` the whole `DataFrame`. Rows are numbered
    from 0 in each manifest, also in one that `split` or `readable` has made.
    """

    def __init__(self, table: pd.DataFrame, classes: Sequence[str], fingerprint: str = "") -> None:
        self.table, self.classes, self.fingerprint = table.reset_index(drop=True), tuple(classes), fingerprint

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, column: str) -> np.ndarray:
        """A column, (rows,): object for text, int64 or float64 for numbers."""
        values: np.ndarray = self.table[column].to_numpy()
        return values

    def row(self, number: int) -> Row:
        """One row, numbers as Python's own."""
        return Row(*(v.item() if isinstance(v, np.generic) else v for v in self.table.iloc[number]))

    @property
    def hash(self) -> str:
        """12 hex digits that change with the population: any video's id, label, split or status."""
        columns = self.table[["video", "label", "split", "status"]]
        lines = sorted("\t".join(map(str, row)) for row in columns.itertuples(index=False, name=None))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_HASH_DIGITS]

    @property
    def readable(self) -> Manifest:
        """The videos with status `ok`."""
        return self._where(self.table["status"] == "ok")

    def split(self, name: Split) -> Manifest:
        """The videos of one split, whatever their status."""
        return self._where(self.table["split"] == name)

    def _where(self, mask: Any) -> Manifest:
        return Manifest(self.table[mask], self.classes, self.fingerprint)

    def save(self, path: Path) -> None:
        """Write a Parquet file, whole or not at all."""
        meta = json.dumps({"classes": self.classes, "fingerprint": self.fingerprint, "hash": self.hash})
        table = pa.Table.from_pandas(self.table, schema=_SCHEMA, preserve_index=False)
        with replacing(Path(path)) as temporary:
            parquet.write_table(table.replace_schema_metadata({_KEY: meta.encode()}), temporary)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote. Raises `UserError` if the file is missing, torn, or something else."""
        try:
            table = parquet.read_table(path)
            meta = json.loads((table.schema.metadata or {})[_KEY])
            manifest = cls(table.to_pandas(), meta["classes"], meta["fingerprint"])
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read as a manifest: {str(error).splitlines()[0]}") from None
        except (KeyError, ValueError):
            raise UserError(f"{path}: not a manifest of videoadapt; make one with `videoadapt index`") from None
        if not table.schema.equals(_SCHEMA) or meta.get("hash") != manifest.hash:
            raise UserError(f"{path}: its columns or rows were changed; make it again with `videoadapt index`")
        return manifest


def index(config: Config) -> Manifest:
    """List the videos that a config names, probe each, and write `run.dir/manifest.parquet`.

    What was probed is kept in `run.dir/probed.jsonl`, so that an interrupted call, or one after a change of the lists,
    goes on where it stopped. Raises `ConfigError` or `UserError` for lists that cannot be used, and for a split without
    a single readable video.
    """
    listed, classes = list_videos(config)
    manifest = Manifest(_table(listed, _findings(listed, config)), classes, _fingerprint(listed, classes))
    _require_readable(manifest, config)
    manifest.save(_manifest_path(config))
    return manifest


def load_or_index(config: Config) -> Manifest:
    """The run's manifest, if it was made from the same lists, labels and holdout; else a new one, from `index`."""
    path = _manifest_path(config)
    if not path.exists():
        return index(config)
    manifest = Manifest.load(path)
    if manifest.fingerprint == _fingerprint(*list_videos(config)):
        return manifest
    say(f"{path} was made from other lists or settings; indexing again")
    return index(config)


def summary(manifest: Manifest) -> dict[str, Any]:
    """Counts for people and programs, JSON-able: per split, and the first failed videos with their causes."""
    failed = manifest.table[manifest.table["status"] != "ok"]
    return {
        "manifest": manifest.hash,
        "classes": len(manifest.classes),
        "splits": {name: _split_summary(manifest.split(name)) for name in sorted(set(manifest["split"]))},
        "failed": failed[["path", "cause"]].head(_FAILED_SHOWN).to_dict("records"),
    }


def _split_summary(part: Manifest) -> dict[str, Any]:
    status = Counter(part["status"])
    readable = part.readable
    return {
        "listed": len(part),
        "ok": status["ok"],
        "missing": status["missing"],
        "broken": status["broken"],
        # Numbers in a message differ from file to file.
        "causes": dict(Counter(re.sub(r"\d+", "N", cause) for cause in part["cause"] if cause).most_common()),
        "classes": len(set(readable["label"].tolist())),
        "hours": round(float(readable["duration_s"].sum()) / 3600, 4),
    }


def _manifest_path(config: Config) -> Path:
    return config.run.dir / "manifest.parquet"


def _findings(listed: Sequence[Listed], config: Config) -> dict[str, Finding]:
    there = [video.path for video in listed if os.path.exists(video.path)]
    return probe_files(there, cache=config.run.dir / "probed.jsonl", workers=worker_count(config.data.workers))


def _table(listed: Sequence[Listed], findings: dict[str, Finding]) -> pd.DataFrame:
    return pd.DataFrame([_row(video, findings.get(video.path)) for video in listed], columns=Row._fields)


def _row(video: Listed, finding: Finding | None) -> Row:
    if finding is None:
        info, status, cause = _NOTHING, "missing", "no such file"
    elif isinstance(finding, str):
        info, status, cause = _NOTHING, "broken", finding
    else:
        info, status, cause = finding, "ok", ""
    return Row._make((video.path, video.video, video.label, *astuple(info), video.split, status, cause))


def _fingerprint(listed: Sequence[Listed], classes: Sequence[str]) -> str:
    """Of everything that a manifest is made from, but the videos themselves."""
    rows = [(video.path, video.video, video.label, video.split) for video in listed]
    return hashlib.sha256(json.dumps([rows, list(classes)]).encode()).hexdigest()


def _require_readable(manifest: Manifest, config: Config) -> None:
    sources: dict[Split, Path | None] = {"train": config.data.train.annotations, "val": config.data.val.annotations}
    if config.data.holdout:
        sources["holdout"] = sources["train"]
    for split, source in sources.items():
        part = manifest.split(split)
        if source is None or len(part.readable):
            continue
        count = Counter(part["status"])
        root = config.data.root or source.parent
        first = next((f"; the first: {row.path}: {row.cause}" for row in map(part.row, range(min(len(part), 1)))), "")
        raise UserError(
            f"data.{split}: not one of the {len(part)} videos of {source} can be read: {count['missing']} missing, "
            f"{count['broken']} broken, relative paths looked up in {root} (data.root){first}"
        )
