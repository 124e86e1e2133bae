"""Makes the photographs and lists of docs/results/photos.md: `python tools/split_trashnet.py TRASHNET OUT`.

TRASHNET is a folder with the 2,527 photographs of github.com/garythung/trashnet (MIT), in any folders below it:
`dataset-resized/CLASS/CLASSn.jpg`, which is 512 x 384, or `dataset-original`. OUT receives

- `photos/CLASS/CLASSn.jpg`: upright (`dataset-resized` has turned each portrait photograph by 90 degrees), with a short
  side of 256 pixels. A photograph that is small enough already is copied.
- `classes.txt`, and lists with a line `path label`: `fixed/train.csv` and `fixed/val.csv` (1,595 and 932), and five
  folds, `fold1/train.csv` and `fold1/val.csv` to `fold5`, in which each photograph is in one val list.

Neighbouring photographs often show the same object, so a block, the photographs with the same number without its last
digit, is never divided. The names in all lists must have the checksum `NAMES`, otherwise nothing is written. Pixels
have none, since every version of a JPEG library writes other bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageOps

from one_line_failures import one_line_failures
from videoadapt.errors import UserError
from videoadapt.runtime.files import replacing

CLASSES = ("cardboard", "glass", "metal", "paper", "plastic", "trash")
SHORT_SIDE, FOLDS = 256, 5
VAL_BLOCKS = {  # blocks of the split `fixed`; all others are its train
    "cardboard": "2 3 6 10 16 20 24 27 37",
    "glass": "4 5 6 11 12 15 16 17 18 30 31 32 33 36 38 39 49",
    "metal": "3 4 5 7 8 9 12 14 15 16 22 24 25 26 27 28 29 30 31 33 38",
    "paper": "1 5 7 8 13 15 16 17 20 21 22 23 26 27 35 37 39 44 45 47 48 49 52 55 59",
    "plastic": "1 5 6 11 14 15 16 19 24 27 30 34 38 40 46",
    "trash": "0 2 5 6 11 12 13",
}
NAMES = "02e6343ca04d5658"
_NAME = re.compile(rf"({'|'.join(CLASSES)})([1-9][0-9]*)\.jpg")

Photo = tuple[str, int]  # class and number


def find_photos(folder: Path) -> dict[Photo, Path]:
    """Returns the photographs in a folder and all folders below it.

    Raises:
        UserError: Two files have the same name, as where a folder holds both sizes.
    """
    found: dict[Photo, Path] = {}
    for path in sorted(folder.rglob("*.jpg")):
        if match := _NAME.fullmatch(path.name):
            photo = match[1], int(match[2])
            if photo in found:
                raise UserError(f"{path}: {found[photo]} has the same name; name the folder of one size")
            found[photo] = path
    return found


def lists_of(photos: Mapping[Photo, object]) -> dict[str, list[Photo]]:
    """Returns the photographs of each list, by the name of its file without suffix, such as `fold1/val`."""
    val_blocks = {(name, int(block)) for name, blocks in VAL_BLOCKS.items() for block in blocks.split()}
    folds = _fold_of_blocks(photos)
    lists: dict[str, list[Photo]] = {}
    for photo in sorted(photos):
        block = block_of(photo)
        lists.setdefault(f"fixed/{'val' if block in val_blocks else 'train'}", []).append(photo)
        for fold in range(1, FOLDS + 1):
            lists.setdefault(f"fold{fold}/{'val' if folds[block] == fold else 'train'}", []).append(photo)
    return lists


def block_of(photo: Photo) -> Photo:
    """Returns class and number of the block of ten that a photograph belongs to."""
    return photo[0], photo[1] // 10


def _fold_of_blocks(photos: Mapping[Photo, object]) -> dict[Photo, int]:
    """Returns the fold of each block: the blocks of a class, in the order of a checksum, take folds in turn."""
    of_class: dict[str, list[Photo]] = defaultdict(list)
    for block in sorted(set(map(block_of, photos))):
        of_class[block[0]].append(block)
    return {
        block: 1 + turn % FOLDS
        for blocks in of_class.values()
        for turn, block in enumerate(sorted(blocks, key=lambda each: _digest(f"{each[0]} {each[1]}")))
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lines_of(lists: Mapping[str, list[Photo]]) -> dict[str, str]:
    """Returns the text of each list, by the name of its file."""
    return {
        f"{name}.csv": "".join(
            f"photos/{label}/{label}{number}.jpg {CLASSES.index(label)}\n" for label, number in photos
        )
        for name, photos in sorted(lists.items())
    }


def require_known(texts: Mapping[str, str]) -> None:
    """Checks the names in all lists against `NAMES`.

    Raises:
        UserError: Photographs are missing, or there are others.
    """
    if _digest("".join(f"{name}\n{text}" for name, text in sorted(texts.items())))[:16] != NAMES:
        photos = sum(text.count("\n") for name, text in texts.items() if name.startswith("fixed/"))
        raise UserError(f"{photos} photographs were found, and their names are not the 2,527 of TrashNet")


def shrink(source: Path, target: Path) -> None:
    """Writes a photograph upright and with a short side of at most `SHORT_SIDE` pixels."""
    with Image.open(source) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    if upright.width > upright.height:  # all of TrashNet are portraits
        upright = upright.transpose(Image.Transpose.ROTATE_270)
    with replacing(target) as temporary:  # after an interruption, a photograph that exists is whole
        if upright.size == image.size and min(upright.size) <= SHORT_SIDE:
            temporary.write_bytes(source.read_bytes())
            return
        scale = SHORT_SIDE / min(upright.size)
        size = round(upright.width * scale), round(upright.height * scale)
        upright.resize(size, Image.Resampling.LANCZOS).save(temporary, "JPEG", quality=90)


def main(
    trashnet: Annotated[Path, typer.Argument(help="Folder with the photographs.")],
    out: Annotated[Path, typer.Argument(help="Folder of the lists and the smaller photographs.")],
) -> None:
    """Makes the photographs and lists of docs/results/photos.md."""
    photos = find_photos(trashnet)
    texts = lines_of(lists_of(photos)) | {"classes.txt": "".join(f"{name}\n" for name in CLASSES)}
    require_known(texts)
    for photo, path in photos.items():
        target = out / "photos" / photo[0] / path.name
        if not target.exists():
            shrink(path, target)
    for name, text in texts.items():
        with replacing(out / name) as temporary:
            temporary.write_text(text)
    print(f"{out}: {len(photos)} photographs, {len(texts) - 1} lists")


if __name__ == "__main__":
    with one_line_failures():
        typer.run(main)
