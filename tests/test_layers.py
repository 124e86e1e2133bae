"""A room of the package imports only rooms below it, and no module is imported in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "videoadapt"
ROOMS = (  # from the ground up
    "config",
    "runtime",
    "model",
    "data",
    "training",
    "routing",
    "evaluation",
    "report",
    "performance",
    "commands",
)
FOUNDATION = {"errors"}  # every room may use it; it uses nothing
ENTRIES = {"__init__", "__main__"}  # the lazy public API and `python -m videoadapt` may use every room


def module_name(path: Path) -> str:
    """`videoadapt.model.weights` for its `__init__.py`, `videoadapt.model.block` for `block.py`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """The modules of the package that `source` imports, at its head or inside functions."""
    above = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = above[: len(above) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            while name.startswith("videoadapt.") and name not in MODULES:
                name = name.rpartition(".")[0]  # noqa: PLW2901 - an attribute of a module stands for the module
            if name.split(".")[0] == "videoadapt":
                yield name


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return set(imports(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py"))


def room(module: str) -> str:
    """The entry of the package that a module belongs to; the package itself for `videoadapt`."""
    return module.split(".")[1] if "." in module else "__init__"


def fault(importer: str, imported: str) -> str | None:
    """Why one module must not import another; None if it may."""
    above, below = room(importer), room(imported)
    if above in ENTRIES or above == below or below in FOUNDATION:
        return None
    if above not in ROOMS or below not in ROOMS:
        return f"{importer} imports {imported}: only rooms import, and only from rooms and videoadapt.errors"
    if ROOMS.index(below) > ROOMS.index(above):
        return f"{importer} imports {imported}, of a room above"
    return None


def test_a_room_imports_only_rooms_below_it() -> None:
    faults = [fault(module, imported) for module in MODULES for imported in sorted(imports_of(module))]
    assert not list(filter(None, faults))


def test_no_module_is_imported_in_a_circle() -> None:
    graph = {module: imports_of(module) - {module} for module in MODULES if room(module) not in ENTRIES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_package_has_ten_rooms_and_each_introduces_itself() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders - {"configs"} == set(ROOMS)
    for name in ROOMS:
        docstring = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8")))
        assert docstring is not None, f"{name}/__init__.py has no docstring"
        named = docstring.partition("Read first:")[2].split()
        assert named, f"{name}/__init__.py does not say which file to read first"
        assert (PACKAGE / name / named[0].strip("`,.;").removesuffix(".py")).with_suffix(".py").is_file(), named[0]


@pytest.mark.parametrize(
    ("importer", "source", "allowed"),
    [
        ("model.block", "from videoadapt.training.train import train", False),
        ("model.block", "import videoadapt.data.video.readers", False),
        ("model.block", "def f():\n    from videoadapt.commands import cli", False),
        ("model.block", "from ..training.train import train", False),
        ("model.block", "from .norm import LengthNorm\nfrom videoadapt.config.points import Point", True),
        ("model.block", "from videoadapt.errors import UserError", True),
        ("routing.policy", "from videoadapt.evaluation.evaluate import evaluate", False),
        ("evaluation.evaluate", "from videoadapt.routing.policy import Fixed", True),
        ("commands.cli", "from videoadapt.utils import helper", False),
        ("commands.cli", "from videoadapt import TimeSformer", False),
        ("commands.cli", "import torch", True),
    ],
)
def test_the_rules_catch_what_they_should(importer: str, source: str, allowed: bool) -> None:
    module = f"videoadapt.{importer}"
    faults = [fault(module, name) for name in imports(source, module)]
    assert not any(faults) == allowed


def test_a_circle_would_be_found() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
