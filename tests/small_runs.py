"""Small real runs for the end-to-end tests: a generated data set, a config that trains on it in seconds, and verbs."""

from __future__ import annotations

import atexit
import functools
import io
import shutil
import subprocess
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from videoadapt.commands.cli import main
from videoadapt.config.load import Config, make_config
from videoadapt.data.synthetic import generate

SIZES = {"train": 48, "val": 12}


def make_data(folder: Path) -> Path:
    """Writes 48 training and 12 validation videos of the demo's kind. The test may change the files."""
    shutil.copytree(_generated(), folder, dirs_exist_ok=True)
    return folder


@functools.cache
def _generated() -> Path:
    """The videos, generated once per process of tests."""
    folder = Path(tempfile.mkdtemp(prefix="videoadapt-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    generate(folder, SIZES, seed=3, workers=1)
    return folder


def values(data: Path, run: Path) -> dict:
    """The nested dicts of a tiny config. Tests change the keys that they are about."""
    return {
        "run": {"dir": str(run), "seed": 1, "device": "cpu"},
        "data": {
            "root": str(data),
            "train": {"annotations": str(data / "train.csv")},
            "val": {"annotations": str(data / "val.csv")},
            "classes": str(data / "classes.txt"),
            "holdout": 0.3,
            "workers": 0,
            "flip": 0.0,
            "short_side": [64, 72],
        },
        "model": {
            "width": 32,
            "depth": 2,
            "heads": 2,
            "patch": 8,
            "size": 64,
            "num_frames": 4,
            "stride_frames": 2,
            "fps": None,
            "num_classes": 12,
            "points": ["8", "6", "4"],
            "init_std": 0.07,
            "time_init_std": 0.5,
            "drop_path": 0.1,
        },
        "train": {
            "epochs": 2,
            "batch": 8,
            "optimizer": "adamw",
            "lr": 0.002,
            "schedule": "cosine",
            "warmup_epochs": 0.5,
            "clip_grad": 1.0,
            "ema": 0.9,
            "save_steps": 2,
            "validate_every": 0,  # tests of validation set it
        },
        "label": {"source": "holdout"},
        "assign": {"frames": 2, "size": 32, "channel_multiplier": 0.25, "stages": 2, "epochs": 2, "batch": 8},
        "evaluate": {"spatial_crops": 1, "batch": 8, "speed_clips": 4, "speed_repeats": 1},
    }


def config(data: Path, run: Path, /, **sections: dict) -> Config:
    """Returns the tiny config with some keys of some sections replaced."""
    nested = values(data, run)
    for section, keys in sections.items():
        nested.setdefault(section, {}).update(keys)
    return make_config(nested)


def command(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs `videoadapt WORDS` in this process, which saves the import of torch; returns exit code and output.

    A programming error is raised, and fails the test with its traceback.
    """
    out, errors = io.StringIO(), io.StringIO()
    arguments = [str(word) for word in words]
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            main(arguments)
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            return subprocess.CompletedProcess(arguments, ended.code, out.getvalue(), errors.getvalue())
