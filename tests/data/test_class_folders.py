"""Class folders: what counts as a video, what is passed over, pictures beside videos, and files of a table."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from listings import config_of, labels_of, listing_of, relative_paths, touch, write, write_csv
from video_files import write_video
from videoadapt.commands.tables import print_index
from videoadapt.config.load import make_config
from videoadapt.data.index.annotations import fingerprint
from videoadapt.data.index.manifest import index
from videoadapt.data.video.images import read_image
from videoadapt.data.video.suffixes import VIDEO_SUFFIXES
from videoadapt.errors import ConfigError, VideoError


def test_every_suffix_of_a_video_counts(tmp_path: Path) -> None:
    names = {f"a/v{number}{suffix.upper()}" for number, suffix in enumerate(sorted(VIDEO_SUFFIXES))}
    assert {".gif", ".mts", ".m2ts", ".vob", ".ogv", ".mp4"} < VIDEO_SUFFIXES
    assert set(labels_of(listing_of(1, train=touch(tmp_path / "train", *names)))) == names


def test_a_file_of_unknown_suffix_counts_if_a_reader_can_open_it(tmp_path: Path) -> None:
    train = touch(tmp_path / "train", "a/empty.xyz", "b/v.mp4")
    video = write_video(tmp_path / "v.mp4", 4)
    for name in ("a/-3B32lodo2M", "a/deep/clip.dat"):
        (train / name).parent.mkdir(exist_ok=True)
        shutil.copy(video, train / name)
    write(train / "b" / "words", "FFmpeg plays text, too\n" * 50)
    config = config_of(2, train=train)
    before = fingerprint(config)
    listing = listing_of(2, train=train)
    assert labels_of(listing) == {"a/-3B32lodo2M": 0, "a/deep/clip.dat": 0, "b/v.mp4": 1}
    assert listing.passed_over == {
        "train: files .xyz": ["a/empty.xyz"], "train: files without suffix": ["b/words"]
    }  # fmt: skip
    touch(train, "b/other")
    assert fingerprint(config) != before


def test_what_is_passed_over_is_named_by_kind_in_the_listing_the_summary_and_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = touch(
        tmp_path / "train", "a/v.txt", "a/w.TXT", "a/.v.mp4", "a/.cache/v.mp4", "a/@eaDir/v.mp4/x.jpg", "readme.md",
        "v.mp4", "__MACOSX/a/._v.mp4", ".git/config", "b/#recycle/old.mp4", "b/v.mp4",
    )  # fmt: skip
    write_video(train / "a" / "v.mp4", 4)
    config = make_config(
        {"run": {"dir": str(tmp_path / "run")}, "model": {"num_classes": 2}}
        | {"data": {"train": {"annotations": str(train)}}}
    )
    expected = {
        "train: files .txt": ["a/v.txt", "a/w.TXT"],
        "train: hidden files": ["a/.v.mp4"],
        "train: hidden folders": [".git", "a/.cache"],
        "train: folders @eaDir": ["a/@eaDir"],
        "train: folders __MACOSX": ["__MACOSX"],
        "train: folders #recycle": ["b/#recycle"],
        "train: files .md outside a class folder": ["readme.md"],
        "train: files .mp4 outside a class folder": ["v.mp4"],
    }
    assert listing_of(2, train=train).passed_over == expected
    assert index(config)["video"].tolist() == ["a/v.mp4", "b/v.mp4"]
    summary = json.loads((tmp_path / "run" / "index.json").read_text())
    assert summary["passed_over"] == {kind: {"count": len(first), "first": first} for kind, first in expected.items()}
    print_index(summary)
    assert "passed over, train: files .txt: 2" in capsys.readouterr().err


def test_pictures_beside_videos_are_asked_about_and_then_left_out(tmp_path: Path) -> None:
    train = touch(
        tmp_path / "train", "a/v.mp4", "a/v.jpg", "a/deep/w.mp4", "a/deep/w.png", "b/v.mp4", "thumbs/1.jpg",
        "b/frames/1.jpg", "b/frames/2.jpg",
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"videos \(3\) and pictures .* \(4\), such as a/v\.mp4 and a/v\.jpg; .*data\.kind"
    ):
        listing_of(3, train=train)
    listing = listing_of(2, train=train, kind="videos")
    assert labels_of(listing) == {"a/v.mp4": 0, "a/deep/w.mp4": 0, "b/v.mp4": 1}
    assert listing.passed_over == {
        "train: pictures beside the videos (data.kind=videos)": ["a/v.jpg", "a/deep/w.png", "b/frames", "thumbs/1.jpg"]
    }
    assert labels_of(listing_of(3, train=train, kind="images")) == {
        "a/v.jpg": 0, "a/deep/w.png": 0, "b/frames": 1, "thumbs/1.jpg": 2
    }  # fmt: skip


def test_class_folders_without_a_video_are_named(tmp_path: Path) -> None:
    train = touch(tmp_path / "train", "a/v.mp4", "b/v.mp4", "docs/readme.md")
    with pytest.raises(ConfigError, match=r"is 2, but .* has 3 classes.*; class folders without a video: docs$"):
        listing_of(2, train=train)
    listing = listing_of(3, train=train)
    assert listing.classes == ("a", "b", "docs")
    assert listing.notes == ["class folders without a video: docs"]


def test_the_order_of_classes_does_not_depend_on_the_unicode_form_of_folders(tmp_path: Path) -> None:
    names = ["\u00e9cole", "eglise", "zoo"]  # decomposed, the first sorts before `eglise`
    composed = touch(tmp_path / "nfc", *(f"{name}/v.mp4" for name in names))
    decomposed = touch(tmp_path / "nfd", *(f"{unicodedata.normalize('NFD', name)}/v.mp4" for name in names))
    listing = listing_of(train=composed, val=decomposed)
    assert listing.classes == ("eglise", "zoo", "\u00e9cole")
    for videos in (listing.videos[:3], listing.videos[3:]):
        assert {video.video: video.label for video in videos} == {
            "eglise/v.mp4": 0, "zoo/v.mp4": 1, "\u00e9cole/v.mp4": 2
        }  # fmt: skip
    assert all(Path(video.path).exists() for video in listing.videos)
    assert listing_of(train=decomposed).classes == listing.classes


def test_class_folders_with_numbers_in_the_order_of_text_are_reported(tmp_path: Path) -> None:
    listing = listing_of(train=touch(tmp_path / "train", *(f"{number}/v.mp4" for number in (1, 2, 10))))
    assert listing.classes == ("1", "10", "2")
    assert listing.notes == [
        "class folders are numbers in the order of text: 1, 10, 2, ...; data.classes may give another order"
    ]
    assert listing_of(train=touch(tmp_path / "padded", *(f"{n:02}/v.mp4" for n in (1, 2, 10)))).notes == []


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_an_animated_image_is_refused_rather_than_cut_to_its_first_frame(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 100, 200)]
    path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(VideoError, match=rf"a\{suffix}: an animated image of 3 frames; convert it to a video"):
        read_image(path)
    frames[0].save(path)
    assert read_image(path).shape == (8, 8, 3)


def test_the_further_pictures_of_a_photo_are_no_animation(tmp_path: Path) -> None:
    photo = Image.new("RGB", (8, 8), (200, 0, 0))
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    assert read_image(tmp_path / "a.jpg")[0, 0, 0] > 150


# Tables


def test_files_of_a_table_are_found_by_their_youtube_id_if_one_clip_has_it(tmp_path: Path) -> None:
    one, two, short = "-3B32lodo2M", "aaaaaaaaaaa", "bbbbbbbbbbb"
    touch(tmp_path, f"x/{one}.mp4", f"{two}.mp4", f"{short}_7_17.mkv")
    rows = [("a", one, 59, 69), ("a", two, 0, 10), ("a", two, 20, 30), ("a", short, 7, 17)]
    path = write_csv(tmp_path / "k.csv", [(*row, "train") for row in rows])
    listing = listing_of(1, train=path)
    assert relative_paths(listing, tmp_path) == [
        f"x/{one}.mp4", f"{two}_000000_000010.mp4", f"{two}_000020_000030.mp4", f"{short}_7_17.mkv"
    ]  # fmt: skip
    assert listing.videos[0].video == f"{one}_000059_000069"  # the id of the annotations
    assert listing.notes == [
        "files found by their YouTube id alone, which must be cut to the times of the table: 1, the first: "
        f"{path}:2: {tmp_path / 'x' / one}.mp4",
        "missing clips beside a file with their YouTube id, which several clips share: 2, the first: "
        f"{path}:3: {tmp_path / two}.mp4",
    ]


def test_files_in_folders_that_programs_made_are_not_taken_for_those_of_a_table(tmp_path: Path) -> None:
    clip = "aaaaaaaaaaa_000000_000010"
    touch(tmp_path, f"#recycle/{clip}.mp4", f"v/{clip}.mp4", f"v/{clip}.gif", f".old/{clip}.mp4")
    path = write_csv(tmp_path / "k.csv", [("a", "aaaaaaaaaaa", 0, 10, "train")])
    listing = listing_of(1, train=path)
    assert relative_paths(listing, tmp_path) == [f"v/{clip}.mp4"]
    assert listing.ignored_files == [f"{tmp_path}/v/{clip}.gif: ignored, {tmp_path}/v/{clip}.mp4 is used"]


def test_rows_of_a_split_that_no_run_uses_are_counted(tmp_path: Path) -> None:
    rows = [("a", "aaaaaaaaaaa", 0, 10, "train"), ("a", "bbbbbbbbbbb", 0, 10, "vaild"), ("a", "c" * 11, 0, 10, "val")]
    path = write_csv(tmp_path / "k.csv", rows)
    assert listing_of(1, train=path).passed_over == {"train: rows of split 'vaild'": [f"{path}:3"]}
