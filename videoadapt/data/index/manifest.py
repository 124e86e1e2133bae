"""The manifest: a table with one row per listed video, readable or not, and a hash that identifies the population."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from itertools import starmap
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from videoadapt.config.load import Config
from videoadapt.config.sections import SplitConfig
from videoadapt.data.index.annotations import fingerprint, list_videos
from videoadapt.data.index.identity import ListedVideo, keep_copies_together
from videoadapt.data.index.probe_pool import NotProbed, ProbeResult, probe_files
from videoadapt.data.index.sources import DRAWN, Split
from videoadapt.data.index.summary import IndexSummary, summary
from videoadapt.data.video.limits import DEFAULT_LIMITS, Limits
from videoadapt.data.video.probe import PROBE_VERSION, ReaderName, VideoInfo
from videoadapt.errors import RunError, UserError, plural
from videoadapt.runtime.console import say
from videoadapt.runtime.files import read_table, write_json, write_table
from videoadapt.runtime.machine import worker_count
from videoadapt.runtime.results import Table, html_table
from videoadapt.runtime.run_config import record_config

SCHEMA = pa.schema(  # the columns of the Parquet file: the fields of Row in the same order
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
        *((name, pa.string()) for name in ("content", "damage")),
        ("variable_rate", pa.bool_()),
        *((name, pa.string()) for name in ("split", "status", "cause")),
    ]
)
_KEY = b"videoadapt"  # key of our metadata in the Parquet file
_HASH_DIGITS = 12
_info_values = attrgetter(*VideoInfo.__dataclass_fields__)
_NO_INFO = VideoInfo(0, 0.0, 0, 0, 0.0, "", "", 0, "pyav", 0, "")  # values for a video that cannot be read


class Row(NamedTuple):
    """One video. If its status is not `ok`, `cause` gives the reason and unknown values are 0 or empty."""

    path: str  # absolute
    video: str  # id
    source: str  # by `data.source_pattern`, or the YouTube id; otherwise empty: a source of its own
    label: int
    frames: int
    fps: float
    width: int  # pixels, after the rotation
    height: int
    duration_s: float
    codec: str
    container: str
    rotation: int  # degrees anticlockwise
    reader: ReaderName  # the reader that is exact for this file
    bytes: int  # size of the file
    content: str  # hash of the bytes
    damage: str | None  # None: not every frame was decoded; empty: all frames are intact
    variable_rate: bool  # the frames are not evenly spaced, and are chosen by their timestamps
    split: Split
    status: Literal["ok", "missing", "broken", "unprobed"]  # unprobed: the process that read it was killed
    cause: str  # empty if the status is ok

    @property
    def info(self) -> VideoInfo:
        """The values that `probe` or `verify` returned."""
        return VideoInfo(*_info_values(self))


class Manifest:
    """A table of videos with the columns of `Row`.

    `manifest["label"]` is a column, `manifest.row(i)` is row `i`, and iteration gives all rows. `split` and `readable`
    return manifests whose rows are numbered from 0 again.

    Attributes:
        classes: Class names in label order.
        fingerprint: Identifies the annotations and settings that the manifest was made from.
    """

    def __init__(self, table: pa.Table | pd.DataFrame, classes: Sequence[str], fingerprint: str = "") -> None:
        if isinstance(table, pd.DataFrame):
            table = pa.Table.from_pandas(table, schema=SCHEMA, preserve_index=False)
        # Arrow's buffers have no reference counts, so forked loader workers share them. Python objects would be copied
        # page by page, because reading them changes their counts.
        self._arrow = table.combine_chunks().replace_schema_metadata()
        self.classes, self.fingerprint = tuple(classes), fingerprint

    def __len__(self) -> int:
        return len(self._arrow)

    def __repr__(self) -> str:
        size = f"{plural(len(self), 'video')} of {plural(len(self.classes), 'class')}"
        return f"<Manifest {self.hash}: {size}, {len(self.readable)} readable>"

    def _repr_html_(self) -> str:
        columns = ("split", "videos", "readable", "missing", "broken", "hours")
        splits = [(name, self.split(name)) for name in get_args(Split)]
        rows = [
            (
                name,
                len(videos),
                *(len(videos.of_status(status)) for status in ("ok", "missing", "broken")),
                f"{videos['duration_s'].sum() / 3600:.2f}",
            )
            for name, videos in splits
            if len(videos)
        ]
        return html_table(Table(f"manifest {self.hash}, of {plural(len(self.classes), 'class')}", columns, rows))

    def __getitem__(self, column: str) -> np.ndarray:
        """Returns a column, (rows,): object for text, int64 or float64 for numbers."""
        values: np.ndarray = self._arrow[column].to_numpy()
        return values

    def row(self, number: int) -> Row:
        """Returns one row."""
        return Row(*(column[number].as_py() for column in self._arrow.itercolumns()))

    def __iter__(self) -> Iterator[Row]:
        """Iterates over all rows in order."""
        return starmap(Row, zip(*(column.to_pylist() for column in self._arrow.itercolumns()), strict=True))

    @property
    def sources(self) -> np.ndarray:
        """The source of each row, (rows,): its path where no other video is known to be alike."""
        return np.where(self["source"] == "", self["path"], self["source"])

    @cached_property
    def table(self) -> pd.DataFrame:
        """All rows. Changes to it do not change the manifest."""
        return self._arrow.to_pandas()

    @cached_property
    def hash(self) -> str:
        """12 hex digits that identify the population: the ids, labels, splits and statuses, in any order of rows."""
        # Without paths: the same videos on another disk are the same population.
        columns = (self._arrow[name].cast(pa.string()) for name in ("video", "label", "split", "status"))
        lines = sorted(pc.binary_join_element_wise(*columns, "\t").to_pylist())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:_HASH_DIGITS]

    @property
    def readable(self) -> Manifest:
        """The videos with status `ok`."""
        return self.of_status("ok")

    def of_status(self, status: str) -> Manifest:
        """Returns the videos with this status."""
        return self._where("status", status)

    def split(self, name: Split) -> Manifest:
        """Returns the videos of one split, with any status."""
        return self._where("split", name)

    def readable_rows(self, *splits: Split) -> np.ndarray:
        """Returns the numbers of the rows with status `ok`, ascending int64: those of some splits, or of all."""
        readable = self["status"] == "ok"
        return np.flatnonzero(readable & np.isin(self["split"], splits) if splits else readable)

    def _where(self, column: str, value: str) -> Manifest:
        return Manifest(self._arrow.filter(pc.equal(self._arrow[column], value)), self.classes, self.fingerprint)

    def save(self, path: Path) -> None:
        """Writes a Parquet file. An interrupted call leaves no unfinished file."""
        meta = json.dumps({"classes": self.classes, "fingerprint": self.fingerprint, "hash": self.hash})
        write_table(Path(path), self._arrow.replace_schema_metadata({_KEY: meta.encode()}))

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads a file that `save` wrote.

        Raises:
            UserError: The file is missing, unfinished, changed, or not a manifest.
        """
        table = read_table(path, "make it again with `videoadapt index`")  # compares the checksum of all columns
        try:
            meta = json.loads((table.schema.metadata or {})[_KEY])
            classes, fingerprint, expected = meta["classes"], meta["fingerprint"], meta["hash"]
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{path}: not a manifest of videoadapt; make one with `videoadapt index`") from None
        table = _with_new_columns(table)
        # The stored hash detects a table of an older version, without a checksum, that was filtered or edited.
        if not table.schema.equals(SCHEMA) or expected != (manifest := cls(table, classes, fingerprint)).hash:
            raise UserError(f"{path}: its columns or rows were changed; make it again with `videoadapt index`")
        return manifest


def index(config: Config) -> Manifest:
    """Makes the manifest of a run and writes it.

    Lists the videos of the config, probes each file, and writes `manifest.parquet` and `index.json` in `run.dir`, and
    before the training also `config.yaml`. With `index.verify: full` every frame is decoded. `run.dir/probed.jsonl`
    caches the results, so an interrupted call, or one after a change of the annotations, probes only new files.

    Files that cannot be read are rows of the manifest, not errors. If no video of a split is readable any more, for
    example because a disk is not mounted, the previous manifest is kept as `manifest.before.parquet`.

    Raises:
        ConfigError: The annotations cannot be used.
        UserError: A video has two labels, or a file name is not UTF-8.
    """
    manifest, counts = _build(config)
    _keep_previous(manifest, config)
    _write(manifest, counts, config)
    if not any((config.run.dir / "checkpoints").glob("step-*")):  # from then on, it is the config of the training
        record_config(config)
    return manifest


def load_or_index(config: Config) -> Manifest:
    """Returns the manifest of a run, and makes it first if there is none that is valid for the config.

    A manifest is valid if the annotations, labels and holdout are the same, if it is verified as the config asks, and
    if each split has a readable video. Video files that appeared or disappeared since do not matter; `index` finds
    them.

    Raises:
        ConfigError: The annotations cannot be used.
        UserError: A split has no readable video, or `index` fails. Nothing is written then.
        RunError: The processes that read the videos were killed. Nothing is written then.
    """
    path = manifest_path(config.run.dir)
    if path.exists():
        manifest = Manifest.load(path)
        outdated = _why_outdated(manifest, config)
        if not outdated:
            return manifest
        say(f"{path} {outdated}; indexing again")
    manifest, counts = _build(config)
    require_readable(manifest, config)  # before anything is written: the disk may not be mounted
    require_probed(manifest)
    _write(manifest, counts, config)
    _say_suspicious(counts, config)
    return manifest


def _say_suspicious(counts: IndexSummary, config: Config) -> None:
    """Prints in one line what makes an evaluation unreliable; `index` prints all that it has found."""
    leaks = counts.leaks.same_id.count + counts.leaks.same_source.count + counts.leaks.same_content.count
    equal = counts.duplicates.same_content.count
    if leaks or equal:
        say(
            f"{plural(leaks, 'leak')} between splits, {plural(equal, 'group')} of files with the same content, "
            f"{counts.duplicates.other_class.count} of them with different classes: see {index_path(config)}"
        )


def index_folder(folder: Path, config: Config) -> Manifest:
    """Makes a manifest of a folder with a folder of videos per class, in memory; all its videos are of split `train`.

    Args:
        folder: The folder.
        config: Its `data.classes`, limits and number of workers are used.

    Raises:
        ConfigError: The folder is not one folder per class, or does not fit `data.classes` or `model.num_classes`.
        RunError: The processes that read the videos were killed.
    """
    source = {
        "train": SplitConfig(annotations=folder),
        "val": SplitConfig(),
        "root": None,
        "holdout": 0.0,
        "calibrate": 0.0,
        "source_pattern": None,
    }
    with TemporaryDirectory() as scratch:  # for the cache of `probe_files`
        run = config.run.model_copy(update={"dir": Path(scratch)})
        data = config.data.model_copy(update=source)
        manifest, _ = _build(config.model_copy(update={"run": run, "data": data}))
    require_probed(manifest)
    return manifest


def require_readable(manifest: Manifest, config: Config) -> None:
    """Checks that each split of the config has a readable video.

    Raises:
        UserError: A split has none. The message gives the counts, and the cause of the first video.
    """
    for split, source in _sources(config).items():
        videos = manifest.split(split)
        if len(videos.readable):
            continue
        if not len(videos):  # only a draw leaves a split empty: annotations without a video are refused
            key = split if split in DRAWN else "holdout" if config.data.holdout else "calibrate"
            fraction = getattr(config.data, key)
            total = len(manifest) - len(manifest.split("val"))
            raise UserError(
                f"data.{key}: with a fraction of {fraction:g}, none of the {total} videos of {source} is "
                f"in the split {split}; change data.{key}, or draw again with another run.seed"
            )
        count = Counter(videos["status"])
        first = videos.row(0)
        # The stored cause of a missing file recommends `videoadapt index`, which has just failed.
        cause = "no such file" if first.status == "missing" else first.cause
        raise UserError(
            f"data.{split}: none of the {len(videos)} videos of {source} can be read: {count['missing']} missing, "
            f"{count['broken']} broken; relative paths start at {config.data.root or source.parent} (data.root); "
            f"the first: {first.path}: {cause}"
        )


def require_probed(manifest: Manifest) -> None:
    """Checks that the state of every video is known.

    Raises:
        RunError: The process that read a video was killed, also when it read no other video.
    """
    unprobed = manifest.of_status("unprobed")
    if len(unprobed):
        first = unprobed.row(0)
        raise RunError(
            f"{len(unprobed)} of {len(manifest)} videos were not probed, and may be sound; the first: {first.path}: "
            f"{first.cause}; give the job more memory, or lower data.workers, and run `videoadapt index` again"
        )


def index_path(config: Config) -> Path:
    """Returns the path of the summary that `index` writes."""
    return config.run.dir / "index.json"


def manifest_path(run: Path) -> Path:
    """Returns the path of the manifest of a run folder."""
    return run / "manifest.parquet"


def _sources(config: Config) -> dict[Split, Path]:
    """Returns the annotations of each split of the config. Those drawn from `train` have its annotations."""
    train, val = config.data.train.annotations, config.data.val.annotations
    given: dict[Split, Path | None] = {"train": train, "val": val}
    given |= {split: train for split in DRAWN if getattr(config.data, split)}
    return {split: path for split, path in given.items() if path is not None}


def _build(config: Config) -> tuple[Manifest, IndexSummary]:
    """Makes a manifest of the files as they are now, and its summary. In the run's folder it writes only the cache."""
    listing = list_videos(config)
    for note in listing.notes:
        say(note)
    results = probe_files(
        [video.path for video in listing.videos],
        full=config.index.verify == "full",
        cache=config.run.dir / "probed.jsonl",
        workers=worker_count(config.data.workers),
        timeout_s=config.index.timeout_s,
        limits=Limits.of(config.data),
    )
    if config.data.holdout or config.data.calibrate:
        content = {path: result.content for path, result in results.items() if isinstance(result, VideoInfo)}
        listing = replace(listing, videos=keep_copies_together(listing.videos, content))
    manifest = Manifest(_table(listing.videos, results), listing.classes, _fingerprint(config))
    return manifest, summary(manifest.table, manifest.hash, listing)


def _with_new_columns(table: pa.Table) -> pa.Table:
    """Adds a column that manifests of earlier versions do not have: their videos are read at an even rate."""
    if "variable_rate" in table.column_names:
        return table
    place = SCHEMA.get_field_index("variable_rate")
    return table.add_column(place, SCHEMA.field(place), pa.array([False] * len(table), pa.bool_()))


def _write(manifest: Manifest, counts: IndexSummary, config: Config) -> None:
    manifest.save(manifest_path(config.run.dir))
    write_json(index_path(config), asdict(counts))


def _keep_previous(manifest: Manifest, config: Config) -> None:
    """Renames the previous manifest if the new one lost all readable videos of a split."""
    path = manifest_path(config.run.dir)
    with suppress(UserError):  # there is no previous manifest, or it is unfinished
        lost = set(Manifest.load(path).readable["split"]) - set(manifest.readable["split"])
        if lost:
            kept = path.with_name("manifest.before.parquet")
            path.replace(kept)
            splits = " and ".join(sorted(lost))
            say(f"no video of {splits} is readable any more; the previous manifest is kept as {kept}")


def _why_outdated(manifest: Manifest, config: Config) -> str:
    """Returns why a manifest is not valid for a config, or an empty string if it is."""
    if manifest.fingerprint != _fingerprint(config):
        return "was made from other annotations or settings, or by another version"
    if config.index.verify == "full" and manifest.readable._arrow["damage"].null_count:
        return "has videos that were not decoded completely"
    if "unprobed" in manifest["status"]:
        return "has videos that were not probed, because the process that read them was killed"
    if any(not len(manifest.split(split).readable) for split in _sources(config)):
        return "has a split without a readable video"
    return ""


def _fingerprint(config: Config) -> str:
    """Returns text that identifies the inputs of a manifest, except the video files."""
    limits = Limits.of(config.data)
    bounds = "" if limits == DEFAULT_LIMITS else f"-{limits.max_pixels}-{limits.max_frames}"
    return f"{PROBE_VERSION}{bounds}-{fingerprint(config)}"


def _table(listed: Sequence[ListedVideo], results: Mapping[str, ProbeResult]) -> pa.Table:
    columns = zip(*(_row_of(video, results[video.path]) for video in listed), strict=True)
    return pa.Table.from_arrays([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def _row_of(video: ListedVideo, result: ProbeResult) -> Row:
    if result is None:
        info, status, cause = _NO_INFO, "missing", "no such file when it was indexed; run `videoadapt index` again"
    elif isinstance(result, NotProbed):
        info, status, cause = _NO_INFO, "unprobed", str(result)
    elif isinstance(result, str):
        info, status, cause = _NO_INFO, "broken", result
    elif video.frames not in (None, result.frames):  # frames of an incomplete folder would be at wrong times
        info, status = result, "broken"
        cause = f"the list states {plural(video.frames, 'frame')}, the folder has {result.frames}"
    else:
        info, status, cause = result, "ok", ""
    values = _info_values(info)
    return Row._make((video.path, video.video, video.source, video.label, *values, video.split, status, cause))
