"""Looks at a folder of videos or images before there is a config: its splits, classes, durations, sizes and rates."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from videoadapt.config.load import Config, make_config
from videoadapt.data.index.annotations import list_videos, source_of
from videoadapt.data.index.class_files import read_classes, write_classes
from videoadapt.data.index.class_folders import scan_class_folders
from videoadapt.data.index.class_names import whole_number
from videoadapt.data.index.find_files import NearFiles, is_left_out
from videoadapt.data.index.formats import is_list, read_table
from videoadapt.data.index.identity import ListedVideo
from videoadapt.data.index.lists import read_list
from videoadapt.data.index.probe_pool import ProbeResult, probe_files
from videoadapt.data.index.sources import Split
from videoadapt.data.video.limits import Limits
from videoadapt.data.video.probe import VideoInfo
from videoadapt.data.video.suffixes import is_media
from videoadapt.errors import UserError, few
from videoadapt.runtime.machine import available_cpus

# Names of lists and folders without suffix. `test` serves as val only if there is no other: many data sets have no val.
_TRAIN_NAMES = ("train", "training", "train_list", "trainlist")
_VAL_NAMES = ("val", "valid", "validate", "validation", "val_list", "vallist")
_TEST_NAMES = ("test", "testing", "test_list", "testlist")
# Other names of folders that have the videos of a split, such as `videos_val`, `train_256` or `rawframes_train`.
_SPLIT_FOLDER = re.compile(r"(?:[a-z]+_)?(train|training|val|valid|validation|test)(?:_\d+)?", re.IGNORECASE)
_CLASS_NAMES = ("classes", "class_names", "labels", "categories", "classInd", "class_list")
_LIST_SUFFIXES = (".csv", ".txt", ".json", ".list", ".tsv")
_SAMPLE = 500  # videos that are opened: about a second on a core for small files
_IN_A_ROW = 0.8  # fraction of the videos whose names are numbers in a row, from which they may be of one scene
_VAL_FRACTION = 0.2  # of each class, if there is no val split


@dataclass(frozen=True)
class Sources:
    """The annotations that a folder has."""

    train: Path
    val: Path | None
    classes: Path | None  # a file with class names, beside lists
    root: Path | None  # where the paths of lists start


@dataclass(frozen=True)
class Spread:
    """Low, middle and high value of a property over the videos: the 10th, 50th and 90th percentile."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Survey:
    """What a folder of data has. Times, sizes and rates are of the opened videos."""

    sources: Sources
    kind: Literal["videos", "images"]
    classes: tuple[str, ...]  # names in label order
    counts: dict[Split, tuple[int, ...]]  # videos of each class, by split
    opened: int
    unreadable: tuple[str, ...]  # path and cause of opened files that cannot be read
    seconds: Spread
    fps: Spread
    short_side: Spread  # pixels
    aspect: float  # median of long side / short side
    notes: tuple[str, ...]  # messages about the annotations
    files: dict[str, str]  # files that the config needs beside it: class names, the lists of a drawn val split
    source_count: int | None = None  # of train, by `data.source_pattern`; None without it

    def clips(self, split: Split) -> int:
        """Returns the number of videos of a split."""
        return sum(self.counts.get(split, ()))

    @property
    def imbalance(self) -> float:
        """Videos of the largest class of train / those of the smallest class that has one."""
        present = [count for count in self.counts["train"] if count]
        return max(present) / min(present)


def survey(
    folder: Path, beside: Path, kind: str = "auto", classes: str | None = None, source_pattern: str | None = None
) -> Survey:
    """Looks at a folder of data.

    Args:
        folder: A folder per class, folders `train` and `val` with a folder per class each, or a folder with lists
            `train.csv` and `val.csv`. A file is a list without a val split.
        beside: The folder of the future config, where `files` will be.
        kind: `data.kind`, for a folder with videos and images.
        classes: `data.classes`, in place of a file of class names in the folder.
        source_pattern: `data.source_pattern`; a drawn val split has whole sources, of all classes.

    Raises:
        UserError: There are no videos, only one class, videos and images, or classes in val that train does not have;
            or annotations cannot be used.
        RunError: The processes that read the videos were killed.
    """
    found, notes = find_sources(folder)
    if classes is not None:
        found = replace(found, classes=Path(classes))
    with tempfile.TemporaryDirectory(prefix="videoadapt-new-") as name:
        temporary = Path(name)
        files: dict[str, str] = {}
        names = _names_of_lists(found)
        if names:
            class_file, text = write_classes(names)
            files[class_file] = text
            (temporary / class_file).write_text(text, encoding="utf-8")
            notes.append(
                f"class names from the labels of the lists, in the order of their names: {beside / class_file}"
            )
            found = replace(found, classes=temporary / class_file)
        config = _config(found, _class_count(found), kind)
        listing = list_videos(config)
        _require_classes(listing.videos, listing.classes)
        opened = _opened(listing.videos, config, temporary / "probed.jsonl")
    videos, drawn_notes = listing.videos, []
    if found.val is None:
        videos = _draw_val(videos, source_pattern)
        class_file, text = write_classes(listing.classes)
        files |= {**_lists(videos, listing.classes), class_file: text}
        found = Sources(beside / "train.csv", beside / "val.csv", beside / class_file, None)
        count = sum(video.split == "val" for video in videos)
        drawn_notes.append(
            f"no val split: {count} of {len(videos)} videos, about the last {_VAL_FRACTION:.0%} of each class in the "
            f"order of names, are in {found.val}. If videos of one scene, person or camera are in both lists, accuracy "
            "on val is too high: move whole scenes"
        )
    elif names:
        found = replace(found, classes=beside / class_file)
    notes += [*listing.notes, *drawn_notes]
    if source_pattern is None:
        notes += _series_note(listing.videos)
    data = _survey(found, videos, listing.classes, opened, notes=tuple(notes), files=files)
    return data if source_pattern is None else replace(data, source_count=_count_sources(videos, source_pattern))


def find_sources(folder: Path) -> tuple[Sources, list[str]]:
    """Finds the lists or folders of the splits, and says what is used as val if no name says val.

    Raises:
        UserError: There is no such folder, or nothing in it that can be a split.
    """
    if folder.is_file():
        return Sources(folder, None, _class_file(folder.parent), folder.parent), []
    if not folder.is_dir():
        raise UserError(f"--data: {folder}: no such folder")
    for pick in (_list_of, _class_folders_of):  # lists win: a folder per class is often beside them
        train, val, test = (pick(folder, names) for names in (_TRAIN_NAMES, _VAL_NAMES, _TEST_NAMES))
        if train is None:
            continue
        notes = [f"{test} is used as val: there is no val split beside it"] if test and not val else []
        lists = pick is _list_of
        return Sources(train, val or test, _class_file(folder) if lists else None, folder if lists else None), notes
    if not any(path.is_dir() and not is_left_out(path.name) for path in folder.iterdir()):
        media = sum(is_media(path.name) for path in folder.iterdir())
        raise UserError(
            f"--data: {folder} has {f'{media} videos or images, but ' if media else ''}no folder per class, and no "
            "list train.csv with a line `path label` for each video; sort the files into folders, or write a list"
        )
    _require_no_splits(folder)
    return Sources(folder, None, None, None), []


def _require_no_splits(folder: Path) -> None:
    """Refuses folders of splits, which would become classes. A single one may be a class, such as of vehicles."""
    matches = ((path.name, _SPLIT_FOLDER.fullmatch(path.name)) for path in sorted(folder.iterdir()) if path.is_dir())
    splits = {name: match[1].lower() for name, match in matches if match}
    if len(set(splits.values())) > 1:
        raise UserError(
            f"--data: {folder} has folders that are named after splits, not classes: {few(splits)}. If each has a "
            "folder per class, name them train and val; else put lists train.csv and val.csv beside them, which may be "
            "the tables of Kinetics"
        )


def _list_of(folder: Path, names: Sequence[str]) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in _LIST_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _class_folders_of(folder: Path, names: Sequence[str]) -> Path | None:
    """Returns the folder of a split. A folder `train` with videos and no folders is a class, such as of vehicles."""
    candidates = (folder / name for name in names)
    return next((path for path in candidates if path.is_dir() and any(p.is_dir() for p in path.iterdir())), None)


def _class_file(folder: Path) -> Path | None:
    return _list_of(folder, _CLASS_NAMES)


def _splits(sources: Sources) -> dict[Split, Path]:
    given: dict[Split, Path | None] = {"train": sources.train, "val": sources.val}
    return {split: path for split, path in given.items() if path is not None}


def _labels_of_lists(sources: Sources) -> list[str]:
    """Returns all labels of lists without a file of class names; empty for tables and folders."""
    if sources.classes is not None:
        return []
    near, labels = NearFiles(), []
    for split, path in _splits(sources).items():
        if is_list(path, split):
            root = (sources.root or path.parent).absolute()
            labels += [entry.label for entry in read_list(path, split, root, (), near).entries]
    return labels


def _names_of_lists(sources: Sources) -> list[str]:
    """Returns the class names of lists whose labels are names, sorted; empty if they are numbers."""
    labels = {label for label in _labels_of_lists(sources) if label}
    return sorted(labels) if any(whole_number(label) is None for label in labels) else []


def _class_count(sources: Sources) -> int:
    if sources.classes is not None:
        return len(read_classes(sources.classes).names)
    if sources.train.is_dir():
        return max(1, len(scan_class_folders(sources.train).classes))
    if not is_list(sources.train, "train"):
        return max(1, len(read_table(sources.train, "train", sources.train.parent).classes))
    numbers = [number for label in _labels_of_lists(sources) if (number := whole_number(label)) is not None]
    # Labels that count from 1 are refused where the videos are listed, with the remedy.
    return max(1, max(numbers, default=0) + (min(numbers, default=0) == 0))


def _config(sources: Sources, classes: int, kind: str) -> Config:
    data: dict[str, Any] = {
        split: {"annotations": str(path).replace("$", "$$")} for split, path in _splits(sources).items()
    }
    data |= {"kind": kind}
    for key in ("root", "classes"):
        if (path := getattr(sources, key)) is not None:
            data[key] = str(path).replace("$", "$$")
    return make_config({"data": data, "model": {"num_classes": classes}}, "--data")


def _require_classes(videos: Sequence[ListedVideo], classes: Sequence[str]) -> None:
    labels: dict[str, set[int]] = {"train": set(), "val": set()}
    for video in videos:
        labels[video.split].add(video.label)
    if len(labels["train"]) < 2:  # noqa: PLR2004
        raise UserError(
            f"--data: all {len(videos)} videos are of one class, {classes[min(labels['train'], default=0)]}; a model "
            "needs two classes or more to tell apart"
        )
    unknown = sorted(labels["val"] - labels["train"])
    if unknown:
        shown = few(classes[number] for number in unknown)
        raise UserError(f"--data: val has classes without a video in train: {shown}; add videos, or move some")


def _opened(videos: Sequence[ListedVideo], config: Config, cache: Path) -> dict[str, ProbeResult]:
    """Opens videos, evenly spread over the list if there are many."""
    paths = list(dict.fromkeys(video.path for video in videos))
    step = max(1, len(paths) / _SAMPLE)
    sample = [paths[int(number * step)] for number in range(int(len(paths) / step))]
    limits = Limits.of(config.data)
    return probe_files(
        sample, full=False, cache=cache, workers=available_cpus(), timeout_s=config.index.timeout_s, limits=limits
    )


def _survey(
    sources: Sources,
    videos: Sequence[ListedVideo],
    classes: tuple[str, ...],
    opened: dict[str, ProbeResult],
    *,
    notes: tuple[str, ...],
    files: dict[str, str],
) -> Survey:
    infos = [info for info in opened.values() if isinstance(info, VideoInfo)]
    failed = [f"{path}: {info or 'no such file'}" for path, info in opened.items() if not isinstance(info, VideoInfo)]
    if not infos:
        raise UserError(f"--data: none of the {len(opened)} files looked at can be read; the first: {failed[0]}")
    counts = {split: [0] * len(classes) for split in ("train", "val")}
    for video in videos:
        counts[video.split][video.label] += 1
    images = all(info.container == "image" for info in infos)
    return Survey(
        sources=sources,
        kind="images" if images else "videos",
        classes=classes,
        counts={split: tuple(numbers) for split, numbers in counts.items()},  # type: ignore[misc]
        opened=len(opened),
        unreadable=tuple(failed),
        seconds=_spread(info.duration_s for info in infos),
        fps=_spread(info.fps for info in infos),
        short_side=_spread(min(info.width, info.height) for info in infos),
        aspect=statistics.median(max(info.width, info.height) / min(info.width, info.height) for info in infos),
        notes=notes,
        files=files,
    )


def _spread(values: Iterable[float]) -> Spread:
    ordered = sorted(values)
    low, middle, high = (ordered[round(fraction * (len(ordered) - 1))] for fraction in (0.1, 0.5, 0.9))
    return Spread(low, middle, high)


def _count_sources(videos: Sequence[ListedVideo], pattern: str) -> int:
    return len({_source(video, pattern) for video in videos if video.split == "train"})


def _series_note(videos: Sequence[ListedVideo]) -> list[str]:
    """Returns a message if nearly all names are numbers in a row, such as `glass1.jpg` and `glass2.jpg`."""
    series: dict[tuple[str, str], dict[int, str]] = {}  # what stands around the number: names by number
    for video in videos:
        if match := re.fullmatch(r"(.*?)(\d{1,9})(\.\w+)", video.path):
            series.setdefault((match[1], match[3]), {})[int(match[2])] = Path(video.path).name
    rows = [(numbers, suffix) for (_, suffix), numbers in series.items()]
    in_a_row = sum(n - 1 in numbers or n + 1 in numbers for numbers, _ in rows for n in numbers)
    if in_a_row < _IN_A_ROW * len(videos):
        return []
    longest, suffix = max(rows, key=lambda row: len(row[0]))
    names = f"{longest[min(longest)]} to {longest[max(longest)]}"
    return [
        f"names are numbers in a row ({names}): if neighbours show one object or scene, set "
        f"data.source_pattern, such as '(.*)\\d\\{suffix}' for blocks of ten. Otherwise `data.holdout` parts them, and "
        "intervals take each for independent of the others"
    ]


def _draw_val(videos: Sequence[ListedVideo], source_pattern: str | None) -> list[ListedVideo]:
    """Moves the last videos of each class, in the order of their names, to val: whole sources, nearly as many as asked.

    Neighbours in this order often show the same scene, so that a random draw would put one scene into both splits. A
    source may have videos of several classes, anywhere in the order; the last name of its videos gives it its place.
    """
    ordered = sorted(videos, key=lambda video: _natural(video.path))
    members: dict[str, Counter[int]] = {}  # videos of each class, by source; a source comes where its last video does
    for video in ordered:
        source = _source(video, source_pattern)
        members[source] = members.pop(source, Counter()) + Counter([video.label])
    total = Counter(video.label for video in videos)
    missing = {label: max(1, round(_VAL_FRACTION * n)) if n > 1 else 0 for label, n in total.items()}
    taken: Counter[int] = Counter()
    val: set[str] = set()

    def take(source: str) -> None:
        val.add(source)
        taken.update(members[source])
        missing.update({label: missing[label] - n for label, n in members[source].items()})

    def comes_nearer(counts: Counter[int]) -> bool:
        return sum(abs(missing[label] - n) - abs(missing[label]) for label, n in counts.items()) < 0

    def is_first(counts: Counter[int]) -> bool:
        return any(not taken[label] for label in counts)

    from_last = [*reversed(members)]
    from_smallest = sorted(from_last, key=lambda source: members[source].total())  # it may be too large
    for is_wanted, order in ((comes_nearer, from_last), (is_first, from_smallest)):
        for source in order:
            counts = members[source]
            remains = all(taken[label] + n < total[label] for label, n in counts.items())
            if source not in val and remains and is_wanted(counts):
                take(source)
    if not val:
        raise UserError(
            "--data: there is only one video for each class, or one source of them (data.source_pattern); some are "
            "needed to train, others to measure"
        )
    return [video._replace(split="val") if _source(video, source_pattern) in val else video for video in ordered]


def _source(video: ListedVideo, pattern: str | None) -> str:
    """Returns the source of a video, as the run will find it; its path if it is a source of its own."""
    return (video.source if pattern is None else source_of(video, pattern)) or video.path


def _natural(path: str) -> list[tuple[int, str]]:
    """Returns a key that sorts `clip 2` before `clip 10`."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", path)]


def _lists(videos: Sequence[ListedVideo], classes: Sequence[str]) -> dict[str, str]:
    """Returns the texts of lists of the splits. Labels are names: of classes `1` and `2`, the number 1 is the second.

    Raises:
        UserError: The path of a video has a line break, which no list can state.
    """
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for video in videos:
        if "\n" in video.path or "\r" in video.path:
            raise UserError(f"--data: {video.path!r}: a line break in a path cannot be written to a list; rename it")
        quoted = video.path.replace('"', '""')
        lines[video.split].append(f'"{quoted}" {classes[video.label]}\n')
    return {f"{split}.csv": "".join(each) for split, each in lines.items()}
