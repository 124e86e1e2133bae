"""Videos on their way to the router: a thread reads them ahead, and copies them to the device once."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from videoadapt.config.views import view_order
from videoadapt.data.clips.clip_dataset import ClipViews
from videoadapt.data.clips.datasets import Failure, VideoViews
from videoadapt.errors import UserError, VideoError

Item: TypeAlias = "Tensor | ClipViews | VideoViews | Failure | VideoError"

_CLIP, _CROPS, _VIDEO = 4, 5, 6  # dimensions of one view, of the crops of a clip, and of the clips of a video


@dataclass
class Arrival:
    """An item that has arrived.

    Attributes:
        item: The item as it was given.
        views: uint8 `(K, X, C, T, S, S)` on the device; None for a video that could not be read.
        thumbnails: uint8 `(K, C, A, s, s)` on the device.
        at_s: When it arrived.
        copied: The end of its copy to a GPU.
        units: How many units of the policy it has: clips, or 1.
    """

    item: Any
    views: Tensor | None
    thumbnails: Tensor | None
    at_s: float
    copied: torch.cuda.Event | None = None
    units: int = 0

    @property
    def size(self) -> int:
        """Number of views, 1 for a video that could not be read."""
        return 1 if self.views is None else self.views.shape[0] * self.views.shape[1]

    def of_units(self, *, videos: bool) -> list[Sequence[Tensor]]:
        """Returns the views of each clip, or those of the video in the order in which they run."""
        assert self.views is not None, "a video that could not be read has no units"
        clips, crops = self.views.shape[:2]
        if videos:
            flat = self.views.flatten(0, 1)  # (K X, C, T, S, S)
            self.units = 1
            return [[flat[number] for number in view_order(clips, crops)]]
        self.units = clips
        return [list(clip) for clip in self.views]

    def wait(self) -> None:
        """Lets the current stream of the GPU wait for the copy, and keeps the memory while that stream uses it."""
        if self.copied is None or self.views is None:
            return
        stream = torch.cuda.current_stream(self.views.device)
        stream.wait_event(self.copied)
        for tensor in (self.views, self.thumbnails):
            if tensor is not None:
                tensor.record_stream(stream)


def tensors_of(item: Item, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None] | None:
    """Returns views `(K, X, C, T, S, S)` and thumbnails of an item; None for a video that could not be read.

    Args:
        item: The item.
        shape: Shape of a view of the model, `(C, T, S, S)`.

    Raises:
        UserError: The item is something else, or does not fit the model.
    """
    if isinstance(item, Failure | VideoError):
        return None
    views = item if isinstance(item, Tensor) else getattr(item, "views", None)
    if not isinstance(views, Tensor):
        raise UserError(f"Router: expected tensors, or items with `views`, got {type(item).__name__}")
    if views.dtype != torch.uint8 or tuple(views.shape[-4:]) != shape or not _CLIP <= views.ndim <= _VIDEO:
        raise UserError(
            f"Router: expected uint8 views {shape}, with clips and crops in front, got {views.dtype} "
            f"{tuple(views.shape)}"
        )
    for _ in range(_VIDEO - views.ndim):
        views = views[None]
    thumbnails, right = getattr(item, "thumbnails", None), getattr(item, "right", None)
    for name, each in (("thumbnails", thumbnails), ("right", right)):
        if each is not None and len(each) != len(views):
            raise UserError(f"Router: expected `{name}` of each of the {len(views)} clips of an item, got {len(each)}")
    return views, thumbnails


class Arrivals:
    """The items of a source in order, with their tensors on the device.

    Args:
        source: The items.
        shape: Shape of a view of the model.
        device: The device of the model.
        ahead: Views of the items that wait, at most one item more.
        threaded: Read in a thread of its own, so that decoding and copies overlap with the model. Otherwise an item is
            read when it is asked for.
        thumbnails: Whether thumbnails are needed.
        copying: A context around each copy to the device.
    """

    def __init__(  # noqa: PLR0913 - settings, by name
        self,
        source: Iterable[Item],
        *,
        shape: tuple[int, ...],
        device: torch.device,
        ahead: int,
        threaded: bool,
        thumbnails: bool,
        copying: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._shape, self._device, self._thumbnails = shape, device, thumbnails
        self._ahead, self._copying = ahead, copying
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: deque[Arrival] = deque()
        self._waiting = 0  # views of them
        self._changed = threading.Condition()
        self._ended = self._closed = False
        self._error: BaseException | None = None
        self._items = iter(source)
        self._threaded = threaded
        if threaded:
            # The first item in the calling thread: worker processes then fork while no other thread holds a lock.
            first = list(itertools.islice(self._items, 1))
            threading.Thread(target=self._read, args=(first,), name="videoadapt-source", daemon=True).start()

    def take(self, most: int, *, least: int, until_s: float) -> list[Arrival]:
        """Removes and returns items in order.

        Args:
            most: Views of the items; the last item may exceed it.
            least: Waits until the items that have arrived have so many views, or the source has ended.
            until_s: Waits no longer than to this time of `time.perf_counter`, and then returns nothing.

        Returns:
            The items; none after the last one, where `raise_error` tells whether the source ended with an error.
        """
        if not self._threaded:
            self._read_now(most)
            return self._taken(most)
        with self._changed:
            while self._waiting < min(least, self._ahead) and not self._ended:
                left_s = until_s - time.perf_counter()
                if left_s <= 0:
                    return []
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
            taken = self._taken(most)
            self._changed.notify_all()
            return taken

    def _taken(self, most: int) -> list[Arrival]:
        taken: list[Arrival] = []
        views = 0
        while self._arrived and views < most:
            taken.append(self._arrived.popleft())
            views += taken[-1].size
        self._waiting -= views
        return taken

    def _append(self, arrival: Arrival) -> None:
        self._arrived.append(arrival)
        self._waiting += arrival.size

    @property
    def ended(self) -> bool:
        """Whether no item will follow."""
        return self._ended and not self._arrived

    def raise_error(self) -> None:
        """Raises what reading the source has raised, if it ended so."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Lets the thread end after the item that it is reading."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _read_now(self, most: int) -> None:
        """Reads the source in the calling thread, until `most` views wait."""
        try:
            for item in self._items:
                self._append(self._arrival(item))
                if self._waiting >= most:
                    return
        except Exception as error:  # noqa: BLE001 - raised again after the results of the items before
            self._error = error
        self._ended = True

    def _read(self, first: list[Item]) -> None:
        """Reads the source in the thread, until `ahead` views wait."""
        try:
            for item in itertools.chain(first, self._items):
                arrival = self._arrival(item)
                with self._changed:
                    self._append(arrival)
                    self._changed.notify_all()
                    while self._waiting >= self._ahead and not self._closed:
                        self._changed.wait()
                if self._closed:
                    break
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that takes the items, after them
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _arrival(self, item: Item) -> Arrival:
        at_s = time.perf_counter()
        tensors = tensors_of(item, self._shape)
        if tensors is None:
            return Arrival(item, None, None, at_s)
        views, thumbnails = tensors
        wanted = thumbnails if self._thumbnails else None
        if self._stream is None:
            return Arrival(item, views.to(self._device), wanted, at_s)
        with torch.cuda.stream(self._stream), self._copying():
            on_device = [None if part is None else _copied(part, self._device) for part in (views, wanted)]
            return Arrival(item, on_device[0], on_device[1], at_s, self._stream.record_event())


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """Starts a copy to the GPU; from page-locked memory the host need not wait for it."""
    return tensor if tensor.is_cuda else tensor.pin_memory().to(device, non_blocking=True)
