"""Fetches the libraries in the report page from npm, and checks them against videoadapt/reporting/template/vendor.json.

    python tools/update_page_libraries.py            # the listed versions; a file with another checksum is an error
    python tools/update_page_libraries.py --accept   # after a change of a version in vendor.json: writes new checksums

`npm pack` downloads a package and runs none of its scripts. No file is changed on the way.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = ROOT / "videoadapt" / "reporting" / "template" / "vendor.json"


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpack(package: str, version: str, folder: Path) -> Path:
    """Downloads a package and returns the folder of its contents."""
    line = ["npm", "pack", "--silent", f"{package}@{version}"]
    name = subprocess.run(line, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def main(accept: bool) -> None:
    """Writes every listed file to its place."""
    libraries = json.loads(LIST.read_text(encoding="utf-8"))
    for library in libraries:
        with tempfile.TemporaryDirectory() as folder:
            contents = unpack(library["package"], library["version"], Path(folder))
            for file in library["files"]:
                found = sha256(contents / file["from"])
                if accept:
                    file["sha256"] = found
                elif found != file["sha256"]:
                    sys.exit(f"{library['package']} {library['version']}: {file['from']} has the checksum {found}")
                target = ROOT / file["to"]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(contents / file["from"], target)
                print(target.relative_to(ROOT))
    LIST.write_text(json.dumps(libraries, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(accept="--accept" in sys.argv[1:])
