"""The manifest: missing, broken, damaged, repeated and changed files, and the hash of the population."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import small_runs as runs
from video_files import numbered, write_list, write_video
from videoadapt.commands.cli import main
from videoadapt.commands.tables import print_index
from videoadapt.config.load import Config, dump_config, make_config
from videoadapt.data.index.check import CheckResult, check
from videoadapt.data.index.manifest import Manifest, index, load_or_index
from videoadapt.data.index.probe_pool import NotProbed
from videoadapt.data.video.probe import PROBE_VERSION, probe
from videoadapt.errors import RunError, UserError


@pytest.fixture(scope="session")
def one_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("one") / "one.mp4", 6)


@pytest.fixture
def videos(tmp_path: Path, one_video: Path) -> Path:
    """A folder of ten files, of which `broken.mp4` is not a video."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(9):
        shutil.copy(one_video, folder / f"v{number}.mp4")
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def config_of(run: Path, num_classes: int = 3, **data: Any) -> Config:
    """Returns a config with `data` settings. `train=PATH` and `val=PATH` are the annotations."""
    for split in ("train", "val"):
        if split in data:
            data[split] = {"annotations": str(data[split])}
    return make_config({"run": {"dir": str(run)}, "data": data, "model": {"num_classes": num_classes}})


def write_frames(folder: Path, count: int) -> Path:
    """Writes a folder of uncompressed images, all with the same number of bytes."""
    folder.mkdir()
    for number, frame in enumerate(numbered(count)):
        Image.fromarray(frame).save(folder / f"img_{number}.bmp")
    return folder


def stored(config: Config) -> dict[str, Any]:
    """Returns the content of `index.json`."""
    summary: dict[str, Any] = json.loads((config.run.dir / "index.json").read_text())
    return summary


NO_EXAMPLES: dict[str, Any] = {"count": 0, "first": []}


def test_the_manifest_has_every_listed_video_with_its_status_and_cause(tmp_path: Path, videos: Path) -> None:
    rows: list[tuple[str, int | str]] = [("v0.mp4", 0), ("broken.mp4", 1), ("gone.mp4", 1), ("v1.mp4", 2)]
    train = write_list(videos / "train.txt", rows)
    val = write_list(videos / "val.txt", [("v2.mp4", 0)])
    write_video(videos / "v1.mp4", 90)
    config = config_of(tmp_path / "run", train=train, val=val)
    manifest = index(config)
    assert len(manifest) == 5
    assert manifest["status"].tolist() == ["ok", "broken", "missing", "ok", "ok"]
    assert manifest["label"].tolist() == [0, 1, 1, 2, 0]
    assert manifest["video"].tolist() == ["v0.mp4", "broken.mp4", "gone.mp4", "v1.mp4", "v2.mp4"]
    assert manifest.split("train").readable["path"].tolist() == [str(videos / "v0.mp4"), str(videos / "v1.mp4")]
    assert manifest.readable_rows("train").tolist() == [0, 3]
    assert manifest.readable_rows().tolist() == manifest.readable_rows("val", "train").tolist() == [0, 3, 4]
    assert manifest.readable_rows("holdout").tolist() == []
    row = manifest.row(0)
    assert row.info == probe(videos / "v0.mp4")
    assert (type(row.label), type(row.fps), row.damage) == (int, float, None)
    assert "cannot be read" in manifest.row(1).cause
    assert manifest.classes == ("0", "1", "2")
    summary = stored(config)
    assert summary["manifest"] == manifest.hash
    assert summary["splits"]["train"] == {
        "listed": 4, "ok": 2, "missing": 1, "broken": 1, "unprobed": 0, "damaged": 0, "classes": 2, "hours": 0.0009,
        "seconds": [0.2, 1.6, 3.0],
    }  # fmt: skip
    assert summary["missing"] == {"count": 1, "first": [str(videos / "gone.mp4")]}
    assert [(cause["count"], cause["first"]) for cause in summary["broken"]] == [(1, [str(videos / "broken.mp4")])]
    assert sum(summary["readers"].values()) == 3
    assert summary["verified"] == 0


def test_duplicates_and_leaks_are_counted_with_examples(tmp_path: Path, one_video: Path) -> None:
    a, b, c = (f"{letter * 11}_000001_000011" for letter in "abc")
    same_source = f"{'a' * 11}_000020_000030"
    folder = tmp_path / "videos"
    folder.mkdir()
    for number, name in enumerate((a, same_source, b)):
        write_video(folder / f"{name}.mp4", 6 + number)
    shutil.copy(folder / f"{b}.mp4", folder / "copy of b.mp4")
    shutil.copy(folder / f"{b}.mp4", folder / "second copy.mp4")
    rows = [(f"{a}.mp4", 0), (f"{b}.mp4", 1), (f"{a}.mp4", 0), (f"{c}.mp4", 2), ("gone.mp4", 0), ("lost.mp4", 0)]
    train = write_list(folder / "train.txt", rows)
    val = write_list(
        folder / "val.txt", [(f"{same_source}.mp4", 0), ("copy of b.mp4", 1), (f"{c}.mp4", 2), ("second copy.mp4", 1)]
    )
    config = config_of(tmp_path / "run", train=train, val=val)
    assert index(config)["source"].tolist()[:2] == ["a" * 11, "b" * 11]
    duplicates, leaks = stored(config)["duplicates"], stored(config)["leaks"]
    assert duplicates["listed_twice"]["count"] == 1
    assert a in duplicates["listed_twice"]["first"][0]
    copies = [str(folder / name) for name in (f"{b}.mp4", "copy of b.mp4", "second copy.mp4")]
    assert duplicates["same_content"] == {"count": 1, "first": [copies]}  # missing files have no content
    assert duplicates["other_class"]["count"] == 0
    assert leaks["same_content"] == {"count": 1, "first": [[f"train: {copies[0]}", f"val: {copies[1]}"]]}
    path_c = folder / f"{c}.mp4"
    assert leaks["same_id"] == {"count": 1, "first": [[f"train: {path_c}", f"val: {path_c}"]]}
    assert leaks["same_source"]["count"] == 2
    assert leaks["same_source"]["first"][0] == [
        f"train: {folder / a}.mp4", f"val: {folder / same_source}.mp4"
    ]  # fmt: skip


def test_equal_files_with_different_classes_are_named(
    tmp_path: Path, one_video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("val", "b")):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(one_video, tmp_path / split / name / f"{split}.mp4")
    (tmp_path / "val" / "a").mkdir()
    write_video(tmp_path / "val" / "a" / "other.mp4", 4)
    config = config_of(tmp_path / "run", 2, train=tmp_path / "train", val=tmp_path / "val")
    index(config)
    [group] = stored(config)["duplicates"]["other_class"]["first"]
    names = [("train", "a"), ("train", "b"), ("val", "b")]
    assert group == [f"{tmp_path / split / name / split}.mp4 ({name})" for split, name in names]
    print_index(stored(config))
    printed = capsys.readouterr().err
    assert "at least one label is wrong: 1" in printed and "remove these videos from one of the splits" in printed


def test_equal_file_names_below_two_folders_are_no_leak_but_equal_content_is(tmp_path: Path, one_video: Path) -> None:
    for split, frames in (("train", 6), ("val", 7)):
        write_video(tmp_path / split / "a" / "1.mp4", frames)
        shutil.copy(one_video, tmp_path / split / "a" / f"{split}.mp4")
    config = config_of(tmp_path / "run", 1, train=tmp_path / "train", val=tmp_path / "val")
    index(config)
    leaks = stored(config)["leaks"]
    assert (leaks["same_id"], leaks["same_source"]) == (NO_EXAMPLES, NO_EXAMPLES)
    assert leaks["same_content"]["count"] == 1


def test_equal_names_of_different_sources_are_no_leak(tmp_path: Path) -> None:
    for split, frames in (("train", 6), ("val", 7)):
        for number in (1, 2):
            write_video(tmp_path / split / "door" / f"door_{number}.mp4", frames + 2 * number)
    sources = {"train": tmp_path / "train", "val": tmp_path / "val"}
    config = config_of(tmp_path / "run", 1, **sources, source_pattern=r".*_(\d)\.mp4")
    index(config)
    leaks = stored(config)["leaks"]
    assert leaks["same_id"] == NO_EXAMPLES
    assert leaks["same_source"]["count"] == 2


def test_further_files_of_one_id_are_reported(tmp_path: Path, one_video: Path) -> None:
    name = "abcdefghijk_000001_000011.mp4"
    for folder in ("x", "y"):
        (tmp_path / "videos" / folder).mkdir(parents=True)
        shutil.copy(one_video, tmp_path / "videos" / folder / name)
    table = tmp_path / "val.csv"
    table.write_text("label,youtube_id,time_start,time_end,split\na,abcdefghijk,1,11,val\n")
    config = config_of(tmp_path / "run", 1, val=table, root=str(tmp_path / "videos"))
    index(config)
    further = stored(config)["duplicates"]["further_files"]
    assert further["count"] == 1
    assert str(tmp_path / "videos" / "y" / name) in further["first"][0]


def test_the_hash_does_not_depend_on_the_annotation_format(tmp_path: Path, one_video: Path) -> None:
    names = ["abcdefghijk_000001_000011", "bcdefghijkl_000002_000012"]
    for name in names:
        (tmp_path / "a").mkdir(exist_ok=True)
        shutil.copy(one_video, tmp_path / "a" / f"{name}.mp4")
    table = tmp_path / "val.csv"
    rows = "".join(f"a,{name[:11]},{int(name[12:18])},{int(name[19:])},val\n" for name in names)
    table.write_text(f"label,youtube_id,time_start,time_end,split\n{rows}")
    listed = write_list(tmp_path / "val.txt", [(f"a/{name}.mp4", 0) for name in names[::-1]])
    hashes = {index(config_of(tmp_path / f"run{i}", 1, val=val)).hash for i, val in enumerate((table, listed))}
    assert len(hashes) == 1


def test_file_names_in_any_language_are_kept(tmp_path: Path, one_video: Path) -> None:
    names = ["прыжок/ümläut é.mp4", "日本/🎥.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir()
        shutil.copy(one_video, tmp_path / name)
    config = config_of(tmp_path / "run", train=write_list(tmp_path / "l.txt", [(name, 0) for name in names]))
    index(config)
    assert load_or_index(config).readable["path"].tolist() == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path, one_video: Path, holdout: float) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    shutil.copy(os.fsencode(one_video), os.fsencode(tmp_path / "train" / "a") + b"/caf\xe9.mp4")
    with pytest.raises(UserError, match=r"caf.udce9\.mp4'.*: its name is not UTF-8"):
        index(config_of(tmp_path / "run", 1, train=tmp_path / "train", holdout=holdout))


def test_index_accepts_a_split_without_a_readable_video_and_load_or_index_refuses_it(
    tmp_path: Path, videos: Path
) -> None:
    train = write_list(tmp_path / "train.txt", [("gone.mp4", 0), ("lost.mp4", 1), ("broken.mp4", 1)])
    config = config_of(tmp_path / "run", train=train, root=str(videos))
    assert index(config)["status"].tolist() == ["missing", "missing", "broken"]
    assert stored(config)["splits"]["train"]["listed"] == 3
    with pytest.raises(UserError, match=rf"none of the 3 videos .* 2 missing, 1 broken; .* {videos} \(data\.root\)"):
        load_or_index(config)
    shutil.copy(videos / "v0.mp4", videos / "gone.mp4")
    assert len(load_or_index(config).readable) == 1


def test_copies_of_a_file_and_their_sources_stay_in_one_drawn_split(tmp_path: Path) -> None:
    """`g_1.bmp` is a copy of `a_0.bmp`: both images of g follow those of a, in any order of the list."""
    for number, name in enumerate(f"{letter}_{image}" for letter in "abcdefg" for image in range(2)):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{name}.bmp")
    shutil.copy(tmp_path / "a_0.bmp", tmp_path / "g_1.bmp")
    names = sorted(path.name for path in tmp_path.glob("*.bmp"))
    for number, order in enumerate((names, names[::-1])):
        train = write_list(tmp_path / "train.txt", [(name, 0) for name in order])
        data: dict[str, Any] = {"holdout": 0.4, "calibrate": 0.3, "source_pattern": r"(.)_\d\.bmp"}
        splits = index(config_of(tmp_path / f"run{number}", train=train, **data)).table.set_index("video")["split"]
        by_source = splits.groupby(splits.index.str[0]).unique().map(list)
        assert by_source["g"] == by_source["a"]
        assert (by_source.str.len() == 1).all() and len(set(splits)) > 1


def test_an_empty_holdout_or_train_split_is_refused_with_data_holdout(tmp_path: Path, videos: Path) -> None:
    train = write_list(videos / "l.txt", [("v0.mp4", 0), ("v1.mp4", 0)])
    with pytest.raises(
        UserError, match=r"data\.holdout: with a fraction of 0\.001, none of the 2 videos .* split holdout"
    ):
        load_or_index(config_of(tmp_path / "run", train=train, holdout=0.001))
    with pytest.raises(UserError, match=r"data\.holdout: .* in the split train"):
        load_or_index(config_of(tmp_path / "run", train=train, holdout=0.999))


def verified(config: Config) -> Config:
    """Returns a config with `index.verify: full`."""
    return config.model_copy(update={"index": config.index.model_copy(update={"verify": "full"})})


def test_full_verification_records_damage_and_keeps_the_video(tmp_path: Path, videos: Path) -> None:
    content = bytearray(write_video(videos / "v1.mp4", 30).read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    (videos / "v1.mp4").write_bytes(content)
    config = config_of(tmp_path / "run", train=write_list(videos / "l.txt", [("v0.mp4", 0), ("v1.mp4", 1)]))
    quick = load_or_index(config)
    assert [quick.row(i).damage for i in range(2)] == [None, None]
    full = load_or_index(verified(config))
    assert full["status"].tolist() == ["ok", "ok"]
    assert full.row(0) == quick.row(0)._replace(damage="")
    assert "of 30 frames damaged" in str(full.row(1).damage)
    assert full.row(1).reader == "pyav"
    assert full.hash == quick.hash
    summary = stored(config)
    assert (summary["verified"], summary["splits"]["train"]["damaged"], summary["damaged"]["count"]) == (2, 1, 1)
    assert str(videos / "v1.mp4") in summary["damaged"]["first"][0]
    assert load_or_index(config)["damage"].tolist() == full["damage"].tolist()  # a call without verification keeps them


def test_check_finds_every_kind_of_change(tmp_path: Path, videos: Path) -> None:
    rows = [*((f"v{i}.mp4", 0) for i in range(5)), ("broken.mp4", 1), ("gone.mp4", 2), ("lost.mp4", 2)]
    config = config_of(tmp_path / "run", train=write_list(videos / "l.txt", rows))
    manifest = index(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert check(tmp_path / "run", config) == CheckResult(
        manifest=manifest.hash, videos=8, unchanged=8, changes={}, differences=[]
    )
    (videos / "v1.mp4").unlink()
    (videos / "v2.mp4").write_bytes(b"no video")
    write_video(videos / "v3.mp4", 7)
    content = (videos / "v4.mp4").read_bytes()
    (videos / "v4.mp4").write_bytes(content.replace(b"Lavf", b"Lavg"))  # the size is unchanged
    shutil.copy(videos / "v0.mp4", videos / "broken.mp4")
    shutil.copy(videos / "v0.mp4", videos / "gone.mp4")
    result = check(tmp_path / "run" / "manifest.parquet", config)
    assert {Path(row.path).name: row.change for row in result.differences} == {
        "v1.mp4": "gone", "v2.mp4": "broken now", "v3.mp4": "changed", "v4.mp4": "changed",
        "broken.mp4": "readable now", "gone.mp4": "found now",
    }  # fmt: skip
    assert (result.videos, result.unchanged, result.changes["changed"]) == (8, 2, 2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_an_overwritten_image_of_a_folder_is_a_change(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "clip", 3)
    config = config_of(tmp_path / "run", train=write_list(tmp_path / "l.txt", [("clip 3", 0)]))
    index(config)
    assert check(tmp_path / "run", config).changes == {}
    Image.fromarray(numbered(1, start=9)[0]).save(folder / "img_1.bmp")  # the size is unchanged
    assert check(tmp_path / "run", config).changes == {"changed": 1}
    index(config)
    assert check(tmp_path / "run", config).changes == {}


def test_a_folder_with_another_number_of_frames_than_listed_is_broken(tmp_path: Path) -> None:
    write_frames(tmp_path / "a", 20)
    write_frames(tmp_path / "b", 20)
    train = write_list(tmp_path / "l.txt", [("a 300", 0), ("b 20", 0)])
    config = config_of(tmp_path / "run", train=train)
    manifest = index(config)
    assert manifest["status"].tolist() == ["broken", "ok"]
    assert manifest.row(0).cause == "the list states 300 frames, the folder has 20"
    assert check(tmp_path / "run", config).changes == {}


def test_causes_are_grouped_without_the_names_of_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = write_frames(tmp_path / name, 3)
        (folder / "img_0.bmp").unlink()
        (folder / "img_0.bmp").write_bytes(b"torn")
        for image in folder.iterdir():
            image.rename(folder / f"{name} {image.name}")
    config = config_of(tmp_path / "run", train=write_list(tmp_path / "l.txt", [("a", 0), ("b", 0)]))
    assert index(config).row(0).cause.startswith("a img_0.bmp: cannot be read as an image")
    (cause,) = stored(config)["broken"]
    assert (cause["count"], cause["first"]) == (2, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert cause["cause"].startswith("cannot be read as an image")
    with pytest.raises(UserError) as caught:
        load_or_index(config)
    assert str(caught.value).count(str(tmp_path / "a")) == 1


def test_a_missing_file_of_two_splits_is_counted_once(tmp_path: Path, videos: Path) -> None:
    rows: list[tuple[str, int | str]] = [("v0.mp4", 0), ("gone.mp4", 0), ("broken.mp4", 0)]
    train, val = (write_list(videos / f"{split}.txt", rows) for split in ("train", "val"))
    config = config_of(tmp_path / "run", train=train, val=val)
    index(config)
    summary = stored(config)
    assert summary["missing"] == {"count": 1, "first": [str(videos / "gone.mp4")]}
    assert summary["broken"][0]["first"] == [str(videos / "broken.mp4")]
    assert [split["missing"] for split in summary["splits"].values()] == [1, 1]


def test_notes_on_the_annotations_are_printed_and_stored(
    tmp_path: Path, one_video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(one_video, tmp_path / "abcdefghijk_000001_000011.mp4")
    table = tmp_path / "test.csv"
    table.write_text("label,youtube_id,time_start,time_end,split\na,abcdefghijk,1,11,test\n")
    config = config_of(tmp_path / "run", 1, val=table)
    index(config)
    (note,) = stored(config)["notes"]
    assert "are of split 'test'; they are used as val" in note
    assert note in capsys.readouterr().err


@pytest.mark.parametrize("folder", [".", "a"])
def test_new_files_are_found_by_index_and_not_by_load_or_index(tmp_path: Path, one_video: Path, folder: str) -> None:
    root = tmp_path / "videos"
    (root / folder).mkdir(parents=True)
    names = ["abcdefghijk_000001_000011", "bcdefghijkl_000002_000012"]
    table = tmp_path / "val.csv"
    rows = "".join(f"a,{name[:11]},{int(name[12:18])},{int(name[19:])},val\n" for name in names)
    table.write_text(f"label,youtube_id,time_start,time_end,split\n{rows}")
    config = config_of(tmp_path / "run", 1, val=table, root=str(root))
    shutil.copy(one_video, root / folder / f"{names[0]}.mp4")
    first = load_or_index(config)
    assert first["cause"].tolist() == ["", "no such file when it was indexed; run `videoadapt index` again"]
    shutil.copy(one_video, root / folder / f"{names[1]}.mp4")
    assert load_or_index(config).hash == first.hash
    assert len(index(config).readable) == 2
    assert len(load_or_index(config).readable) == 2


def test_a_manifest_of_another_version_of_probe_is_made_again(
    tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "run", train=write_list(videos / "l.txt", [("v0.mp4", 0)]))
    first = load_or_index(config).fingerprint
    monkeypatch.setattr("videoadapt.data.index.manifest.PROBE_VERSION", PROBE_VERSION + 1)
    assert load_or_index(config).fingerprint != first


def test_the_previous_manifest_is_kept_while_the_videos_are_not_mounted(tmp_path: Path, videos: Path) -> None:
    train = write_list(tmp_path / "train.txt", [("v0.mp4", 0), ("v1.mp4", 0)])
    config = config_of(tmp_path / "run", train=train, root=str(videos))
    path, previous = tmp_path / "run" / "manifest.parquet", tmp_path / "run" / "manifest.before.parquet"
    good = index(config).hash
    videos.rename(tmp_path / "elsewhere")
    assert load_or_index(config).hash == good
    write_list(train, [("v0.mp4", 0), ("v1.mp4", 1)])
    with pytest.raises(UserError, match="none of the 2 videos"):
        load_or_index(config)
    assert Manifest.load(path).hash == good
    for _ in range(2):  # `index` always makes a manifest; the second call has no readable video to lose
        assert len(index(config).readable) == 0
        assert Manifest.load(previous).hash == good
    (tmp_path / "elsewhere").rename(videos)
    assert len(index(config).readable) == 2
    assert Manifest.load(previous).hash == good


class Command:
    """Runs the command line in this process: a new process takes seconds to import torch."""

    def __init__(self, patch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[str]) -> None:
        self._patch, self._captured = patch, captured

    def __call__(self, *words: object) -> tuple[int, str, str]:
        """Returns exit code, stdout and stderr of `videoadapt WORDS`."""
        self._patch.setattr(sys, "argv", ["videoadapt", *map(str, words)])
        self._captured.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, *self._captured.readouterr()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_the_index_command_prints_one_screen_and_fails_without_a_readable_video(
    tmp_path: Path, videos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [*((f"v{i}.mp4", 0) for i in range(9)), *((f"gone{i}.mp4", 1) for i in range(500)), ("broken.mp4", 2)]
    config = config_of(tmp_path / "run", train=write_list(videos / "l.txt", rows))
    (tmp_path / "c.yaml").write_text(dump_config(config))
    done = runs.command("index", tmp_path / "c.yaml")
    assert done.returncode == 0, done.stderr
    assert len((done.stdout + done.stderr).splitlines()) < 40
    assert "missing files: 500" in done.stderr
    assert capfd.readouterr() == ("", "")  # of the processes that read the videos
    done = runs.command("index", tmp_path / "c.yaml", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == stored(config)
    write_list(videos / "l.txt", [("gone.mp4", 0)])
    done = runs.command("index", tmp_path / "c.yaml")
    assert done.returncode == 2
    assert "listed" in done.stdout
    assert "error: data.train: none of the 1 videos" in done.stderr


def test_the_check_option_needs_no_config_and_fails_on_a_difference(
    tmp_path: Path, videos: Path, command: Command
) -> None:
    index(config_of(tmp_path / "run", train=write_list(videos / "l.txt", [("v0.mp4", 0), ("v1.mp4", 0)])))
    code, _, err = command("index", "--check", tmp_path / "run")
    assert code == 0, err
    (videos / "v1.mp4").unlink()
    code, out, err = command("index", "--check", tmp_path / "run" / "manifest.parquet", "--json")
    assert code == 1
    assert json.loads(out)["changes"] == {"gone": 1}
    assert "1 gone" in err
    code, _, err = command("index", "--check", tmp_path / "nothing")
    assert code == 2
    assert "nothing: no such file or folder; expected a manifest, or the folder of a run" in err
    code, _, err = command("index")
    assert code == 2
    assert "missing argument CONFIG" in err


def test_ctrl_c_stops_at_once_and_the_results_are_reused(tmp_path: Path, videos: Path) -> None:
    write_video(videos / "long.mp4", 300)
    for number in range(200):
        os.link(videos / "long.mp4", videos / f"l{number}.mp4")
    config = config_of(tmp_path / "run", train=write_list(videos / "l.txt", [(f"l{i}.mp4", 0) for i in range(200)]))
    (tmp_path / "c.yaml").write_text(dump_config(verified(config)))
    line = [sys.executable, "-m", "videoadapt", "index", str(tmp_path / "c.yaml")]
    cache = tmp_path / "run" / "probed.jsonl"
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while process.poll() is None and (not cache.exists() or cache.stat().st_size < 2000):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all processes
        start = time.monotonic()
        errors = process.communicate()[1]
        assert time.monotonic() - start < 10
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    found = cache.read_text().count("stamp")
    assert 0 < found < 200
    assert len(index(config).readable) == 200
    assert cache.read_text().count("stamp") <= 201  # one line may be incomplete


def test_save_and_load_return_the_same_manifest(tmp_path: Path, videos: Path) -> None:
    train = write_list(videos / "l.txt", [("v0.mp4", 0), ("gone.mp4", 1), ("broken.mp4", 2)])
    config = config_of(tmp_path / "run", train=train)
    manifest = index(config)
    loaded = Manifest.load(tmp_path / "run" / "manifest.parquet")
    pd.testing.assert_frame_equal(loaded.table, manifest.table)
    assert (loaded.classes, loaded.hash, loaded.fingerprint) == (manifest.classes, manifest.hash, manifest.fingerprint)


def test_load_or_index_indexes_again_only_if_the_annotations_changed(tmp_path: Path, videos: Path) -> None:
    train = write_list(videos / "l.txt", [("v0.mp4", 0), ("v1.mp4", 1)])
    config = config_of(tmp_path / "run", train=train)
    first = load_or_index(config)
    path = tmp_path / "run" / "manifest.parquet"
    written_at = path.stat().st_mtime_ns
    assert load_or_index(config).hash == first.hash
    assert path.stat().st_mtime_ns == written_at
    write_list(train, [("v0.mp4", 0), ("v1.mp4", 2)])
    assert load_or_index(config)["label"].tolist() == [0, 2]


def test_an_incomplete_or_foreign_manifest_is_refused(tmp_path: Path, videos: Path) -> None:
    config = config_of(tmp_path / "run", train=write_list(videos / "l.txt", [("v0.mp4", 0)]))
    index(config)
    path = tmp_path / "run" / "manifest.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"manifest\.parquet: damaged \(.*; make it again with `videoadapt index`"):
        load_or_index(config)
    pd.DataFrame({"a": [1]}).to_parquet(path)
    with pytest.raises(UserError, match="not a manifest of videoadapt"):
        Manifest.load(path)
    with pytest.raises(UserError, match=r"none\.parquet: does not exist"):
        Manifest.load(tmp_path / "none.parquet")


def test_a_change_of_any_column_of_a_manifest_is_found(
    tmp_path: Path, videos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "run", train=write_list(videos / "l.txt", [("v0.mp4", 0)]))
    manifest, path = index(config), tmp_path / "run" / "manifest.parquet"
    content = path.read_bytes()
    column = content.index(manifest["content"][0].encode())
    path.write_bytes(content[:column] + bytes([content[column] ^ 1]) + content[column + 1 :])
    with pytest.raises(UserError, match=r"manifest\.parquet: damaged .*; make it again with `videoadapt index`"):
        Manifest.load(path)
    written = parquet.read_table(BytesIO(content))
    changed = written.set_column(written.column_names.index("frames"), "frames", pa.array([3] * len(written)))
    parquet.write_table(changed, path)  # by another program, which keeps the metadata
    with pytest.raises(UserError, match=r"damaged \(its checksum differs\)"):
        Manifest.load(path)
    metadata = {b"videoadapt": written.schema.metadata[b"videoadapt"]}
    parquet.write_table(written.replace_schema_metadata(metadata), path)  # as an older version did
    capfd.readouterr()
    assert Manifest.load(path)["content"].tolist() == manifest["content"].tolist()
    assert "manifest.parquet: was written without a checksum, by an older version" in capfd.readouterr().err


def test_the_hash_depends_on_the_population_and_not_on_its_order(tmp_path: Path, videos: Path) -> None:
    train = write_list(videos / "l.txt", [(f"v{i}.mp4", 0) for i in range(5)])
    manifest = index(config_of(tmp_path / "run", train=train))
    shuffled = Manifest(manifest.table.sample(frac=1, random_state=0), manifest.classes)
    assert shuffled.hash == manifest.hash
    assert len(manifest.hash) == 12
    for column, value in {"label": 1, "split": "val", "status": "broken", "video": "other.mp4"}.items():
        changed = manifest.table.copy()
        changed.loc[2, column] = value
        assert Manifest(changed, manifest.classes).hash != manifest.hash


def test_unprobed_videos_are_probed_again_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.mp4", "b.mp4"]
    for name in names:
        write_video(tmp_path / name, 6)
    annotations = write_list(tmp_path / "train.txt", [(name, 0) for name in names])
    config = make_config({"run": {"dir": str(tmp_path / "run")}, "data": {"train": {"annotations": str(annotations)}}})
    found = {str(tmp_path / name): probe(tmp_path / name) for name in names}
    cause = "the process that read it was killed (SIGKILL; the memory may be full)"
    killed = found | {str(tmp_path / "b.mp4"): NotProbed(cause)}
    results = iter([killed, killed, found])
    monkeypatch.setattr("videoadapt.data.index.manifest.probe_files", lambda *_, **__: next(results))
    assert index(config)["status"].tolist() == ["ok", "unprobed"]
    assert json.loads((tmp_path / "run" / "index.json").read_text())["unprobed"][0]["cause"] == cause
    with pytest.raises(RunError, match=r"1 of 2 videos were not probed.*b.mp4: the process.*lower data.workers"):
        load_or_index(config)
    assert load_or_index(config)["status"].tolist() == ["ok", "ok"]
    assert load_or_index(config).hash == Manifest.load(tmp_path / "run" / "manifest.parquet").hash  # not probed again
