"""A room of the package imports only rooms below it, and imports have no circles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "videoadapt"
ROOMS = (  # from the lowest to the highest
    "config",
    "runtime",
    "model",
    "data",
    "training",
    "routing",
    "evaluation",
    "exporting",
    "reporting",
    "performance",
    "commands",
)
FOUNDATION = {"errors"}  # all rooms may import it; it imports no room
ENTRIES = {"__init__", "__main__"}  # the lazy public API and `python -m videoadapt` may import all rooms


def module_name(path: Path) -> str:
    """Returns `videoadapt.model.block` for `model/block.py`, `videoadapt.model.weights` for its `__init__.py`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Yields the modules of the package that `source` imports, at its head or inside functions."""
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
                name = name.rpartition(".")[0]  # noqa: PLW2901 - a name inside a module stands for the module
            if name.split(".")[0] == "videoadapt":
                yield name


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return set(imports(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py"))


def room(module: str) -> str:
    """Returns the room (or the file at the top) of a module; `__init__` for the package itself."""
    return module.split(".")[1] if "." in module else "__init__"


def violation(importer: str, imported: str) -> str | None:
    """Returns why one module must not import another, or None if it may."""
    above, below = room(importer), room(imported)
    if above in ENTRIES or above == below or below in FOUNDATION:
        return None
    if above not in ROOMS or below not in ROOMS:
        return f"{importer} imports {imported}: only rooms import, and only from rooms and videoadapt.errors"
    if ROOMS.index(below) > ROOMS.index(above):
        return f"{importer} imports {imported} of a higher room"
    return None


def test_a_room_imports_only_rooms_below_it() -> None:
    violations = [violation(module, imported) for module in MODULES for imported in sorted(imports_of(module))]
    assert not list(filter(None, violations))


def test_no_module_is_imported_in_a_circle() -> None:
    graph = {module: imports_of(module) - {module} for module in MODULES if room(module) not in ENTRIES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_package_has_these_rooms_and_each_introduces_itself() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders - {"configs"} == set(ROOMS)
    for name in ROOMS:
        docstring = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8")))
        assert docstring is not None, f"{name}/__init__.py has no docstring"
        named = docstring.partition("Read first:")[2].split()
        assert named, f"{name}/__init__.py does not name the file to read first"
        assert (PACKAGE / name / named[0].strip("`,.;").removesuffix(".py")).with_suffix(".py").is_file(), named[0]


def test_each_folder_names_its_modules() -> None:
    for init in PACKAGE.glob("*/**/__init__.py"):
        names = {path.stem for path in init.parent.glob("*.py")} - ENTRIES
        docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
        assert not names - set(re.findall(r"\w+", docstring)), init


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
def test_the_rules_find_imports_that_are_not_allowed(importer: str, source: str, allowed: bool) -> None:
    module = f"videoadapt.{importer}"
    violations = [violation(module, name) for name in imports(source, module)]
    assert not any(violations) == allowed


def test_a_circle_is_found() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
