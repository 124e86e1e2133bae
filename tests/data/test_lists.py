"""Lists: comments, headers, quoted paths, surplus fields, and files that are not named as they are listed."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from listings import config_of, labels_of, listing_of, relative_paths, touch, write
from videoadapt.data.index.annotations import fingerprint
from videoadapt.errors import ConfigError, UserError

CAFE = "caf\u00e9"  # composed; its decomposed form has one character more
DECOMPOSED = unicodedata.normalize("NFD", CAFE)


# Comments and headers


def test_a_file_whose_name_begins_with_a_hash_is_an_entry_and_other_such_lines_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "#shorts cat.mp4", "#tag.mp4")
    path = write(tmp_path / "l.txt", "# path label\n#shorts cat.mp4 0\n#v1.mp4 1\n#tag 2\nv2.mp4 0\n./#gone.mp4 1\n")
    listing = listing_of(train=path)
    assert relative_paths(listing, tmp_path) == ["#shorts cat.mp4", "#tag.mp4", "v2.mp4", "#gone.mp4"]
    [(kind, lines)] = listing.passed_over.items()
    assert kind == "train: lines that begin with # (a file whose name begins with # is written ./#NAME)"
    assert lines == [f"{path}:1: # path label", f"{path}:3: #v1.mp4 1"]


@pytest.mark.parametrize("header", ["path,label", "Video,Class", "filename total_frames label", '"path","label"'])
def test_a_header_is_skipped_and_counted(tmp_path: Path, header: str) -> None:
    listing = listing_of(train=write(tmp_path / "l.csv", f"\ufeff{header}\r\nv0.mp4,0\r\nv1.mp4,1\r\n"))
    assert labels_of(listing) == {"v0.mp4": 0, "v1.mp4": 1}
    assert listing.passed_over == {"train: header lines": [f"{tmp_path / 'l.csv'}:1: {header}"]}


@pytest.mark.parametrize("header", ["label,path", ",path,label", "index path label frames"])
def test_a_header_of_other_columns_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(
        ConfigError, match=r"l\.csv:1: looks like a header of the columns .*expected the columns path, l"
    ):
        listing_of(train=write(tmp_path / "l.csv", f"{header}\nv0.mp4,0\n"))


def test_a_line_below_the_first_entry_is_not_a_header(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"l\.txt:2: label 'label': expected a number"):
        listing_of(train=write(tmp_path / "l.txt", "v0.mp4 0\npath label\n"))


# Surplus fields


@pytest.mark.parametrize(
    ("line", "path", "fields"),
    [
        ("v0.mp4 0,1", "v0.mp4", "0 1"),
        ("v0.mp4 0,1,1", "v0.mp4", "0,1 1"),
        ("v0.mp4 0.0 10.0 1", "v0.mp4", "0.0 10.0 1"),
        ('"v0.mp4",0,1', "v0.mp4", "0,1"),
        ("a/v 1.webm\t3\t0", "a/v 1.webm", "3 0"),
        ("f 2 5 1", "f", "2 5 1"),
        ("gone 2 5 1", "gone", "2 5 1"),
    ],
)
def test_surplus_fields_are_refused_and_never_part_of_the_path(
    tmp_path: Path, line: str, path: str, fields: str
) -> None:
    touch(tmp_path, "f/1.jpg")
    with pytest.raises(ConfigError) as error:
        listing_of(train=write(tmp_path / "l.txt", f"v9.mp4 0\n{line}\n"))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'l.txt'}:2: expected `path label`")
    assert f"got the fields '{fields}' after {path}. Several labels of one video (multi-label), start frames" in message
    assert len(message) < 1000


@pytest.mark.parametrize("label", ["0.0", "1.", "2.50"])
def test_a_decimal_label_is_refused_with_the_whole_number(tmp_path: Path, label: str) -> None:
    with pytest.raises(ConfigError, match=rf"l\.txt:1: label '{label}': expected a whole .*; write {label[0]} \("):
        listing_of(train=write(tmp_path / "l.txt", f"v0.mp4 {label}\n"))


@pytest.mark.parametrize("label", ["\u0661", "1_0", "1" * 5000, "0x1"])
def test_other_spellings_of_numbers_are_not_labels(tmp_path: Path, label: str) -> None:
    with pytest.raises(ConfigError, match=r"l\.txt:1: .*expected (a number|`path label`)"):
        listing_of(train=write(tmp_path / "l.txt", f"v0.mp4 {label}\n"))


def test_a_label_of_minus_one_is_refused_with_its_meaning(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"label -1 of v\.mp4: expected 0 to 2 .* -1 often stands for a video without"
    ):
        listing_of(train=write(tmp_path / "l.txt", "v.mp4 -1\n"))


def test_a_label_of_several_words_that_is_no_class_is_named_as_a_whole(tmp_path: Path) -> None:
    classes = write(tmp_path / "c.txt", "sit down\nstand up\nwave\n")
    with pytest.raises(ConfigError, match=r"l\.txt:1: label 'sitt down': .*did you mean 'sit_down'"):
        listing_of(train=write(tmp_path / "l.txt", "v0.mp4 sitt down\n"), classes=classes)


def test_a_line_of_a_million_fields_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"l\.txt:1: the line has 1999999 characters; expected `path label`"):
        listing_of(train=write(tmp_path / "l.txt", " ".join("1" * 1_000_000)))


# Paths


def test_a_path_in_quotes_may_hold_anything(tmp_path: Path) -> None:
    touch(tmp_path, "f 2 5/1.jpg")
    text = '"gone 7 5" 2\n"a, b.mp4",1\n"say ""hi"".mp4" 0\n"f 2 5" 1 2\n"plain.mp4"\t"1"\n'
    listing = listing_of(train=write(tmp_path / "l.txt", text))
    assert labels_of(listing) == {"gone 7 5": 2, "a, b.mp4": 1, 'say "hi".mp4': 0, "f 2 5": 2, "plain.mp4": 1}
    assert [video.frames for video in listing.videos] == [None, None, None, 1, None]


def test_existing_names_with_numbers_are_paths_and_not_counts_of_frames(tmp_path: Path) -> None:
    touch(tmp_path, "clip 7/1.jpg", "take 2 5/1.jpg", "video 3.mp4")
    text = "clip 7 300 2\ntake 2 5 1\nvideo 3 0\n"
    listing = listing_of(train=write(tmp_path / "l.txt", text))
    assert relative_paths(listing, tmp_path) == ["clip 7", "take 2 5", "video 3.mp4"]
    assert [(video.label, video.frames) for video in listing.videos] == [(2, 300), (1, None), (0, None)]


def test_a_name_without_suffix_is_found_by_its_stem(tmp_path: Path) -> None:
    touch(tmp_path, "-3B32lodo2M.mp4", "a/v1.2.MKV", "a/v1.2.json", "frames/1.jpg", "frames.mp4")
    path = write(tmp_path / "l.txt", "-3B32lodo2M 0\na/v1.2 1\nframes 2\n")
    listing = listing_of(train=path)
    assert relative_paths(listing, tmp_path) == ["-3B32lodo2M.mp4", "a/v1.2.MKV", "frames"]
    assert listing.notes == [
        f"files listed without suffix: 2, the first: {path}:1: -3B32lodo2M: {tmp_path / '-3B32lodo2M.mp4'}"
    ]


def test_a_missing_file_is_reported_with_the_files_of_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "v1.mp4", "v2.mp4", "v2.webm")
    path = write(tmp_path / "l.txt", "v1.avi 0\nv2 1\nv3 1\n")
    listing = listing_of(train=path)
    assert relative_paths(listing, tmp_path) == ["v1.avi", "v2", "v3"]  # another suffix may be another file
    assert listing.notes == [
        f"missing files beside files of the same name: 2, the first: {path}:1: v1.avi: {tmp_path / 'v1.mp4'}"
    ]


@pytest.mark.parametrize(("listed", "stored"), [(CAFE, DECOMPOSED), (DECOMPOSED, CAFE)])
def test_both_unicode_forms_of_a_name_are_one_file_with_one_id(tmp_path: Path, listed: str, stored: str) -> None:
    touch(tmp_path, f"{stored}/{stored}.mp4")
    listing = listing_of(train=write(tmp_path / "l.txt", f"{listed}/{listed}.mp4 0\n"))
    assert relative_paths(listing, tmp_path) == [f"{stored}/{stored}.mp4"]
    assert labels_of(listing) == {f"{CAFE}/{CAFE}.mp4": 0}
    assert listing.notes[0].startswith("files listed in another unicode form: 1, the first: ")


def test_paths_of_windows_are_found(tmp_path: Path) -> None:
    touch(tmp_path, "a/b c.mp4")
    listing = listing_of(train=write(tmp_path / "l.txt", "a\\b c.mp4 0\r\n"))
    assert relative_paths(listing, tmp_path) == ["a/b c.mp4"]


# Kinds


def test_pictures_in_a_list_of_videos_are_asked_about(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "v0.mp4 0\nv0.jpg 0\nv1.mp4 1\nframes 1\n")
    with pytest.raises(
        ConfigError, match=r"videos \(2\) and pictures or folders of pictures \(1\), such as v0\.mp4 and "
    ):
        listing_of(train=path)
    listing = listing_of(train=path, kind="videos")
    assert list(labels_of(listing)) == ["v0.mp4", "v1.mp4", "frames"]
    assert listing.passed_over == {"train: pictures beside the videos (data.kind=videos)": ["v0.jpg"]}
    assert list(labels_of(listing_of(train=path, kind="images"))) == ["v0.jpg", "frames"]


# Identity


def test_two_files_of_one_name_are_two_videos_unless_their_bytes_are_equal(tmp_path: Path) -> None:
    name = "camera_left_000000_000010"  # looks like the YouTube id of a Kinetics clip
    write(tmp_path / "S1" / f"{name}.mp4", "one")
    write(tmp_path / "S2" / f"{name}.mp4", "two")
    write(tmp_path / "S3" / "camera_left_000010_000020.mp4", "three")
    path = write(
        tmp_path / "l.txt", f"S1/{name}.mp4 0\nS2/{name}.mp4 1\nS3/camera_left_000010_000020.mp4 2\nS1/{name}.mp4 0\n"
    )
    listing = listing_of(train=path)
    assert labels_of(listing) == {
        f"S1/{name}.mp4": 0,
        f"S2/{name}.mp4": 1,
        "S3/camera_left_000010_000020.mp4": 2,
    }
    assert {video.source for video in listing.videos} == {""}  # not clips of one YouTube video
    assert listing.repeated == [f"S1/{name}.mp4: {path}:1 and again {path}:4"]
    assert f"names of several different files, which are different videos: 1, the first: {name}: " in listing.notes[0]
    write(tmp_path / "S2" / f"{name}.mp4", "one")
    with pytest.raises(UserError, match=rf"{name} has two labels, 0 .* and 1 "):
        listing_of(train=path)


def test_files_of_one_name_in_two_splits_are_no_leak_unless_their_bytes_are_equal(tmp_path: Path) -> None:
    name = "camera_left_000000_000010"
    for folder, text in (("S1", "one"), ("S2", "two")):
        write(tmp_path / folder / f"{name}.mp4", text)
    train = write(tmp_path / "train.txt", f"S1/{name}.mp4 0\n")
    val = write(tmp_path / "val.txt", f"S2/{name}.mp4 0\n")
    assert [video.video for video in listing_of(train=train, val=val).videos] == [f"S1/{name}.mp4", f"S2/{name}.mp4"]
    write(tmp_path / "S2" / f"{name}.mp4", "one")
    assert [video.video for video in listing_of(train=train, val=val).videos] == [name, name]


def test_the_fingerprint_changes_with_the_kind_and_not_by_default(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "v0.mp4 0\n")
    found = [fingerprint(config_of(train=path, kind=kind)) for kind in ("auto", "videos", "images")]
    assert len(set(found)) == 3
    assert found[0] == fingerprint(config_of(train=path))
