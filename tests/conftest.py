"""What tests of all modules use: the real footage, and `need` for parts that are not on every machine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, and inherited by the ranks and workers that tests start: one thread each, no downloads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin are slow where cores are shared
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

import slurm_cluster  # noqa: E402

# The models of the tests are too small for more; and where several processes share the tests, each has a core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)

IN_CI = os.environ.get("VIDEOADAPT_CI") == "1"
settings.load_profile("ci" if IN_CI else "local")


def need(part: str | bool, reason: str) -> Any:
    """Skip the test, or the module that calls this at its head, if `part` is missing; in CI, where it must be, fail.

    `part` is the name of a module, which is returned, or a condition.
    """
    if not isinstance(part, str):
        found: Any = part
    else:
        try:
            return importlib.import_module(part)
        except ImportError as error:
            found, reason = None, f"{reason} ({error})"
    if not found and IN_CI:
        pytest.fail(f"must be there in CI: {reason}", pytrace=False)
    if not found:
        pytest.skip(reason, allow_module_level=True)
    return found


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real footage, which not every machine has."""
    folder = Path(os.environ.get("VIDEOADAPT_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no real footage: {folder} is not a folder; VIDEOADAPT_SHARED names another")
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    """A real SLURM of three nodes, for tests marked `slurm`."""
    absent = slurm_cluster.missing()
    need(not absent, f"no SLURM on this machine: {', '.join(absent)} not found")
    started = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    started.start()
    yield started
    started.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run. SLURM's long tests go first: of two processes, one has them for itself."""
    items.sort(key=lambda item: "slurm" not in item.keywords)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
