"""An editable install from a clone named `videoadapt` is importable from everywhere, the clone's parent included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = "import videoadapt as va; print(va.__file__); va.__version__"  # a namespace package has neither


@pytest.mark.slow
def test_import_from_the_parent_folder_of_a_clone_named_videoadapt(tmp_path: Path) -> None:
    """There the clone's own folder could be found first, as a namespace package without any name in it."""
    clone = tmp_path / "videoadapt"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=ignored)
    # An environment of its own, which sees the requirements of the tests' environment.
    target = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", target], check=True)
    site = next(target.glob("lib/python*/site-packages"))
    (site / "requirements.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    python = target / "bin" / "python"
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    install: list[str | Path] = [*pip, "--no-deps", "--no-build-isolation", "--editable", clone]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(install, check=True, env=environment)
    for folder in (tmp_path, clone, site):
        done = subprocess.run([python, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()) == clone / "videoadapt" / "__init__.py"
