"""The manifest: the population of a run, one row for each video that was listed, readable or not, with a hash."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import starmap
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from videoadapt.config.load import Config
from videoadapt.data.index.annotations import Listed, fingerprint, list_videos
from videoadapt.data.index.formats import Split
from videoadapt.data.index.probe_pool import Finding, probe_files
from videoadapt.data.index.summary import summary
from videoadapt.data.video.probe import PROBE_VERSION, ReaderName, VideoInfo
from videoadapt.errors import UserError
from videoadapt.runtime.console import say
from videoadapt.runtime.files import replacing, write_json
from videoadapt.runtime.machine import worker_count

_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("path", "video", "source")),
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
_values = attrgetter(*VideoInfo.__dataclass_fields__)
_NOTHING = VideoInfo(0, 0.0, 0, 0, 0.0, "", "", 0, "pyav", 0, "")


class Row(NamedTuple):
    """One video. `status` is `ok`, `missing` or `broken`, with a `cause`; what was not found is 0 or empty."""

    path: str  # absolute
    video: str  # id
    source: str  # YouTube id, or empty
    label: int
    frames: int
    fps: float
    width: int
    height: int
    duration_s: float
    codec: str
    container: str
    rotation: int
    reader: ReaderName
    bytes: int
    content: str
    damage: str | None  # none = the file was not decoded whole
    split: Split
    status: Literal["ok", "missing", "broken"]
    cause: str

    @property
    def info(self) -> VideoInfo:
        """What `probe` or `verify` found."""
        return VideoInfo(*_values(self))


class Manifest:
    """A table of videos with the columns of `Row`, and the class names in label order.

    `manifest["label"]` is a column, `manifest.row(i)` a row, `manifest.table` the whole `DataFrame`. Rows are numbered
    from 0 in each manifest, also in one that `split` or `readable` has made.
    """

    def __init__(self, table: pa.Table | pd.DataFrame, classes: Sequence[str], fingerprint: str = "") -> None:
        if isinstance(table, pd.DataFrame):
            table = pa.Table.from_pandas(table, schema=_SCHEMA, preserve_index=False)
        # Arrow's memory has no reference counts: the workers of a loader read it without copying it.
        self._arrow = table.combine_chunks().replace_schema_metadata()
        self.classes, self.fingerprint = tuple(classes), fingerprint

    def __len__(self) -> int:
        return len(self._arrow)

    def __getitem__(self, column: str) -> np.ndarray:
        """A column, (rows,): object for text, int64 or float64 for numbers."""
        values: np.ndarray = self._arrow[column].to_numpy()
        return values

    def row(self, number: int) -> Row:
        """One row."""
        return Row(*(column[number].as_py() for column in self._arrow.itercolumns()))

    def __iter__(self) -> Iterator[Row]:
        """All rows, in order."""
        return starmap(Row, zip(*(column.to_pylist() for column in self._arrow.itercolumns()), strict=True))

    @cached_property
    def table(self) -> pd.DataFrame:
        """All rows; changing them does not change the manifest."""
        return self._arrow.to_pandas()

    @cached_property
    def hash(self) -> str:
        """12 hex digits that change with the population: any video's id, label, split or status."""
        columns = (self._arrow[name].cast(pa.string()) for name in ("video", "label", "split", "status"))
        lines = sorted(pc.binary_join_element_wise(*columns, "\t").to_pylist())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_HASH_DIGITS]

    @property
    def readable(self) -> Manifest:
        """The videos with status `ok`."""
        return self._where("status", "ok")

    def split(self, name: Split) -> Manifest:
        """The videos of one split, whatever their status."""
        return self._where("split", name)

    def _where(self, column: str, value: str) -> Manifest:
        return Manifest(self._arrow.filter(pc.equal(self._arrow[column], value)), self.classes, self.fingerprint)

    def save(self, path: Path) -> None:
        """Write a Parquet file, whole or not at all."""
        meta = json.dumps({"classes": self.classes, "fingerprint": self.fingerprint, "hash": self.hash})
        with replacing(Path(path)) as temporary:
            parquet.write_table(self._arrow.replace_schema_metadata({_KEY: meta.encode()}), temporary)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote. Raises `UserError` if the file is missing, torn, or something else."""
        try:
            table = parquet.read_table(path)
            meta = json.loads((table.schema.metadata or {})[_KEY])
            classes, fingerprint, expected = meta["classes"], meta["fingerprint"], meta["hash"]
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read as a manifest: {str(error).splitlines()[0]}") from None
        except (KeyError, ValueError):
            raise UserError(f"{path}: not a manifest of videoadapt; make one with `videoadapt index`") from None
        if not table.schema.equals(_SCHEMA) or expected != (manifest := cls(table, classes, fingerprint)).hash:
            raise UserError(f"{path}: its columns or rows were changed; make it again with `videoadapt index`")
        return manifest


def index(config: Config) -> Manifest:
    """List the videos that a config names, look at each, and write `manifest.parquet` and `index.json` in `run.dir`.

    With `index.verify: full` every frame is decoded. What was found is kept in `run.dir/probed.jsonl`, so that an
    interrupted call, or one after a change of the lists, goes on where it stopped. Raises `ConfigError` or `UserError`
    for lists that cannot be used; that files cannot be read is stated in the manifest. If a split has no readable video
    any more, perhaps because a disk is not there, the former manifest is kept as `manifest.before.parquet`.
    """
    manifest, told = _look(config)
    _keep_former(manifest, config)
    _save(manifest, told, config)
    return manifest


def load_or_index(config: Config) -> Manifest:
    """The run's manifest, if it still serves; else a new one, as `index` makes it.

    It serves if it was made from the same lists, labels and holdout, is verified as the config wants it, and has a
    readable video in each split. Files that came or went since do not make it anew: `index` does. Raises as
    `require_readable` does, and then writes nothing.
    """
    path = _manifest_path(config)
    if path.exists():
        manifest = Manifest.load(path)
        outdated = _outdated(manifest, config)
        if not outdated:
            return manifest
        say(f"{path} {outdated}; indexing again")
    manifest, told = _look(config)
    require_readable(manifest, config)
    _save(manifest, told, config)
    return manifest


def _look(config: Config) -> tuple[Manifest, dict[str, Any]]:
    """A manifest of the videos as they are now, and its summary; of the files of a run only the cache is written."""
    listing = list_videos(config)
    _require_utf8(listing.videos)
    for note in listing.notes:
        say(note)
    findings = probe_files(
        [video.path for video in listing.videos],
        full=config.index.verify == "full",
        cache=config.run.dir / "probed.jsonl",
        workers=worker_count(config.data.workers),
        timeout_s=config.index.timeout_s,
    )
    manifest = Manifest(_table(listing.videos, findings), listing.classes, _fingerprint(config))
    return manifest, summary(manifest.table, manifest.hash, listing)


def _save(manifest: Manifest, told: dict[str, Any], config: Config) -> None:
    manifest.save(_manifest_path(config))
    write_json(index_path(config), told)


def _keep_former(manifest: Manifest, config: Config) -> None:
    path = _manifest_path(config)
    with suppress(UserError):  # there is none, or it is torn
        lost = set(Manifest.load(path).readable["split"]) - set(manifest.readable["split"])
        if lost:
            path.replace(path.with_name("manifest.before.parquet"))
            say(
                f"no video of {' and '.join(sorted(lost))} can be read any more; the former manifest is kept as "
                f"{path.with_name('manifest.before.parquet')}"
            )


def _outdated(manifest: Manifest, config: Config) -> str:
    """Why a manifest does not serve a config, or nothing."""
    if manifest.fingerprint != _fingerprint(config):
        return "was made from other lists or settings, or by another version"
    if config.index.verify == "full" and manifest.readable._arrow["damage"].null_count:
        return "holds videos that were not decoded whole"
    if any(not len(manifest.split(split).readable) for split in _sources(config)):
        return "has a split without a readable video"
    return ""


def index_path(config: Config) -> Path:
    """Where `index` writes its summary."""
    return config.run.dir / "index.json"


def _manifest_path(config: Config) -> Path:
    return config.run.dir / "manifest.parquet"


def _require_utf8(listed: Sequence[Listed]) -> None:
    """Neither Parquet nor JSON can hold other names, which file systems allow."""
    for video in listed:
        try:
            video.path.encode()
        except UnicodeEncodeError:
            raise UserError(f"{video.path!r} ({video.where}): its name is not UTF-8; rename it") from None


def _table(listed: Sequence[Listed], findings: Mapping[str, Finding]) -> pa.Table:
    columns = zip(*(_row(video, findings[video.path]) for video in listed), strict=True)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)


def _row(video: Listed, finding: Finding) -> Row:
    if finding is None:
        info, status, cause = _NOTHING, "missing", "no such file when it was indexed; run `videoadapt index` again"
    elif isinstance(finding, str):
        info, status, cause = _NOTHING, "broken", finding
    elif video.frames not in (None, finding.frames):
        info, status = finding, "broken"
        cause = f"the list says {video.frames} frames, the folder has {finding.frames}"
    else:
        info, status, cause = finding, "ok", ""
    return Row._make((video.path, video.video, video.source, video.label, *_values(info), video.split, status, cause))


def _fingerprint(config: Config) -> str:
    """Of everything that a manifest is made from, but the videos themselves."""
    return f"{PROBE_VERSION}-{fingerprint(config)}"


def _sources(config: Config) -> dict[Split, Path]:
    """The annotations of each split that a config asks for."""
    train, val = config.data.train.annotations, config.data.val.annotations
    given: dict[Split, Path | None] = {"train": train, "val": val, "holdout": train if config.data.holdout else None}
    return {split: path for split, path in given.items() if path is not None}


def require_readable(manifest: Manifest, config: Config) -> None:
    """Raise `UserError` if a split that the config names has not one readable video."""
    for split, source in _sources(config).items():
        part = manifest.split(split)
        if len(part.readable):
            continue
        if not len(part):
            total = len(manifest) - len(manifest.split("val"))
            raise UserError(
                f"data.holdout: a share of {config.data.holdout:g} of the {total} videos of {source} left none for "
                f"the split {split}; change data.holdout, or draw again with another run.seed"
            )
        count = Counter(part["status"])
        first = part.row(0)
        cause = "no such file" if first.status == "missing" else first.cause
        raise UserError(
            f"data.{split}: not one of the {len(part)} videos of {source} can be read: {count['missing']} missing, "
            f"{count['broken']} broken, relative paths looked up in {config.data.root or source.parent} (data.root); "
            f"the first: {first.path}: {cause}"
        )
