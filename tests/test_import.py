"""`import videoadapt` is cheap: what a command needs is imported when it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIMIT_S = 0.3
HEAVY = {"decord", "av", "submitit", "pytorchvideo", "transformers", "timm"}

PROGRAM = """
import sys, time
import torch
started_at, before = time.perf_counter(), set(sys.modules)
import videoadapt
print(time.perf_counter() - started_at, *(set(sys.modules) - before))
"""


def import_in_a_new_process() -> tuple[float, set[str]]:
    """Seconds that the import takes after torch's, and the modules that it brings in."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    command = [sys.executable, "-c", PROGRAM]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    duration_s, *modules = done.stdout.split()
    return float(duration_s), set(modules)


def test_import_brings_in_no_heavy_library() -> None:
    _, modules = import_in_a_new_process()
    assert "videoadapt" in modules
    assert not modules & HEAVY


def test_import_takes_little_beyond_torch() -> None:
    durations_s: list[float] = []
    while len(durations_s) < 3 and min(durations_s, default=LIMIT_S) >= LIMIT_S:  # a busy machine may be slow once
        durations_s.append(import_in_a_new_process()[0])
    assert min(durations_s) < LIMIT_S
