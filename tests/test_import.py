"""`import videoadapt` is cheap: a command imports what it needs when it runs."""

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
    """Returns the seconds that the import takes after that of torch, and the modules that it adds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    command = [sys.executable, "-c", PROGRAM]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    duration_s, *modules = done.stdout.split()
    return float(duration_s), set(modules)


def test_the_import_is_fast_and_adds_no_heavy_library() -> None:
    durations_s: list[float] = []
    while len(durations_s) < 3 and min(durations_s, default=LIMIT_S) >= LIMIT_S:  # a busy machine can be slow once
        duration_s, modules = import_in_a_new_process()
        durations_s.append(duration_s)
        assert "videoadapt" in modules
        assert not modules & HEAVY
    assert min(durations_s) < LIMIT_S
