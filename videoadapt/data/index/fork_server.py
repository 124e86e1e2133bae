"""Worker processes of a fork server that do not run the caller's script again.

multiprocessing imports the main module of the caller in every worker it starts. A script without
`if __name__ == "__main__":` would then start its work again in each of them. The functions that our workers call are
in importable modules, so they do not need it.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import spawn
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from typing import Any

_patching = threading.Lock()


def fork_server(function: Callable[..., object], preload: Sequence[str]) -> BaseContext:
    """Returns a context whose processes call a function.

    Not `fork`: the calling process may have threads (of torch, pyarrow and a pool). If a thread holds a lock, the lock
    stays locked for ever in a forked process.

    Args:
        function: The function. The main module is imported only if the function is in it.
        preload: Modules that the fork server imports once, so that its processes start with them.
    """
    while isinstance(function, partial):
        function = function.func
    context: BaseContext
    in_main = getattr(function, "__module__", None) == "__main__"
    context = multiprocessing.get_context("forkserver") if in_main else _ContextWithoutMain()
    context.set_forkserver_preload(list(preload))
    return context


class _ProcessWithoutMain(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 - the name in multiprocessing
        with _main_left_out():
            return ForkServerProcess._Popen(process_obj)


class _ContextWithoutMain(ForkServerContext):
    Process = _ProcessWithoutMain


@contextmanager
def _main_left_out() -> Iterator[None]:
    """Leaves the main module out of what this thread tells a new process. It has no option for that."""
    thread = threading.get_ident()
    with _patching:
        original = spawn.get_preparation_data

        def without_main(name: str) -> dict[str, Any]:
            data = original(name)
            main = {"init_main_from_name", "init_main_from_path"} if threading.get_ident() == thread else set()
            return {key: value for key, value in data.items() if key not in main}

        spawn.get_preparation_data = without_main
        try:
            yield
        finally:
            spawn.get_preparation_data = original
