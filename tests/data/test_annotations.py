"""Annotations: all formats, files found by name, ids, classes in label order, and error messages."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from listings import CLIP, COLUMNS, SOURCE, config_of, labels_of, listing_of, relative_paths, touch, write, write_csv
from video_files import write_list
from videoadapt.data.index.annotations import fingerprint, list_videos
from videoadapt.data.index.class_names import class_set
from videoadapt.data.index.identity import ListedVideo
from videoadapt.errors import ConfigError, UserError

# Lists


@pytest.mark.parametrize("separator", [" ", ",", "\t", ";", ", ", "  "])
def test_lists_accept_any_separator_and_spaces_in_paths(tmp_path: Path, separator: str) -> None:
    path = write_list(tmp_path / "l.txt", [("a.mp4", 0), ("my clips/b, ü\u2028.mp4", 2), ("/d.mp4", 1)], separator)
    write(path, "\ufeff# path label\n\n" + path.read_text(encoding="utf-8") + "\n")
    listed = listing_of(train=path).videos
    assert [(v.video, v.label) for v in listed] == [("a.mp4", 0), ("my clips/b, ü\u2028.mp4", 2), ("/d.mp4", 1)]
    assert [v.path for v in listed] == [str(tmp_path / "a.mp4"), str(tmp_path / "my clips/b, ü\u2028.mp4"), "/d.mp4"]
    assert [v.location for v in listed] == [f"{path}:{line}" for line in (3, 4, 5)]


def test_lists_accept_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_bytes(b"a.mp4 0\r\nb.mp4 1\r\n")
    assert labels_of(listing_of(train=path)) == {"a.mp4": 0, "b.mp4": 1}


def test_lists_accept_class_names_with_spaces_as_labels(tmp_path: Path) -> None:
    classes = write(tmp_path / "classes.txt", "wrestling\narm wrestling\nhigh jump 2\n")
    rows: list[tuple[str, int | str]] = [
        ("my clip.mp4", "arm wrestling"),
        ("b.mp4", "wrestling"),
        ("c.mp4", "high jump 2"),
        ("d.mp4", "arm_wrestling"),
        ("e.mp4", 2),
    ]
    listing = listing_of(train=write_list(tmp_path / "l.txt", rows), classes=classes)
    assert labels_of(listing) == {"my clip.mp4": 1, "b.mp4": 0, "c.mp4": 2, "d.mp4": 1, "e.mp4": 2}
    assert listing.classes == ("wrestling", "arm wrestling", "high jump 2")


def test_classes_of_a_list_with_numbers_are_the_numbers(tmp_path: Path) -> None:
    assert listing_of(train=write_list(tmp_path / "l.txt", [("a.mp4", 2)])).classes == ("0", "1", "2")


def test_relative_paths_start_at_data_root(tmp_path: Path) -> None:
    path = write_list(tmp_path / "lists" / "l.txt", [("a.mp4", 0)])
    (video,) = listing_of(train=path, root=tmp_path / "videos").videos
    assert video.path == str(tmp_path / "videos" / "a.mp4")


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_a_list_may_state_the_number_of_frame_images_of_a_folder(tmp_path: Path, separator: str) -> None:
    touch(tmp_path, f"frames/{CLIP}/img_1.jpg", "my frames.mp4/img_1.jpg", "clip 7/img_1.jpg")
    lines = [
        (f"frames/{CLIP}", 300, 0),
        ("my frames.mp4", 300, 1),
        ("gone", 300, 2),
        ("clip 7", 2),
        (f"frames/{SOURCE}", 1),
    ]
    path = write(tmp_path / "l.txt", "".join(separator.join(map(str, line)) + "\n" for line in lines))
    listing = listing_of(train=path)
    assert relative_paths(listing, tmp_path) == [
        f"frames/{CLIP}",
        "my frames.mp4",
        "gone",
        "clip 7",
        f"frames/{SOURCE}",
    ]
    assert [video.label for video in listing.videos] == [0, 1, 2, 2, 1]
    assert [video.frames for video in listing.videos] == [300, 300, 300, None, None]
    assert listing.videos[0].video == CLIP


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.mp4 3", r"l\.txt:2: label 3 of b\.mp4: expected 0 to 2"),
        ("b.mp4 -1", r"l\.txt:2: label -1"),
        ("b.mp4 cats", r"l\.txt:2: label 'cats': expected a number, or class names in data\.classes"),
        ("b.mp4", r"l\.txt:2: expected `path label`"),
        ("b.mp4 300 1", r"l\.txt:2: expected `path label`; three fields are for folders"),
    ],
)
def test_an_invalid_line_of_a_list_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listing_of(train=write(tmp_path / "l.txt", f"a.mp4 0\n{line}\n"))


# Folders


def test_class_folders_are_labelled_in_the_order_of_their_names(tmp_path: Path) -> None:
    train = touch(
        tmp_path / "train", *(f"{name}/deep/{f}" for name in ("dogs", "cats", "apes") for f in ("a.MP4", "x"))
    )
    val = touch(tmp_path / "val", "cats/b.mp4", "cats/.b.mp4", "cats/c.MTS", "cats/deep/d.gif", "readme.txt")
    listing = listing_of(train=train, val=val)
    assert listing.classes == ("apes", "cats", "dogs")
    assert labels_of(listing) == {
        "apes/deep/a.MP4": 0, "cats/deep/a.MP4": 1, "dogs/deep/a.MP4": 2,
        "cats/b.mp4": 1, "cats/c.MTS": 1, "cats/deep/d.gif": 1,
    }  # fmt: skip
    assert relative_paths(listing, tmp_path)[-1] == "val/cats/deep/d.gif"
    (val / "fish").mkdir()
    with pytest.raises(ConfigError, match=r"data\.val\.annotations: .* has classes that are not in .*: \['fish'\]"):
        listing_of(train=train, val=val)


def test_an_image_in_a_class_folder_is_a_video_and_a_deeper_folder_of_images_is_one_video(tmp_path: Path) -> None:
    frames = [f"img_{number:05}.jpg" for number in range(40)]
    train = touch(
        tmp_path / "train",
        *(f"cats/{video}/{name}" for video in ("vid1", "more/vid2") for name in frames),
        "dogs/n02_1.jpg", "dogs/n02_2.jpg",
    )  # fmt: skip
    assert labels_of(listing_of(2, train=train)) == {
        "cats/more/vid2": 0, "cats/vid1": 0, "dogs/n02_1.jpg": 1, "dogs/n02_2.jpg": 1,
    }  # fmt: skip


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    train = touch(tmp_path / "train", "a.jpg", "b.jpg")
    with pytest.raises(ConfigError, match=r"train lists no video; expected a folder per class"):
        listing_of(train=train)


def test_folders_of_some_classes_need_data_classes(tmp_path: Path) -> None:
    val = touch(tmp_path / "val", "high_jump/a.mp4", "abseiling/a.mp4")
    with pytest.raises(ConfigError, match=r"model\.num_classes: is 3, but .* has 2 classes.*data\.classes"):
        listing_of(val=val)
    classes = write(tmp_path / "classes.txt", "abseiling\narchery\nhigh jump\n")
    assert labels_of(listing_of(val=val, classes=classes)) == {"abseiling/a.mp4": 0, "high_jump/a.mp4": 2}


def test_symbolic_links_are_followed_once(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "disk2", "b.mp4")
    train = touch(tmp_path / "train", "cats/a.mp4")
    (train / "cats" / "linked").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(train / "cats")
    assert set(labels_of(listing_of(1, train=train))) == {"cats/a.mp4", "cats/linked/b.mp4"}


# Kinetics tables


def test_a_kinetics_csv_gives_files_labels_and_classes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "val.csv",
        "is_cc,Split,time_end,label,youtube_id,time_start\r\n"
        f'0,val,427,"punching person, boxing",{SOURCE},417\r\n'
        "\r\n"
        "1,val,10,abseiling,-aaaaaaaaaa,0.0\r\n",
    )
    root = touch(tmp_path / "k400", f"deep/er/{CLIP}.WEBM", f"{CLIP}.txt", "._.mp4")
    listing = listing_of(2, val=path, root=root)
    missing = "-aaaaaaaaaa_000000_000010"
    assert listing.classes == ("abseiling", "punching person, boxing")
    assert listing.videos == [
        ListedVideo(str(root / f"deep/er/{CLIP}.WEBM"), CLIP, SOURCE, 1, "val", f"{path}:2"),
        ListedVideo(str(root / f"{missing}.mp4"), missing, "-aaaaaaaaaa", 0, "val", f"{path}:4"),
    ]


def test_the_kinetics_400_csv_has_the_classes_of_the_built_in_list(shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "annotations" / "kinetics-400_val.csv"
    listing = listing_of(400, val=path, root=tmp_path)
    assert len(listing.videos) == 19906
    assert len({video.source for video in listing.videos}) == 19906
    assert listing.classes == class_set("kinetics400")


def test_without_data_root_files_are_searched_below_the_folder_of_the_csv(tmp_path: Path) -> None:
    path = write_csv(touch(tmp_path, f"val/abseiling/{CLIP}.mkv") / "val.csv", [("abseiling", SOURCE, 417, 427, "val")])
    assert relative_paths(listing_of(1, val=path), tmp_path) == [f"val/abseiling/{CLIP}.mkv"]


@given(st.randoms(use_true_random=False))
@settings(max_examples=40)  # each writes a tree of files
def test_of_several_files_the_split_folder_is_preferred_then_the_class_folder(
    tmp_path_factory: pytest.TempPathFactory, order: random.Random
) -> None:
    split = ["videos_val/abseiling/x", "videos_val/archery", "Validation"]
    others = ["x/abseiling", "all", "train/archery", "valve"]
    existing = order.sample([*split, *others], k=order.randint(2, 7))
    root = touch(tmp_path_factory.mktemp("root"), *(f"{folder}/{CLIP}.mp4" for folder in existing))
    path = write_csv(root / "list.csv", [("abseiling", SOURCE, 417, 427, "val")])
    listing = listing_of(1, val=path, root=root)
    expected = next(
        folder
        for folder in [split[0], *sorted(split[1:]), others[0], *sorted(others[1:])]
        if folder in existing
    )  # fmt: skip
    assert relative_paths(listing, root) == [f"{expected}/{CLIP}.mp4"]
    ignored = [f"{root / folder / CLIP}.mp4: ignored, {root / expected / CLIP}.mp4 is used" for folder in existing]
    assert sorted(listing.ignored_files) == sorted(
        line for line, folder in zip(ignored, existing, strict=True) if folder != expected
    )


def test_a_class_folder_may_have_underscores_for_spaces(tmp_path: Path) -> None:
    root = touch(tmp_path, f"all/{CLIP}.mp4", f"high_jump/{CLIP}.mp4")
    path = write_csv(tmp_path / "train.csv", [("high jump", SOURCE, 417, 427, "train")])
    assert relative_paths(listing_of(1, train=path), root) == [f"high_jump/{CLIP}.mp4"]


def test_only_rows_of_the_split_are_used_of_a_csv_with_several_splits(tmp_path: Path) -> None:
    rows = [
        ("a", "aaaaaaaaaaa", 0, 10, "train"),
        ("b", "bbbbbbbbbbb", 0, 10, "validate"),
        ("a", "ccccccccccc", 0, 10, "validation"),
        ("", "ddddddddddd", 0, 10, "test"),
    ]
    both = write_csv(tmp_path / "all.csv", rows)
    classes = write(tmp_path / "classes.txt", "a\nb\n")
    listing = listing_of(2, train=both, val=both, classes=classes)
    assert [(video.source[:1], video.split) for video in listing.videos] == [("a", "train"), ("b", "val"), ("c", "val")]
    assert listing.notes == []
    neither = write_csv(tmp_path / "x.csv", [("a", "aaaaaaaaaaa", 0, 10, "test"), ("b", "bbbbbbbbbbb", 0, 10, "val")])
    with pytest.raises(
        ConfigError, match=r"data\.train\.annotations: .*expected rows of split train, got only test, val"
    ):
        listing_of(2, train=neither)


@pytest.mark.parametrize(("split", "given"), [("val", "train"), ("train", "val"), ("train", "Validate")])
def test_a_table_of_the_other_split_is_refused(tmp_path: Path, split: str, given: str) -> None:
    path = write_csv(tmp_path / "k400.csv", [("a", f"{n:011d}", 0, 10, given) for n in range(3)])
    with pytest.raises(
        ConfigError,
        match=rf"data\.{split}\.annotations: {path}: column split: expected rows of split {split}.*, got only {given}$",
    ):
        listing_of(1, **{split: path})


def test_a_table_of_a_test_split_is_used_with_a_note(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "test.csv", [("a", "ddddddddddd", 0, 10, "test")])
    listing = listing_of(1, val=path)
    assert [video.split for video in listing.videos] == ["val"]
    assert listing.notes == [f"data.val.annotations: all rows of {path} are of split 'test'; they are used as val"]


@pytest.mark.parametrize("gone", COLUMNS)
def test_a_csv_without_a_column_is_refused_with_the_column(tmp_path: Path, gone: str) -> None:
    columns = [column for column in COLUMNS if column != gone]
    with pytest.raises(ConfigError, match=rf"val\.csv:1: no column {gone}; expected label, youtube_id"):
        listing_of(val=write_csv(tmp_path / "val.csv", [("x",) * 4], columns))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("", SOURCE, 1, 2, "val"), "label: expected a name, got ''"),
        (("a", "", 1, 2, "val"), "youtube_id: expected a name"),
        (("a", SOURCE, "soon", 2, "val"), "time_start: expected a whole number of seconds, got 'soon'"),
        (("a", SOURCE, 1, -2, "val"), "time_end: expected a whole number of seconds, got '-2'"),
        (("a", SOURCE, 1.5, 2, "val"), "time_start: expected a whole number"),
        (("a", SOURCE, 1), "expected 5 fields, got 3"),
    ],
)
def test_an_invalid_row_of_a_csv_is_refused_with_file_and_line(
    tmp_path: Path, row: Sequence[Any], message: str
) -> None:
    path = write_csv(tmp_path / "val.csv", [("a", "aaaaaaaaaaa", 0, 10, "val"), row])
    with pytest.raises(ConfigError, match=rf"val\.csv:3: {message}"):
        listing_of(1, val=path)


def test_the_kinetics_json_and_csv_give_the_same_videos(tmp_path: Path) -> None:
    video = {"annotations": {"label": "abseiling", "segment": [417.0, 427.0]}, "duration": 10.0, "subset": "validate"}
    train = {**video, "subset": "train"}
    table = write(tmp_path / "all.json", json.dumps({SOURCE: video, "aaaaaaaaaaa": train}))
    by_json = listing_of(1, val=table).videos
    by_csv = listing_of(1, val=write_csv(tmp_path / "val.csv", [("abseiling", SOURCE, 417, 427, "val")])).videos
    assert [v._replace(location="") for v in by_json] == [v._replace(location="") for v in by_csv]
    with pytest.raises(ConfigError, match=rf"bad\.json: {SOURCE}: expected .*segment"):
        listing_of(1, val=write(tmp_path / "bad.json", json.dumps({SOURCE: {"annotations": {}}})))


def test_the_id_of_a_kinetics_video_does_not_depend_on_the_format(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "val.csv", [("abseiling", SOURCE, 417, 427, "val")])
    paths = write_list(tmp_path / "l.txt", [(f"val_256/abseiling/{CLIP}.mkv", 0)])
    folder = touch(tmp_path / "val", f"abseiling/{CLIP}.mp4")
    for source in (table, paths, folder):
        (video,) = listing_of(1, val=source).videos
        assert (video.video, video.source, video.label) == (CLIP, SOURCE, 0)
    (other,) = listing_of(1, val=write_list(tmp_path / "m.txt", [("a/short_000417_000427.mp4", 0)])).videos
    assert (other.video, other.source) == ("a/short_000417_000427.mp4", "")


# Something-Something


def test_classes_of_something_something_are_its_templates(tmp_path: Path) -> None:
    rows = [
        {"id": "78687", "label": "holding potato", "template": "Holding [something]"},
        {"id": 42, "label": "dropping a pen", "template": "Dropping [something] onto [something]"},
    ]
    train = write(tmp_path / "train.json", json.dumps(rows))
    root = touch(tmp_path / "v", "20bn/78687.mp4")
    names = {"Holding something": "1", "Dropping something onto something": "0", "Other": "2"}
    classes = write(tmp_path / "labels.json", json.dumps(names))
    listing = listing_of(3, train=train, root=root, classes=classes)
    assert listing.classes == ("Dropping something onto something", "Holding something", "Other")
    assert [(video.label, video.source) for video in listing.videos] == [(1, ""), (0, "")]
    assert relative_paths(listing, root) == ["20bn/78687.mp4", "42.webm"]
    assert listing_of(2, train=train).classes == ("Dropping something onto something", "Holding something")


def test_a_json_entry_without_template_needs_a_label_that_is_a_class(tmp_path: Path) -> None:
    classes = write(tmp_path / "classes.txt", "Holding something\n")
    good = write(tmp_path / "good.json", json.dumps([{"id": "1", "label": "Holding something"}]))
    assert [video.label for video in listing_of(1, val=good, classes=classes).videos] == [0]
    caption = write(tmp_path / "caption.json", json.dumps([{"id": "1", "label": "holding a potato"}]))
    with pytest.raises(ConfigError, match=r"caption\.json: entry 1, which has no template: label 'holding a potato'"):
        listing_of(1, val=caption, classes=classes)
    test = write(tmp_path / "test.json", json.dumps([{"id": "1"}]))
    with pytest.raises(ConfigError, match=r"test\.json: entry 1: 1 has neither template nor label"):
        listing_of(1, val=test, classes=classes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1},\n oh]', r"x\.json:2: not valid JSON"),
        ('["a.mp4"]', r"x\.json: entry 1: expected an object"),
        ('"a.mp4"', r"x\.json: expected a JSON list or object"),
        ("[]", r"data\.val\.annotations: .*x\.json lists no video"),
    ],
)
def test_json_of_another_structure_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listing_of(val=write(tmp_path / "x.json", text))


# Repeated videos


def test_a_video_listed_again_with_its_label_is_used_once_and_reported(tmp_path: Path) -> None:
    rows: list[tuple[str, int | str]] = [
        ("a.mp4", 0), ("b.mp4", 1), ("./a.mp4", 0), (f"x/{CLIP}.mp4", 2), (f"y/{CLIP}.mkv", 2)
    ]  # fmt: skip
    path = write_list(tmp_path / "l.txt", rows)
    for name in (f"x/{CLIP}.mp4", f"y/{CLIP}.mkv"):
        write(tmp_path / name, "the same bytes")
    listing = listing_of(train=path)
    assert [video.video for video in listing.videos] == ["a.mp4", "b.mp4", CLIP]
    assert listing.repeated == [f"./a.mp4: {path}:1 and again {path}:3", f"{CLIP}: {path}:4 and again {path}:5"]


def test_a_video_with_two_labels_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write_list(tmp_path / "l.txt", [("a.mp4", 0), ("b.mp4", 0), ("a.mp4", 1)])
    with pytest.raises(UserError, match=r"a\.mp4 has two labels, 0 \(.*l\.txt:1\) and 1 \(.*l\.txt:3\)"):
        listing_of(train=path)


def test_a_video_in_both_splits_is_kept_in_both(tmp_path: Path) -> None:
    train = write_list(tmp_path / "train.txt", [("a.mp4", 0), ("b.mp4", 0)])
    listing = listing_of(train=train, val=write_list(tmp_path / "val.txt", [("a.mp4", 1)]))
    assert [(v.video, v.split) for v in listing.videos] == [("a.mp4", "train"), ("b.mp4", "train"), ("a.mp4", "val")]
    assert listing.repeated == []


# Classes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.txt", "dogs\n\n arm wrestling \ncats\n"),
        ("c.csv", "id,name\n2,cats\n0,dogs\n1,arm wrestling\n"),
        ("c.csv", "name,id\narm wrestling,1\n\ndogs,0\ncats,2\n"),
        ("c.json", '{"\\"arm wrestling\\"": 1, "cats": 2, "dogs": 0}'),
        ("c.json", '{"arm wrestling": "1", "cats": "2", "dogs": "0"}'),
    ],
)
def test_data_classes_accepts_text_csv_and_json(tmp_path: Path, name: str, text: str) -> None:
    path = write_list(tmp_path / "l.txt", [("a.mp4", "arm_wrestling")])
    listing = listing_of(train=path, classes=write(tmp_path / name, text))
    assert listing.classes == ("dogs", "arm wrestling", "cats")
    assert listing.videos[0].label == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "a\nb\na\n", "a class is named twice"),
        ("c.txt", "high jump\nhigh_jump\nb\n", "a class is named twice"),
        ("c.csv", "id,name\n0,a\n1,b\n3,c\n", "expected each number from 0 to 2 once"),
        ("c.csv", "id,name\n0,a\nx,b\n", "expected a whole number for each class"),
        ("c.json", "3", "expected a JSON object from class names to numbers, or a list of names"),
        ("c.json", "[]", "names no class"),
        ("c.json", '{"a": 1.5}', "expected a whole number"),
    ],
)
def test_invalid_classes_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write_list(tmp_path / "l.txt", [("a.mp4", 0)])
    with pytest.raises(ConfigError, match=rf"c\.\w+: {message}"):
        listing_of(train=path, classes=write(tmp_path / name, text))


def test_an_unknown_label_is_refused_with_the_most_similar_class(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "val.csv", [("abseling", SOURCE, 417, 427, "val")])
    with pytest.raises(ConfigError, match=r"val\.csv:2: label 'abseling': .* kinetics400; did you mean 'abseiling'"):
        listing_of(400, val=path, classes="kinetics400")


def test_kinetics400_selects_the_built_in_list_unless_a_file_has_this_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_list(tmp_path / "l.txt", [("a.mp4", "zumba")])
    listing = listing_of(400, train=path, classes="kinetics400")
    assert (len(listing.classes), listing.videos[0].label) == (400, 399)
    write(tmp_path / "kinetics400", "zumba\n")
    assert listing_of(1, train=path, classes="kinetics400").classes == ("zumba",)


def test_the_classes_of_kinetics_400_in_another_order_are_refused(tmp_path: Path) -> None:
    path = write_list(tmp_path / "l.txt", [("a.mp4", 0)])
    names = list(class_set("kinetics400"))
    assert names == sorted(names)
    names[7], names[9] = names[9], names[7]
    classes = write(tmp_path / "classes.txt", "\n".join(names))
    with pytest.raises(ConfigError, match=rf"classes\.txt: class 7 is '{names[7]}', but '{names[9]}' in the order"):
        listing_of(400, train=path, classes=classes)


def test_class_folders_with_underscores_have_the_order_of_kinetics_400(tmp_path: Path) -> None:
    folders = touch(tmp_path / "train", *(f"{name.replace(' ', '_')}/a.mp4" for name in class_set("kinetics400")))
    listing = listing_of(400, train=folders)
    assert [name.replace("_", " ") for name in listing.classes] == list(class_set("kinetics400"))


def test_a_list_that_numbers_kinetics_400_in_another_order_is_refused(tmp_path: Path) -> None:
    rows: list[tuple[str, int | str]] = [("v/abseiling/a.mp4", 0), ("v/air_drumming/b.mp4", 1), ("v/zumba/c.mp4", 399)]
    good = write_list(tmp_path / "good.txt", rows)
    assert len(listing_of(400, train=good).videos) == 3
    bad = write_list(tmp_path / "bad.txt", [*rows, ("v/yoga/d.mp4", 399)])
    with pytest.raises(ConfigError, match=r"bad\.txt:4: label 399, but yoga is class 398 in the order of Kinetics-400"):
        listing_of(400, train=bad)
    own = write_list(tmp_path / "own.txt", [*rows, ("v/yoga/d.mp4", 399), ("v/my class/d.mp4", 5)])
    assert len(listing_of(400, train=own).videos) == 5


def test_a_class_of_val_that_train_does_not_have_is_refused(tmp_path: Path) -> None:
    train = write_csv(
        tmp_path / "train.csv", [("a b", "aaaaaaaaaaa", 0, 1, "train"), ("c", "bbbbbbbbbbb", 0, 1, "train")]
    )
    val = touch(tmp_path / "val", "a_b/x.mp4")
    assert listing_of(2, train=train, val=val).classes == ("a b", "c")
    touch(val, "d/x.mp4")
    with pytest.raises(ConfigError, match=r"val has classes that are not in .*train\.csv: \['d'\]"):
        listing_of(2, train=train, val=val)


# Unusable sources


def test_a_source_that_cannot_be_read_is_refused_with_its_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train\.annotations, data\.val\.annotations: neither is given"):
        listing_of()
    with pytest.raises(ConfigError, match=r"data\.val\.annotations: .*nowhere\.txt does not exist"):
        listing_of(val=tmp_path / "nowhere.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"data\.val\.annotations: .*binary\.txt is not a text file in UTF-8"):
        listing_of(val=tmp_path / "binary.txt")
    path = write_list(tmp_path / "l.txt", [("a.mp4", 0)])
    with pytest.raises(ConfigError, match=r"data\.classes: cannot read .*: Is a directory"):
        listing_of(val=path, classes=tmp_path)


@pytest.mark.parametrize("name", ["train", "train/cats", "train/cats/deep"])
def test_an_unreadable_folder_is_refused_rather_than_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    train = touch(tmp_path / "train", "dogs/a.mp4", "cats/deep/a.mp4")

    def refusing(function: Any) -> Any:
        def call(path: Any) -> Any:
            if Path(path) == tmp_path / name:
                raise PermissionError(13, "Permission denied", str(path))
            return function(path)

        return call

    for function in ("listdir", "scandir"):  # patched: root, who may run the tests, can read any folder
        monkeypatch.setattr(os, function, refusing(getattr(os, function)))
    monkeypatch.setattr(Path, "iterdir", refusing(Path.iterdir))  # in Python 3.10 it has its own reference to listdir
    with pytest.raises(ConfigError, match=rf"cannot read the folder {tmp_path / name}: Permission denied"):
        listing_of(2, train=train)


def test_an_unclosed_quote_in_a_csv_is_refused(tmp_path: Path) -> None:
    rows = [("a", f"{n:011d}", 0, 10, "train") for n in range(6000)]
    path = write_csv(tmp_path / "train.csv", [('"a', "bbbbbbbbbbb", 0, 10, "train"), *rows])
    with pytest.raises(ConfigError, match=r"train\.csv:\d+: not a row of a CSV"):
        listing_of(1, train=path)


def test_a_source_without_a_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (write(tmp_path / "l.txt", "# path label\n"), write_csv(tmp_path / "val.csv", []), tmp_path / "folder"):
        with pytest.raises(ConfigError, match=rf"data\.val\.annotations: {path} lists no video"):
            listing_of(val=path)


# Holdout


def test_holdout_depends_on_ids_and_seed_not_on_the_order_of_the_list(tmp_path: Path) -> None:
    names = [f"v{i}.mp4" for i in range(400)]

    def held_out(order: list[str], seed: int = 0, fraction: float = 0.25) -> set[str]:
        train = write_list(tmp_path / "train.txt", [(name, 0) for name in order])
        val = write_list(tmp_path / "val.txt", [("other.mp4", 0)])
        listed = list_videos(config_of(train=train, val=val, holdout=fraction, seed=seed)).videos
        assert [video.split for video in listed if video.video == "other.mp4"] == ["val"]
        return {video.video for video in listed if video.split == "holdout"}

    chosen = held_out(names)
    assert 0.17 < len(chosen) / len(names) < 0.33
    assert held_out(names[::-1]) == chosen
    assert held_out(names[:200]) == chosen & set(names[:200])
    assert held_out(names, seed=1) != chosen
    assert held_out(names, fraction=0.5) > chosen
    assert held_out(names, fraction=0.0) == set()


def test_the_calibration_split_shares_no_video_with_holdout_and_both_keep_theirs(tmp_path: Path) -> None:
    train = write_list(tmp_path / "train.txt", [(f"v{i}.mp4", 0) for i in range(400)])

    def splits(**fractions: float) -> dict[str, set[str]]:
        listed = list_videos(config_of(train=train, **fractions)).videos  # type: ignore[arg-type]
        return {name: {v.video for v in listed if v.split == name} for name in ("train", "holdout", "calibrate")}

    both = splits(holdout=0.25, calibrate=0.25)
    assert sum(map(len, both.values())) == 400  # every video is in one split
    assert 0.17 < len(both["calibrate"]) / 400 < 0.33
    assert splits(holdout=0.5, calibrate=0.25)["calibrate"] == both["calibrate"]
    assert splits(holdout=0.25)["holdout"] == splits(holdout=0.25, calibrate=0.5)["holdout"] == both["holdout"]
    with pytest.raises(ConfigError, match=r"data\.calibrate: 0\.5 and data\.holdout 0\.5 leave no video of train"):
        splits(holdout=0.5, calibrate=0.5)


def test_clips_of_one_youtube_video_are_held_out_together(tmp_path: Path) -> None:
    rows = [("a", f"{n:011d}", start, start + 10, "train") for n in range(50) for start in (0, 10, 20)]
    listed = listing_of(1, train=write_csv(tmp_path / "train.csv", rows), holdout=0.5).videos
    splits = [{video.split for video in listed if video.source == f"{n:011d}"} for n in range(50)]
    assert {"train"} in splits
    assert {"holdout"} in splits
    assert all(len(found) == 1 for found in splits)


def test_videos_of_one_source_by_pattern_are_held_out_together(tmp_path: Path) -> None:
    others = [("other.jpg", 0), ("0wR5jVB-WPk_000417_000427.jpg", 0)]
    train = write_list(tmp_path / "train.txt", [(f"a/a{number}.jpg", 0) for number in range(200)] + others)
    pattern = r"(.*)\d\.jpg"
    listed = listing_of(1, train=train, holdout=0.5, source_pattern=pattern).videos
    sources = {video.video: video.source for video in listed}
    assert [sources[name] for name in ("a/a3.jpg", "a/a17.jpg", "other.jpg")] == ["a/a", "a/a1", ""]
    assert sources["0wR5jVB-WPk_000417_000427"] == "0wR5jVB-WPk"  # which the pattern does not match
    splits = [{video.split for video in listed if video.source == f"a/a{block or ''}"} for block in range(20)]
    assert {"train"} in splits
    assert {"holdout"} in splits
    assert all(len(found) == 1 for found in splits)
    assert fingerprint(config_of(1, train=train, source_pattern=pattern)) != fingerprint(config_of(1, train=train))
    with pytest.raises(ConfigError, match=r"data\.source_pattern: .* matches none of \d+ videos, such as"):
        listing_of(1, train=train, source_pattern=r"no (.*) here")


@pytest.mark.parametrize(("pattern", "cause"), [("a(", "not a regular expression"), ("a", "expected one group")])
def test_a_source_pattern_needs_one_group(tmp_path: Path, pattern: str, cause: str) -> None:
    train = write_list(tmp_path / "train.txt", [("a.mp4", 0)])
    with pytest.raises(ConfigError, match=rf"data\.source_pattern: {cause}"):
        config_of(1, train=train, source_pattern=pattern)


# Fingerprints


def test_the_fingerprint_changes_with_the_annotations_and_not_with_the_video_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("a", "aaaaaaaaaaa", 0, 10, "train"), ("b", "bbbbbbbbbbb", 0, 10, "train")]
    table = write_csv(tmp_path / "train.csv", rows)
    frames = write_list(tmp_path / "val.txt", [("clip 7", 0)])
    classes = write(tmp_path / "classes.txt", "a\nb\n")
    sources: dict[str, Any] = {"train": table, "val": frames, "classes": classes, "root": tmp_path / "videos"}

    def of(num_classes: int = 2, seed: int = 0, **changed: Any) -> str:
        return fingerprint(config_of(num_classes, seed, **sources | changed))

    first = of()
    touch(tmp_path / "videos", "aaaaaaaaaaa_000000_000010.mp4", "b/bbbbbbbbbbb_000000_000010.mkv", "clip 7/1.jpg")
    monkeypatch.setattr(os, "walk", lambda *_: pytest.fail("the root was searched"))
    assert of() == of(seed=1) == first
    changed = [of(3), of(holdout=0.5), of(holdout=0.5, seed=1), of(root=tmp_path), of(classes=None), of(val=table)]
    write(classes, "b\na\n")
    changed.append(of())
    write_csv(table, rows[:1])
    changed.append(of())
    assert len({first, *changed}) == 1 + len(changed)


def test_the_fingerprint_of_a_folder_changes_with_its_classes_and_videos(tmp_path: Path) -> None:
    train = touch(tmp_path / "train", "cats/a.mp4", "dogs/b.mp4")
    found = [fingerprint(config_of(train=train))]
    for name in ("cats/c.mp4", "apes/readme.txt"):
        touch(train, name)
        found.append(fingerprint(config_of(train=train)))
    train.rename(tmp_path / "elsewhere")
    found.append(fingerprint(config_of(train=tmp_path / "elsewhere")))
    assert len(set(found)) == 4
    touch(tmp_path / "elsewhere", "cats/notes.txt")
    assert fingerprint(config_of(train=tmp_path / "elsewhere")) == found[-1]
