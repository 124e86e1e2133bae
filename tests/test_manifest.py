"""The manifest: lists and folders, what is missing or broken, going on after an interruption, and the hash."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from video_files import write_list, write_video
from videoadapt.config import Config, make_config
from videoadapt.data import probing
from videoadapt.data.annotations import list_videos
from videoadapt.data.manifest import Manifest, index, load_or_index, summary
from videoadapt.data.probe import probe
from videoadapt.errors import ConfigError, UserError


@pytest.fixture(scope="session")
def one_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("one") / "one.mp4", 6)


@pytest.fixture
def videos(tmp_path: Path, one_video: Path) -> Path:
    """A folder of ten videos, one of them broken."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(9):
        shutil.copy(one_video, folder / f"v{number}.mp4")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def config_of(run: Path, num_classes: int = 3, **data: Any) -> Config:
    """A config with `data` settings; `train=PATH` and `val=PATH` stand for the annotations."""
    for split in ("train", "val"):
        if split in data:
            data[split] = {"annotations": str(data[split])}
    return make_config({"run": {"dir": str(run)}, "data": data, "model": {"num_classes": num_classes}})


def labels_of(config: Config) -> dict[str, int]:
    return {video.video: video.label for video in list_videos(config)[0]}


def test_index_states_every_listed_video_and_what_is_wrong_with_it(tmp_path: Path, videos: Path) -> None:
    rows: list[tuple[str, int | str]] = [("v0.mp4", 0), ("broken.mp4", 1), ("gone.mp4", 1), ("v1.mp4", 2)]
    train = write_list(videos / "train.txt", rows)
    val = write_list(videos / "val.txt", [("v2.mp4", 0)])
    manifest = index(config_of(tmp_path / "run", train=train, val=val))
    assert len(manifest) == 5
    assert manifest["status"].tolist() == ["ok", "broken", "missing", "ok", "ok"]
    assert manifest["label"].tolist() == [0, 1, 1, 2, 0]
    assert manifest["video"].tolist() == ["v0.mp4", "broken.mp4", "gone.mp4", "v1.mp4", "v2.mp4"]
    assert manifest.split("train").readable["path"].tolist() == [str(videos / "v0.mp4"), str(videos / "v1.mp4")]
    row = manifest.row(0)
    assert row.info == probe(videos / "v0.mp4")
    assert type(row.label) is int
    assert "cannot be read" in manifest.row(1).cause
    assert manifest.classes == ("0", "1", "2")
    told = summary(manifest)
    assert told["splits"]["train"] | {"causes": None} == {
        "listed": 4, "ok": 2, "missing": 1, "broken": 1, "causes": None, "classes": 2, "hours": 0.0001
    }  # fmt: skip
    assert sum(told["splits"]["train"]["causes"].values()) == 2
    assert [failed["path"] for failed in told["failed"]] == [str(videos / "broken.mp4"), str(videos / "gone.mp4")]
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize("separator", [" ", ",", "\t", ";", ", ", "  "])
def test_lists_may_use_any_separator_and_paths_may_hold_spaces(tmp_path: Path, separator: str) -> None:
    path = write_list(tmp_path / "l.txt", [("a.mp4", 0), ("my clips/b, c.mp4", 2), ("/d.mp4", 1)], separator)
    path.write_text("# path label\n\n" + path.read_text() + "\n")
    listed = list_videos(config_of(tmp_path, train=path))[0]
    assert [(v.video, v.label) for v in listed] == [("a.mp4", 0), ("my clips/b, c.mp4", 2), ("/d.mp4", 1)]
    assert [v.path for v in listed] == [str(tmp_path / "a.mp4"), str(tmp_path / "my clips/b, c.mp4"), "/d.mp4"]


def test_labels_may_be_class_names_with_spaces(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("wrestling\narm wrestling\nhigh jump 2\n")
    rows = [
        ("my clip.mp4", "arm wrestling"),
        ("b.mp4", "wrestling"),
        ("c.mp4", "high jump 2"),
        ("d.mp4", "arm_wrestling"),
    ]
    path = write_list(tmp_path / "l.txt", [*rows, ("e.mp4", 2)])
    config = config_of(tmp_path, train=path, classes=str(tmp_path / "classes.txt"))
    assert labels_of(config) == {"my clip.mp4": 1, "b.mp4": 0, "c.mp4": 2, "d.mp4": 1, "e.mp4": 2}
    assert list_videos(config)[1] == ("wrestling", "arm wrestling", "high jump 2")


def test_data_root_is_where_relative_paths_start(tmp_path: Path) -> None:
    path = write_list(tmp_path / "lists" / "l.txt", [("a.mp4", 0)])
    (video,) = list_videos(config_of(tmp_path, train=path, root=str(tmp_path / "videos")))[0]
    assert video.path == str(tmp_path / "videos" / "a.mp4")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("b.mp4 3", r"l\.txt:2: label 3 of b\.mp4: expected 0 to 2"),
        ("b.mp4 -1", r"l\.txt:2: label -1"),
        ("b.mp4 cats", r"l\.txt:2: label 'cats': expected a number"),
        ("b.mp4", r"l\.txt:2: expected `path label`"),
    ],
)
def test_a_label_that_cannot_be_is_refused_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "l.txt"
    path.write_text(f"a.mp4 0\n{line}\n")
    with pytest.raises(ConfigError, match=said):
        index(config_of(tmp_path, train=path))


def test_a_video_in_two_splits_or_twice_in_one_is_refused_by_name(tmp_path: Path) -> None:
    train = write_list(tmp_path / "train.txt", [("a.mp4", 0), ("b.mp4", 0)])
    val = write_list(tmp_path / "val.txt", [("./b.mp4", 0)])
    with pytest.raises(UserError, match=r"b\.mp4 is in both train and val \(.*train\.txt:2, .*val\.txt:1\)"):
        index(config_of(tmp_path, train=train, val=val))
    twice = write_list(tmp_path / "twice.txt", [("a.mp4", 0), ("a.mp4", 1)])
    with pytest.raises(UserError, match=r"a\.mp4 is twice in train"):
        index(config_of(tmp_path, train=twice))


def class_folders(root: Path, video: Path, *names: str) -> Path:
    for name in names:
        (root / name / "deep").mkdir(parents=True)
        shutil.copy(video, root / name / "deep" / "a.MP4")
        (root / name / "readme.txt").write_text("no video")
    return root


def test_a_folder_per_class_gives_labels_in_the_order_of_names(tmp_path: Path, one_video: Path) -> None:
    train = class_folders(tmp_path / "train", one_video, "dogs", "cats", "apes")
    val = class_folders(tmp_path / "val", one_video, "cats")
    config = config_of(tmp_path / "run", train=train, val=val)
    manifest = index(config)
    assert manifest.classes == ("apes", "cats", "dogs")
    assert manifest["label"].tolist() == [0, 1, 2, 1]
    assert manifest["video"].tolist()[0] == "apes/deep/a.MP4"
    (tmp_path / "val" / "fish").mkdir()
    with pytest.raises(ConfigError, match="fish"):
        list_videos(config)


def test_a_few_class_folders_need_the_names_of_all_classes(tmp_path: Path, one_video: Path) -> None:
    val = class_folders(tmp_path / "val", one_video, "high_jump", "abseiling")
    with pytest.raises(ConfigError, match=r"model\.num_classes: is 3, but .* has 2 classes"):
        list_videos(config_of(tmp_path, val=val))
    (tmp_path / "classes.txt").write_text("abseiling\narchery\nhigh jump\n")
    named = config_of(tmp_path, val=val, classes=str(tmp_path / "classes.txt"))
    assert labels_of(named) == {"abseiling/deep/a.MP4": 0, "high_jump/deep/a.MP4": 2}


def test_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.annotations, data\.val\.annotations: neither is given"):
        index(config_of(tmp_path))
    with pytest.raises(ConfigError, match=r"data\.val\.annotations: .*nowhere\.txt does not exist"):
        index(config_of(tmp_path, val=tmp_path / "nowhere.txt"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not a text file"):
        index(config_of(tmp_path, val=tmp_path / "binary.txt"))


def test_a_split_without_a_readable_video_is_refused_with_counts_and_root(tmp_path: Path, videos: Path) -> None:
    train = write_list(tmp_path / "train.txt", [("gone.mp4", 0), ("lost.mp4", 1), ("broken.mp4", 1)])
    with pytest.raises(UserError, match=rf"not one of the 3 videos .* 2 missing, 1 broken, .* {videos} \(data\.root\)"):
        index(config_of(tmp_path / "run", train=train, root=str(videos)))
    assert not (tmp_path / "run" / "manifest.parquet").exists()


def test_index_goes_on_where_it_stopped(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"v{i}.mp4", i % 3) for i in range(9)]
    config = config_of(tmp_path / "run", train=write_list(videos / "l.txt", [*rows, ("broken.mp4", 0)]))
    first = index(config)
    found = tmp_path / "run" / "probed.jsonl"
    lines = found.read_text().splitlines()
    assert len(lines) == 9
    # As an interruption leaves it: some probed, one line torn. One file changes, and the broken one is mended.
    found.write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])
    write_video(videos / "v0.mp4", 7)
    shutil.copy(videos / "v1.mp4", videos / "broken.mp4")
    probed: list[str] = []

    def in_this_process(paths: list[str], workers: int) -> Any:  # noqa: ARG001 - the signature of what it replaces
        probed.extend(Path(path).name for path in paths)
        return ((path, probe(path)) for path in paths)

    monkeypatch.setattr(probing, "_probe_in_processes", in_this_process)
    second = index(config)
    known = {Path(json.loads(line)["stamp"].split(" ", 2)[2]).name for line in lines[:5]} - {"v0.mp4"}
    assert sorted(probed) == sorted(({name for name, _ in rows} | {"broken.mp4"}) - known)
    assert second["frames"].tolist() == [7, *first["frames"].tolist()[1:-1], 6]


def crash_on_bad(path: str | Path) -> Any:
    if Path(path).name in {"v3.mp4", "v7.mp4"}:
        os._exit(11)
    return probe(path)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the patch reaches forked processes only")
def test_a_file_that_crashes_its_process_is_broken_and_the_others_are_not(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "probe", crash_on_bad)
    monkeypatch.setattr(probing, "_CHUNK", 2)
    train = write_list(videos / "l.txt", [(f"v{i}.mp4", 0) for i in range(9)])
    manifest = index(config_of(tmp_path / "run", train=train))
    broken = {Path(row.path).name: row.cause for row in map(manifest.row, range(9)) if row.status == "broken"}
    assert list(broken) == ["v3.mp4", "v7.mp4"]
    assert all("crashed" in cause for cause in broken.values())


def test_holdout_depends_on_ids_and_seed_not_on_the_order_of_the_list(tmp_path: Path) -> None:
    names = [f"v{i}.mp4" for i in range(400)]

    def held(order: list[str], seed: int = 0, share: float = 0.25) -> set[str]:
        train = write_list(tmp_path / "train.txt", [(name, 0) for name in order])
        val = write_list(tmp_path / "val.txt", [("other.mp4", 0)])
        config = config_of(tmp_path, train=train, val=val, holdout=share)
        config = config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})
        listed = list_videos(config)[0]
        assert [video.split for video in listed if video.video == "other.mp4"] == ["val"]
        return {video.video for video in listed if video.split == "holdout"}

    chosen = held(names)
    assert 0.17 < len(chosen) / len(names) < 0.33
    assert held(names[::-1]) == chosen
    assert held(names[:200]) == chosen & set(names[:200])
    assert held(names, seed=1) != chosen
    assert held(names, share=0.5) > chosen
    assert held(names, share=0.0) == set()


def test_a_saved_manifest_is_the_same_when_loaded(tmp_path: Path, videos: Path) -> None:
    train = write_list(videos / "l.txt", [("v0.mp4", 0), ("gone.mp4", 1), ("broken.mp4", 2)])
    config = config_of(tmp_path / "run", train=train)
    manifest = index(config)
    loaded = Manifest.load(tmp_path / "run" / "manifest.parquet")
    pd.testing.assert_frame_equal(loaded.table, manifest.table)
    assert (loaded.classes, loaded.hash, loaded.fingerprint) == (manifest.classes, manifest.hash, manifest.fingerprint)


def test_load_or_index_indexes_again_only_if_the_sources_changed(tmp_path: Path, videos: Path) -> None:
    train = write_list(videos / "l.txt", [("v0.mp4", 0), ("v1.mp4", 1)])
    config = config_of(tmp_path / "run", train=train)
    first = load_or_index(config)
    path = tmp_path / "run" / "manifest.parquet"
    written_at = path.stat().st_mtime_ns
    assert load_or_index(config).hash == first.hash
    assert path.stat().st_mtime_ns == written_at
    write_list(train, [("v0.mp4", 0), ("v1.mp4", 2)])
    assert load_or_index(config)["label"].tolist() == [0, 2]


def test_a_torn_or_foreign_manifest_is_refused(tmp_path: Path, videos: Path) -> None:
    config = config_of(tmp_path / "run", train=write_list(videos / "l.txt", [("v0.mp4", 0)]))
    index(config)
    path = tmp_path / "run" / "manifest.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as a manifest"):
        load_or_index(config)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(UserError, match="not a manifest of videoadapt"):
        Manifest.load(path)
    with pytest.raises(UserError, match=r"none\.parquet: cannot be read"):
        Manifest.load(tmp_path / "none.parquet")


def test_the_hash_is_of_the_population_not_of_its_order(tmp_path: Path, videos: Path) -> None:
    train = write_list(videos / "l.txt", [(f"v{i}.mp4", 0) for i in range(5)])
    manifest = index(config_of(tmp_path / "run", train=train))
    shuffled = Manifest(manifest.table.sample(frac=1, random_state=0), manifest.classes)
    assert shuffled.hash == manifest.hash
    assert len(manifest.hash) == 12
    for column, value in {"label": 1, "split": "val", "status": "broken", "video": "other.mp4"}.items():
        changed = manifest.table.copy()
        changed.loc[2, column] = value
        assert Manifest(changed, manifest.classes).hash != manifest.hash
