"""Reads uploaded videos, each in a process of its own, and runs the model on one after the other."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import traceback
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from videoadapt.commands.failure import FAILURES, is_failure
from videoadapt.commands.serve.answer import Answer, answer_html
from videoadapt.data.index.probe_pool import run_alone
from videoadapt.errors import one_line, plural
from videoadapt.evaluation.explain import Explanation, ReadVideo, explain, read_video_alone
from videoadapt.evaluation.predict import Predictor

_LOOK_S = 0.2  # between two looks at what a video waits for
# Imported once by the server of the processes, which then start in milliseconds.
_PRELOADED = ("videoadapt.evaluation.explain",)
_IMPORT_S = 300.0


def start_readers() -> None:
    """Starts the server of the reading processes, so that its imports do not count as the time of the first video."""
    run_alone(os.devnull, os.path.exists, _IMPORT_S, preload=_PRELOADED)


@dataclass(eq=False)
class Upload:
    """A video on its way to an answer."""

    name: str  # of the file on the user's side
    path: Path
    state: Literal["waiting", "reading", "running"] = "waiting"


class VideoQueue:
    """The videos that are received, read or run. All methods but `close` belong to one event loop.

    Args:
        predictor: The model, its policy and their settings.
        folder: Receives the uploads.
    """

    def __init__(self, predictor: Predictor, folder: Path) -> None:
        self.folder, self._predictor = folder, predictor
        self._settings = predictor.config.serve
        self._readers = ThreadPoolExecutor(self._settings.readers, "read")
        self._model = ThreadPoolExecutor(1, "model")  # one video at a time: the times are those of a machine at rest
        self._uploads: list[Upload] = []
        self._stop, self._stopper = multiprocessing.Pipe(duplex=False)

    def __len__(self) -> int:
        return len(self._uploads)

    def add(self, name: str, path: Path) -> Upload:
        """Takes a place in the queue for a file that may still be incomplete. `remove` or `answer` gives it back."""
        self._uploads.append(upload := Upload(name, path))
        return upload

    def remove(self, upload: Upload) -> None:
        """Removes a video and its file. A second call does nothing."""
        upload.path.unlink(missing_ok=True)
        if upload in self._uploads:
            self._uploads.remove(upload)

    def answer(self, upload: Upload) -> AsyncIterator[Answer]:
        """Starts on a complete file. Its answer is worked out, and the file removed, even if nobody iterates.

        Yields:
            What the video waits for, whenever that changes; last, the answer or the refusal.
        """
        return self._follow(upload, asyncio.create_task(self._work(upload)))

    def close(self) -> None:
        """Ends reading at once, and running after the present pass of the model. A second call does nothing."""
        self._stopper.close()
        for pool in (self._readers, self._model):
            pool.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, upload: Upload, task: asyncio.Task[Answer]) -> AsyncIterator[Answer]:
        said = None
        try:
            while not task.done():
                if (now := self._progress(upload)) != said:
                    yield now
                    said = now
                await asyncio.wait({task}, timeout=_LOOK_S)
            yield task.result()
        finally:
            task.cancel()  # the user has closed the page; without effect on a finished task

    def _progress(self, upload: Upload) -> Answer:
        before = self._uploads.index(upload) if upload in self._uploads else 0
        texts = {
            "waiting": f"waiting for {plural(before, 'video')} before it" if before else "waiting",
            "reading": "reading the video",
            "running": "running every point",
        }
        return Answer("progress", texts[upload.state])

    async def _work(self, upload: Upload) -> Answer:
        loop = asyncio.get_running_loop()
        try:
            video = await loop.run_in_executor(self._readers, self._read, upload)
            upload.path.unlink(missing_ok=True)  # not needed any more, while the video waits for the model
            if isinstance(video, str):
                return Answer("refused", one_line(video))
            explanation = await loop.run_in_executor(self._model, self._explain, upload, video)
            return Answer("done", answer_html(explanation, video, self._predictor))
        except FAILURES as error:
            if not is_failure(error):
                return _own_fault(error)
            return Answer("refused", one_line(error))
        except Exception as error:
            return _own_fault(error)
        finally:
            self.remove(upload)

    def _read(self, upload: Upload) -> ReadVideo | str:
        upload.state = "reading"
        thumbnails = self._predictor.policy.assigner is not None
        function = partial(read_video_alone, config=self._predictor.config, thumbnails=thumbnails)
        path, timeout_s = str(upload.path), self._settings.timeout_s
        video = run_alone(path, function, timeout_s, preload=_PRELOADED, stop=self._stop)
        if not isinstance(video, str):
            upload.state = "waiting"
        return video

    def _explain(self, upload: Upload, video: ReadVideo) -> Explanation:
        upload.state = "running"
        return explain(self._predictor, upload.name, video)


def _own_fault(error: Exception) -> Answer:
    traceback.print_exception(error)
    return Answer("refused", f"an error of the program ({type(error).__name__}); the terminal shows its traceback")
