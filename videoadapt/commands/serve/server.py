"""Starts and ends the local page of a run."""

from __future__ import annotations

import atexit
import fcntl
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from videoadapt.config.load import Config, ConfigSource, as_config
from videoadapt.errors import RunError, UserError
from videoadapt.evaluation.explain import warm_up
from videoadapt.evaluation.predict import Predictor, load_predictor
from videoadapt.routing.policy import Policy
from videoadapt.runtime.console import progress_shown, say

if TYPE_CHECKING:
    from typing_extensions import Self  # of `typing` since Python 3.11

ADDRESS = "127.0.0.1"  # never another one: whoever reaches the page may have this account decode files
_FOLDER = "videoadapt-serve-"  # of the uploads, below the folder for temporary files
_LOCK = "lock"  # a file in it that the running page holds
_START_S, _END_S = 30.0, 5.0


class PageServer:
    """A running page. It ends with `close`, with its `with` block, or with the process, and removes what it stored.

    Attributes:
        url: The address with its key. Without the key, other accounts of this machine could use the page.
    """

    def __init__(self, predictor: Predictor, listener: socket.socket) -> None:
        import uvicorn

        from videoadapt.commands.serve.app import make_app
        from videoadapt.commands.serve.queue import VideoQueue

        port, key = listener.getsockname()[1], secrets.token_urlsafe(16)
        self.url = f"http://{ADDRESS}:{port}/?key={key}"
        self.folder, self._lock = _new_folder()
        atexit.register(self.close)
        self._queue = VideoQueue(predictor, self.folder)
        settings = uvicorn.Config(
            make_app(predictor, self._queue, key, port),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(settings)
        # In a thread, because the main thread of a notebook has an event loop already.
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        self._wait_for_start()

    def _wait_for_start(self) -> None:
        for _ in range(int(_START_S / 0.02)):
            if self._server.started:
                return
            self._thread.join(0.02)
        self.close()
        raise RunError(f"serve: the page did not start within {_START_S:g} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PageServer {self.url}>"

    def wait(self) -> None:
        """Waits for Ctrl-C or SIGTERM, or until the page has ended."""
        with _terminated() as ended, suppress(KeyboardInterrupt):
            while self._thread.is_alive() and not ended.wait(0.5):
                pass

    def close(self) -> None:
        """Ends the page, and removes uploads and folders. A second call does nothing."""
        self._queue.close()
        self._server.should_exit = True
        self._thread.join(_END_S)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        atexit.unregister(self.close)


def serve(
    config: ConfigSource, policy: str | Policy | None = None, *, block: bool = True, progress: bool = True
) -> PageServer:
    """Serves a local page: drop in a video, see the chosen point, why, and the answer, cost and time of every point.

    Only this machine can reach the page, and only who knows its address, which has a key. An upload is removed as soon
    as it is read. The page asks no other host, and works without a network.

    Args:
        config: A `Config`, a YAML file, or a run folder. Its section `serve` has the limits.
        policy: As in `predict`.
        block: Wait for Ctrl-C or SIGTERM. False: return at once; the page ends with `close` or with the process.
        progress: Show the address, and messages.

    Returns:
        The page. It has ended if `block` is set.

    Raises:
        UserError: The extra `serve` is not installed, the port is in use, or as in `predict`.
        CheckpointError: The run has no model, or its assigner does not fit it.
    """
    loaded = as_config(config)
    _require_packages()
    with progress_shown(progress):
        listener = _listen(loaded.serve.port)  # before the model is loaded, which takes seconds
        say(f"serve: port {listener.getsockname()[1]} is free; loading the model of {loaded.run.dir}")
        try:
            server = _start(loaded, policy, listener)
        except BaseException:
            listener.close()
            raise
        say(f"serve: {server.url}")
        if block:
            say("the page is open to this machine alone; Ctrl-C ends it, and removes what it stored")
            with server:
                server.wait()
    return server


def _start(config: Config, policy: str | Policy | None, listener: socket.socket) -> PageServer:
    from videoadapt.commands.serve.queue import start_readers

    with ThreadPoolExecutor(1) as pool:  # both take seconds
        readers = pool.submit(start_readers)
        predictor = load_predictor(config, policy, top=1)
        say(f"serve: policy {predictor.policy.name}; first passes of the model")
        warm_up(predictor)
        readers.result()
    return PageServer(predictor, listener)


def _require_packages() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serve: {error.name} is not installed; run pip install 'videoadapt[serve]'") from None


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a page that has just ended
    try:
        listener.bind((ADDRESS, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(
            f"serve.port: {port} cannot be used ({error.strerror}); take another, or serve.port=0 for any free one"
        ) from None
    return listener


def _new_folder() -> tuple[Path, int]:
    """Returns a new folder that only this account can read, and its locked file; removes those of killed pages."""
    for abandoned in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        with suppress(OSError):  # in use, or of another account
            handle = os.open(abandoned / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(abandoned)
            finally:
                os.close(handle)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return folder, handle


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets, in the main thread."""
    ended = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield ended
        return
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        yield ended
    finally:
        signal.signal(signal.SIGTERM, before)
