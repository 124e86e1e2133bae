"""Takes the screenshots of a report page that README and docs show.

    python tools/screenshot_report.py runs/demo/report/report.html docs/results/report

Writes the first screen at 1440 and at 390 pixels, light and dark: `FOLDER/report_1440.png`, `report_1440_dark.png`,
`report_390.png`, `report_390_dark.png`, and with `--full` the whole page as well. Needs the
test requirements and Chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import browser as browsers  # noqa: E402

SIZES = {1440: 1000, 390: 844}


def main(page: Path, folder: Path, *, full: bool) -> None:
    """Writes the pictures of a page into a folder."""
    program = browsers.find()
    if program is None:
        sys.exit("no Chromium on PATH; apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with browsers.launched(program) as browser:
        for width, height in SIZES.items():
            for dark in (False, True):
                with browsers.visit(browser, width=width, height=height, dark=dark) as visit:
                    tab = visit.open(page)
                    tab.locator("html[data-ready]").wait_for(state="attached")
                    visit.scroll_through("[data-chart], [data-table]")  # draws them
                    tab.evaluate("scrollTo(0, 0)")
                    tab.wait_for_timeout(300)
                    for whole in (False, True) if full else (False,):
                        name = f"report_{width}{'_dark' * dark}{'_full' * whole}.png"
                        tab.screenshot(path=folder / name, full_page=whole)
                        print(folder / name)
                    if visit.errors or visit.left:
                        sys.exit(f"{page}: {visit.errors} {visit.left}")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--full"]
    main(Path(words[0]), Path(words[1]), full="--full" in sys.argv)
