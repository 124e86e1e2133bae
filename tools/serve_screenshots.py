"""Takes the screenshots of docs/serve.md: the page of a run with the answers to some files, in four windows.

    python tools/serve_screenshots.py runs/demo video.mp4 notes.txt --out docs/images

It needs playwright and a Chromium, as the tests of the page do. Each picture is 1440 or 390 pixels wide, light or dark.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

import videoadapt as va
from videoadapt.config.load import load_config

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from browser import find, launched, visit  # noqa: E402

COLOURS = 128  # a third of the bytes
WINDOWS = ((1440, 900), (390, 844))


def main() -> None:
    """Serves the run, and writes `serve_WIDTH_light.png` and `serve_WIDTH_dark.png`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("files", type=Path, nargs="+", help="files to drop in; the last is on top")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="a folder")
    words = parser.parse_args()
    program = find()
    if program is None:
        sys.exit("no Chromium on PATH: apt-get install chromium")
    words.out.mkdir(parents=True, exist_ok=True)
    with va.serve(load_config(words.run, ["serve.port=0"]), block=False) as served, launched(program) as browser:
        for width, height in WINDOWS:
            for dark in (False, True):
                with visit(browser, width=width, height=height, dark=dark) as seen:
                    page = seen.open(served.url)
                    for number, file in enumerate(words.files):  # one after the other, for the order of the answers
                        page.set_input_files("#files", file)
                        page.locator(".best, .refused").nth(number).wait_for()
                    path = words.out / f"serve_{width}_{'dark' if dark else 'light'}.png"
                    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
                    picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)
                    print(path, *seen.errors, *seen.left)


if __name__ == "__main__":
    main()
