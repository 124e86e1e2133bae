"""Fixtures and settings of all tests: threads, hypothesis, the real footage, a SLURM cluster, a browser, and `need`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Set before torch is imported. Ranks and workers inherit them: one thread each, no downloads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin are slow on shared cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

import browser as browsers  # noqa: E402
import rank_jobs  # noqa: E402
import slurm_cluster  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# The models of the tests are too small for more threads. With pytest-xdist, each process has one core.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)

IN_CI = os.environ.get("VIDEOADAPT_CI") == "1"
settings.load_profile("ci" if IN_CI else "local")


def need(part: str | bool, reason: str) -> Any:
    """Skips the test (or the module, if called at its head) when a part of the machine is missing. Fails in CI.

    Args:
        part: The name of a module, or a condition.
        reason: The message.

    Returns:
        The module, or the condition.
    """
    if not isinstance(part, str):
        found: Any = part
    else:
        try:
            return importlib.import_module(part)
        except ImportError as error:
            found, reason = None, f"{reason} ({error})"
    if not found and IN_CI:
        pytest.fail(f"required in CI: {reason}", pytrace=False)
    if not found:
        pytest.skip(reason, allow_module_level=True)
    return found


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real footage. Not every machine has it."""
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


@pytest.fixture(scope="module")
def rank_server() -> Iterator[None]:
    """A fork server that has imported torch: processes of multiprocessing's `forkserver` start in an instant."""
    with rank_jobs.torch_server():
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium, for `browsers.visit`. It ends with the module: it holds the event loop of the thread."""
    need("playwright", "pages are tested in a browser; pip install playwright")
    absent = f"no browser: none of {', '.join(browsers.PROGRAMS)} is on PATH (apt-get install chromium)"
    program = browsers.find()
    need(program is not None, absent)  # `need` imports a text as a module
    assert program is not None
    with browsers.launched(program) as started:
        yield started


# The longest files of several processes: no core idles at the end while one of them runs.
FIRST = (
    "test_slurm_jobs",
    "test_slurm_cluster",
    "test_docs",
    "test_grouped_training",
    "test_evaluate",
    "test_exchange",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest files first, and skips tests that this machine cannot run."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
