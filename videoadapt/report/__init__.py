"""The page of a run, or of several (`page.py`, with the template in `template/`), and the figures (`plots.py`).

May use every room below it, from `evaluation` down.
Read first: `page.py`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """`va.report` is the verb and this room: Python gives both the same name, so calling the room is the verb."""

    def __call__(self, *runs: Any) -> Any:
        return importlib.import_module(f"{__name__}.page").report(*runs)


sys.modules[__name__].__class__ = _Room
