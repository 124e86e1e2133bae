"""The lists of photographs divide no block, the folds cover each photograph once, and another data set is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import split_trashnet
from split_trashnet import block_of, find_photos, lines_of, lists_of, main, shrink
from videoadapt.errors import UserError

PHOTOS = {(name, number): None for name in split_trashnet.CLASSES for number in range(1, 402)}


def test_no_block_is_divided_and_each_photograph_is_in_the_val_list_of_one_fold() -> None:
    lists = lists_of(PHOTOS)
    for name in ("fixed", *(f"fold{fold}" for fold in range(1, 6))):
        train, val = lists[f"{name}/train"], lists[f"{name}/val"]
        assert sorted(train + val) == sorted(PHOTOS)
        assert not set(map(block_of, train)) & set(map(block_of, val))
    assert set(Counter(photo for fold in range(1, 6) for photo in lists[f"fold{fold}/val"]).values()) == {1}


def test_the_lists_of_all_photographs_have_the_stated_checksum(shared: Path) -> None:
    photos = find_photos(shared / "data" / "photos")
    lists = lists_of(photos)
    for part in ("train", "val"):
        assert set(lists[f"fixed/{part}"]) == set(find_photos(shared / "data" / "photos" / part))
    texts = lines_of(lists) | {"classes.txt": "".join(f"{name}\n" for name in split_trashnet.CLASSES)}
    split_trashnet.require_known(texts)


def test_other_photographs_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (512, 384)).save(tmp_path / "in" / "glass1.jpg")
    with pytest.raises(UserError, match="1 photographs were found, and their names are not the 2,527"):
        main(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_photograph_becomes_upright_and_small(tmp_path: Path) -> None:
    turned = Image.new("RGB", (512, 384), "white")
    turned.paste("black", (0, 0, 100, 384))  # the top of the upright photograph is at the left
    turned.save(tmp_path / "a.jpg", quality=95)
    shrink(tmp_path / "a.jpg", tmp_path / "out" / "b.jpg")
    with Image.open(tmp_path / "out" / "b.jpg") as upright:
        assert upright.size == (256, 341)
        assert [upright.getpixel((128, y)) for y in (20, 320)] == [(0, 0, 0), (255, 255, 255)]
    shrink(tmp_path / "out" / "b.jpg", tmp_path / "c.jpg")
    assert (tmp_path / "c.jpg").read_bytes() == (tmp_path / "out" / "b.jpg").read_bytes()


def test_an_interrupted_call_leaves_no_torn_photograph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(image: Image.Image, path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"the first half")
        raise KeyboardInterrupt

    Image.new("RGB", (512, 384)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shrink(tmp_path / "a.jpg", tmp_path / "out" / "a.jpg")
    assert not list((tmp_path / "out").iterdir())
