"""Imports go downwards only: the layers of the package, and what may import what inside a layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "videoadapt"

# A name is a module of videoadapt, or a folder of it: inside a folder, imports are free.
LAYERS = [
    {"errors", "points", "chains", "seeds", "cost", "sections", "config", "log", "runtime", "cluster", "stopping"},
    {"model", "data", "draws", "groups", "parallel", "lease", "losses", "optim"},
    {"batchnorm", "targets", "forecast", "memory", "checkpoint", "labels", "assigner", "intervals"},
    {"policy", "routing", "scoring", "state", "timing", "preflight"},
    {"train", "assign", "label", "evaluate", "prediction", "plan", "report", "export"},
    {"launch", "submission", "jobs", "demo", "bench"},
    {"cli"},
]
LAYER = {name: number for number, names in enumerate(LAYERS, start=1) for name in names}
VERBS = 5  # the layer whose modules know of one another only `report`
EXEMPT = {"__init__", "__main__"}  # the lazy public API and `python -m videoadapt`


def imported(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """The names of LAYERS that a file of `package` imports, at its head or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            modules = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for parts in (module.split(".") for module in modules):
            if parts[0] == "videoadapt" and len(parts) > 1 and parts[1] != "__version__":
                yield parts[1]


def forbidden(importer: str, name: str) -> str | None:
    """Why the module or folder `importer` must not import `name`; None if it may."""
    if unknown := {importer, name} - set(LAYER):
        return f"{', '.join(unknown)} is not in the table of layers: place it in {Path(__file__).name}"
    above, here = LAYER[name], LAYER[importer]
    if importer == name or above < here:
        return None
    if above > here:
        return f"{importer} (layer {here}) imports {name} (layer {above})"
    if {importer, name} == {"model", "data"} or (here == VERBS and name != "report"):
        return f"{importer} imports {name}, of the same layer"
    return None


def files() -> dict[str, Path]:
    found = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: path for name, path in found.items() if name not in EXEMPT}


def imports_of(path: Path) -> set[str]:
    package = ("videoadapt", *path.relative_to(PACKAGE).parent.parts)
    return set(imported(path.read_text(encoding="utf-8"), package))


@pytest.mark.parametrize("path", files().values(), ids=files())
def test_imports_go_downwards(path: Path) -> None:
    importer = path.relative_to(PACKAGE).with_suffix("").parts[0]
    reasons = [forbidden(importer, name) for name in sorted(imports_of(path) | {importer})]
    assert not list(filter(None, reasons))


def test_no_module_is_imported_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in files().items():
        importer = name.split("/")[0]
        graph.setdefault(importer, set()).update(imports_of(path) - {importer})
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("importer", "source", "allowed"),
    [
        ("model", "from videoadapt.training.train import train", False),
        ("model", "import videoadapt.data.video.readers", False),
        ("model", "def f():\n    from videoadapt import cli", False),
        ("model", "from ..train import train", False),
        ("model", "from .block import Block\nfrom videoadapt.config.points import Point", True),
        ("train", "from videoadapt.evaluation.evaluate import evaluate", False),
        ("train", "from videoadapt.report import curve", True),
        ("config", "from videoadapt.config.points import Point", True),
        ("cli", "from videoadapt.utils import helper", False),
        ("cli", "from videoadapt import TimeSformer", False),
        ("cli", "import torch", True),
    ],
)
def test_the_rules_catch_what_they_should(importer: str, source: str, allowed: bool) -> None:
    package = ("videoadapt", "model") if importer == "model" else ("videoadapt",)
    reasons = [forbidden(importer, name) for name in imported(source, package)]
    assert not any(reasons) == allowed
