"""Classes and labels: files of class names, labels that count from 1, and labels that contradict the paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from listings import labels_of, listing_of, touch, write
from video_files import write_list
from videoadapt.data.index.class_files import read_classes
from videoadapt.data.index.class_names import CLASS_SETS, class_set
from videoadapt.data.index.text import normalised
from videoadapt.errors import ConfigError

UCF_CLASSES = "1 Archery\n2 Bowling\n3 Typing\n"


# Files of class names


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.txt", "0 sit\n1 stand up\n"),
        ("c.txt", "1 sit\r\n2 stand up\r\n"),  # UCF101's classInd.txt
        ("c.txt", "\ufeff1. sit\n2. stand up\n"),
        ("c.txt", "1: stand up\n0: sit\n"),
        ("c.txt", "sit\t0\nstand up\t1\n"),  # label maps of Kinetics-710
        ("c.csv", "sit,0\nstand up,1\n"),
        ("c.csv", '1,"stand up"\n0,"sit"\n'),
        ("c.csv", "id,name\n1,sit\n2,stand up\n"),
        ("c.csv", "label,class_name\n1,stand up\n0,sit\n"),
        ("c.csv", "id,label\n0,sit\n1,stand up\n"),
        ("c.json", '["sit", "stand up"]'),
        ("c.json", '{"0": "sit", "1": "stand up"}'),
        ("c.json", '{"stand up": 2, "sit": 1}'),
        ("c.json", '{"id2label": {"0": "sit", "1": "stand up"}}'),
        ("c.json", '[{"id": 1, "name": "stand up"}, {"id": 0, "name": "sit"}]'),
    ],
)
def test_the_shapes_of_other_projects_are_read(tmp_path: Path, name: str, text: str) -> None:
    found = read_classes(write(tmp_path / name, text))
    assert found.names == ("sit", "stand up")
    assert found.first in {None, 0, 1}
    assert ("from 1; 'sit' has the label 0" in found.note) == (found.first == 1)


@pytest.mark.parametrize(
    "names",
    [
        ["level 1", "level 2"],  # the names without numbers would be equal
        ["2 step", "moonwalk"],
        ["3D printing", "4D printing"],
        ["1", "2"],
    ],
)
def test_numbers_that_are_parts_of_names_stay(tmp_path: Path, names: list[str]) -> None:
    assert read_classes(write(tmp_path / "c.txt", "\n".join(names))) == (tuple(names), None, "")


def test_a_json_list_gives_names_as_they_are(tmp_path: Path) -> None:
    names = ["0 sit", "1 stand"]
    assert read_classes(write(tmp_path / "c.json", json.dumps(names))).names == tuple(names)
    assert read_classes(write(tmp_path / "c.txt", "\n".join(names))).names == ("sit", "stand")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", "0 sit\n2 stand\n", "expected each number from 0 to 1 once, or from 1 to 2; .* as a JSON list"),
        ("c.txt", "\n\n", "names no class"),
        ("c.json", "{}", "names no class"),
        ("c.json", '["sit", 3]', "entry 1: expected a name, or an object with `id` and `name`"),
        ("c.json", '{"sit": "a", "stand": "b"}', "expected a whole number for each class, got 'a' for 'sit'"),
    ],
)
def test_class_files_with_gaps_or_without_numbers_are_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"data\.classes: .*{name}: {message}"):
        read_classes(write(tmp_path / name, text))


def test_a_class_set_that_is_not_built_in_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        ConfigError, match="kinetics500 does not exist; built in are kinetics400, kinetics600, kinetics700"
    ):
        read_classes(Path("kinetics500"))


@pytest.mark.parametrize(
    ("key", "size", "samples"),
    [
        ("kinetics400", 400, {0: "abseiling", 259: "punching person (boxing)", 399: "zumba"}),
        (
            "kinetics600",
            600,
            {
                17: "backflip (human)",
                58: "bull fighting",
                89: "chopping vegetables",
                318: "picking fruit",
                599: "zumba",
            },
        ),
        ("kinetics700", 700, {19: "backflip (human)", 18: "baby waking up", 366: "picking apples", 699: "zumba"}),
    ],
)
def test_the_named_sets_have_the_names_and_order_of_public_label_maps(
    key: str, size: int, samples: dict[int, str]
) -> None:
    names = class_set(key)
    assert len(names) == len(set(map(normalised, names))) == size
    assert list(names) == sorted(names)
    assert {number: names[number] for number in samples} == samples
    assert read_classes(Path(key)).names == names


def test_the_named_sets_share_the_classes_that_their_papers_state() -> None:
    sets = {key: set(class_set(key)) for key in CLASS_SETS}
    assert len(sets["kinetics400"] & sets["kinetics600"]) == 368  # "A short note about Kinetics-600", section 2
    assert len(sets["kinetics600"] - sets["kinetics700"]) == 4
    assert sets["kinetics600"] - sets["kinetics700"] == {
        "bull fighting", "chopping vegetables", "picking fruit", "passing american football (not in game)"
    }  # fmt: skip


@pytest.mark.parametrize("key", ["kinetics600", "kinetics700"])
def test_a_named_set_in_another_order_is_refused(tmp_path: Path, key: str) -> None:
    names = list(class_set(key))
    names[3], names[4] = names[4], names[3]
    classes = write(tmp_path / "c.txt", "\n".join(names))
    path = write_list(tmp_path / "l.txt", [("a.mp4", 0)])
    with pytest.raises(ConfigError, match=rf"class 3 is '{names[3]}', but '{names[4]}' .* use data\.classes={key}"):
        listing_of(len(names), train=path, classes=classes)
    rows: list[tuple[str, int | str]] = [("v/abseiling/a.mp4", 0), ("v/air_drumming/b.mp4", 4)]
    with pytest.raises(ConfigError, match=rf"l\.txt:2: label 4, but air_drumming is class 3 .* data\.classes={key}"):
        listing_of(len(names), train=write_list(tmp_path / "l.txt", rows))


def test_folders_that_mmaction2_renames_are_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "backflip_-human-/a.mp4\nmassaging_person-s_head/b.mp4\n")
    listing = listing_of(600, train=path, classes="kinetics600")
    names = [listing.classes[video.label] for video in listing.videos]
    assert names == ["backflip (human)", "massaging person's head"]


# Labels that count from 1


@pytest.mark.parametrize(
    "val",
    [
        "Archery/v1.mp4 1\nBowling/v3.mp4 2\n",
        "Archery/v1.mp4\nBowling/v3.mp4\n",  # UCF101's testlist01.txt
        "Archery/v 1.mp4\nBowling/v3.mp4 Bowling\n",
    ],
)
def test_the_lists_of_ucf101_have_the_labels_of_its_classes(tmp_path: Path, val: str) -> None:
    classes = write(tmp_path / "classInd.txt", UCF_CLASSES)
    train = write(tmp_path / "train.txt", "Archery/v0.mp4 1\nBowling/v2.mp4 2\n")
    listing = listing_of(train=train, val=write(tmp_path / "val.txt", val), classes=classes)
    assert listing.classes == ("Archery", "Bowling", "Typing")
    assert [listing.classes[video.label] for video in listing.videos] == ["Archery", "Bowling"] * 2
    assert [name.split("/")[0] for name in labels_of(listing)] == ["Archery", "Bowling"] * 2
    notes = "\n".join(listing.notes)
    unlabelled = "v3.mp4\n" in val or " 1.mp4\n" in val
    assert "numbers the classes from 1; 'Archery' has the label 0" in notes
    assert "labels count from 1, as the paths show: label 1 is class 0, 'Archery'" in notes
    assert ("videos without a label, which have the class of their folder" in notes) == unlabelled


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        ([1, 2, 2], UCF_CLASSES, [0, 1, 1]),  # the list uses the numbers of the class file
        ([1, 2, 3], UCF_CLASSES, [0, 1, 2]),
        ([0, 1, 2], UCF_CLASSES, [0, 1, 2]),  # MMAction2's lists of UCF101 beside classInd.txt
        ([1, 2, 2], "Archery\nBowling\nTyping\n", [1, 2, 2]),
        ([1, 2, 2], None, [1, 2, 2]),
    ],
)
def test_labels_count_from_1_if_the_class_file_does_and_no_label_is_0(
    tmp_path: Path, labels: list[int], classes: str | None, expected: list[int]
) -> None:
    path = write_list(tmp_path / "l.txt", [(f"x{number}.mp4", label) for number, label in enumerate(labels)])
    given: dict[str, Any] = {"classes": write(tmp_path / "c.txt", classes)} if classes else {}
    listing = listing_of(train=path, **given)
    assert [video.label for video in listing.videos] == expected
    assert any("count from" in note for note in listing.notes) == (classes == UCF_CLASSES)


def test_labels_from_1_to_the_number_of_classes_are_refused_if_nothing_else_shows_that_they_count_from_1(
    tmp_path: Path,
) -> None:
    path = write_list(tmp_path / "l.txt", [("a.mp4", 1), ("b.mp4", 2), ("c.mp4", 3)])
    with pytest.raises(ConfigError, match=r"l\.txt:3: label 3 of c\.mp4: .* from 1 to 3 and seem to count from 1"):
        listing_of(train=path)
    names = write(tmp_path / "c.txt", "sit\nstand\nwave\n")
    rows: list[tuple[str, int | str]] = [("sit_01.mp4", 1), ("stand_01.mp4", 2), ("b/wave.mp4", 3)]
    listing = listing_of(train=write_list(tmp_path / "l.txt", rows), classes=names)
    assert [video.label for video in listing.videos] == [0, 1, 2]  # the file names show it


def test_train_and_val_count_from_the_same_number(tmp_path: Path) -> None:
    classes = write(tmp_path / "c.txt", UCF_CLASSES)
    train = write_list(tmp_path / "train.txt", [("a.mp4", 0), ("b.mp4", 1)])
    val = write_list(tmp_path / "val.txt", [("c.mp4", 1), ("d.mp4", 2)])
    assert [video.label for video in listing_of(train=train, val=val, classes=classes).videos] == [0, 1, 1, 2]


# Labels against paths


def write_rows(path: Path, *rows: tuple[str, int | str]) -> Path:
    return write_list(path, list(rows))


def test_labels_that_contradict_the_folders_are_refused_for_any_class_set(tmp_path: Path) -> None:
    classes = write(tmp_path / "c.txt", "sit\nstand\nwave hand\n")
    rows = [("d/sit/a.mp4", 0), ("d/stand/g01/b.mp4", 1), ("d/wave_hand/c.mp4", 0), ("d/wave_hand/e.mp4", 1)]
    with pytest.raises(ConfigError) as error:
        listing_of(train=write_rows(tmp_path / "l.txt", *rows), classes=classes)
    assert str(error.value).startswith(
        f"{tmp_path / 'l.txt'}:3: label 0 is 'sit', but wave_hand names the class 'wave hand', number 2"
    )
    rows[3] = ("d/wave_hand/e.mp4", 2)  # one video was labelled again by hand
    listing = listing_of(train=write_rows(tmp_path / "l.txt", *rows), classes=classes)
    assert [video.label for video in listing.videos] == [0, 1, 0, 2]
    place = f"{tmp_path / 'l.txt'}:3: d/wave_hand/c.mp4: label 0"
    assert listing.notes == [f"videos with another label than the class that their path names: 1, the first: {place}"]


def test_labels_that_contradict_most_file_names_are_refused(tmp_path: Path) -> None:
    classes = write(tmp_path / "c.txt", "Archery\nHandstandPushups\nTyping\n")
    right = [("v_Archery_g01_c01.avi", 0), ("v_HandStandPushups_g01_c01.avi", 1), ("v_Typing_g01_c01.avi", 2)]
    assert listing_of(train=write_rows(tmp_path / "l.txt", *right), classes=classes).notes == []
    shifted = [(name, (label + 1) % 3) for name, label in right]
    with pytest.raises(ConfigError, match=r"l\.txt:1: label 1 is 'HandstandPushups', but v_Archery_g01_c01\.avi names"):
        listing_of(train=write_rows(tmp_path / "l.txt", *shifted), classes=classes)
    one_other = [*right, ("after_typing.avi", 0)]
    assert len(listing_of(train=write_rows(tmp_path / "l.txt", *one_other), classes=classes).notes) == 1


@pytest.mark.parametrize(
    "name", ["stand_then_sit.mp4", "sitting.mp4", "arm wrestling.mp4", "/home/sit/data/v/a.mp4", "7.mp4"]
)
def test_names_that_only_seem_to_be_classes_prove_nothing(tmp_path: Path, name: str) -> None:
    classes = write(tmp_path / "c.json", json.dumps(["sit", "stand", "arm wrestling", "wrestling", "7"]))
    path = write_rows(tmp_path / "l.txt", (name, 3 if "arm" not in name else 2))
    assert listing_of(5, train=path, classes=classes).notes == []


def test_a_list_without_labels_needs_folders_that_are_classes(tmp_path: Path) -> None:
    path = write(tmp_path / "l.txt", "sit/a.mp4\nother/b.mp4\n")
    with pytest.raises(ConfigError, match=r"l\.txt:1: expected `path label`, got 'sit/a\.mp4'; .* data\.classes"):
        listing_of(train=path)
    classes = write(tmp_path / "c.txt", "sit\nstand\nwave\n")
    with pytest.raises(
        ConfigError, match=r"l\.txt:2: expected `path label`, got 'other/b\.mp4'; .* a class of .*c\.txt"
    ):
        listing_of(train=path, classes=classes)
    folder = touch(tmp_path / "train", "sit/x.mp4", "stand/x.mp4", "wave/x.mp4")
    val = write(tmp_path / "l.txt", "sit/a.mp4\n")
    assert labels_of(listing_of(train=folder, val=val))["sit/a.mp4"] == 0
