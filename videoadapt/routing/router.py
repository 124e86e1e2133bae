"""The router: the one way by which clips meet points. Clips of one point share batches, results keep their order."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from videoadapt.config.cascade import Measure
from videoadapt.config.sections import Average
from videoadapt.data.clips.clip_dataset import ClipViews
from videoadapt.data.clips.datasets import Failure
from videoadapt.data.clips.views import pixel_draws, preprocess
from videoadapt.errors import UserError, VideoError
from videoadapt.model.batches import Batch, batch_sizes
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.arrivals import Arrival, Arrivals, Item
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.decide import Decision, Request, rounds
from videoadapt.routing.label_rules import Bools, Choice, Floats, average_views, confidences, running_answers
from videoadapt.routing.policy import Evidence, Policy, Unit
from videoadapt.routing.queues import Queues
from videoadapt.routing.stage_clock import Stage, StageClock

_WINDOW = 8  # batches of views inside, so that a rare point can fill its batch
_WINDOW_BYTES = 2**30  # of these views, if they are more than two batches
_FLYING = 2  # passes that a GPU has before it: while it runs one, the host prepares the next

Answers = list[Mapping[Measure, Floats]]


@dataclass(frozen=True)
class Routed:
    """The results of units: of clips with X crops each, or of videos, by `Policy.unit`.

    Attributes:
        decision: The steps of each unit.
        logits: Logits of each unit's views at its last point, float32 `(units, views, classes)`. The views of a video
            lie in the order in which they run (`config.views.view_order`). The first `decision.stops` views are the
            answer; the others did not run at this point, and are NaN or left from an earlier mean.
    """

    decision: Decision
    logits: Floats

    @property
    def choice(self) -> Choice:
        """Number of the point where each unit ends, `(units,)`."""
        return self.decision.points


@dataclass(frozen=True)
class RoutedVideo(Routed):
    """The results of one item.

    Attributes:
        item: The item as it was given.
        by_point: Logits at the points that ran, by number of the point, `(units, views, classes)`; NaN where a view did
            not run.
        assigned: The assigner's probabilities, `(clips, points)`; None without an assigner.
    """

    item: Any
    by_point: Mapping[int, Floats]
    assigned: Floats | None


class Router:
    """Runs each clip at the points that a policy chooses. Clips of one point share batches.

    The assigner runs on many clips at once. Each point has a queue, which runs when it holds a full batch. The results
    are those of running each clip alone, in the order of the clips. A thread reads the source ahead, so that decoding
    and the copies to a GPU overlap with the model. A router has no state between calls.

    Attributes:
        batches: Views of a forward pass, by point.
        clock: Measures the time of each stage, if it is set.

    Args:
        model: The model in eval mode, of any precision and on any device.
        policy: The rule.
        batch: Views of a forward pass: one number, a number for each point, or `auto`: by the size of the point, and
            by the free memory of a GPU.
        max_wait_s: For streams: the longest time from the arrival of a clip to the end of its pass, if no other pass is
            in the way. None: queues wait until they are full, or the source ends.
        average: How the crops of a clip are averaged, for a policy that needs its confidence.

    Raises:
        UserError: The policy does not fit the model, or a batch size is wrong.

    Example:
        >>> router = va.Router(va.load_model("runs/mine"), va.Assigned.load("runs/mine"), max_wait_s=0.05)
        >>> for result in router.stream(va.read_clips("clip.mp4", "runs/mine") for _ in range(3)):
        ...     print(result.choice, result.logits.mean(1).argmax(-1))
    """

    def __init__(
        self,
        model: TimeSformer,
        policy: Policy,
        *,
        batch: Batch = "auto",
        max_wait_s: float | None = None,
        average: Average = "probabilities",
    ) -> None:
        if max_wait_s is not None and not max_wait_s >= 0:
            raise UserError(f"Router: max_wait_s: expected seconds from 0, got {max_wait_s}")
        self.model, self.policy, self.average, self.max_wait_s = model, policy, average, max_wait_s
        self.batches = batch_sizes(model, batch)
        self.device = model.head.weight.device
        self._assigner = None if policy.assigner is None else policy.assigner.for_inference().to(self.device)
        # The host waits for the assigner, so that it must not stand behind the passes that the GPU has before it.
        self._aside = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None
        self._shape = (3, model.config.num_frames, model.config.size, model.config.size)
        self.clock: StageClock | None = None

    def run(
        self,
        clips: Tensor | ClipViews | Iterable[Item],
        *,
        thumbnails: Tensor | None = None,
        right: Bools | None = None,
    ) -> Routed:
        """Runs many clips, whose results fit into memory.

        Args:
            clips: uint8 `(n, X, C, T, S, S)`: X crops of each of n clips, or `(n, K, X, C, T, S, S)`: K clips of each
                of n videos. Or items as for `stream`, or one `ClipViews`.
            thumbnails: uint8 `(n, C, A, s, s)`, with a tensor of clips and a policy that has an assigner.
            right: Whether the model is right on each clip at each point, `(n, points)`, for a policy that needs the
                truth.

        Returns:
            The decisions and logits of all clips, in order.

        Raises:
            UserError: There is no item, an item does not fit the model, or the policy needs what is not given.
            VideoError: An item is a video that could not be read.
        """
        if isinstance(clips, ClipViews):  # a named tuple, whose tensors would be taken for clips
            clips = [clips]
        decisions, logits = [], []  # without the items, whose views may not fit into memory together
        for result in self._results(clips if not isinstance(clips, Tensor) else _split(clips, thumbnails, right), None):
            if not isinstance(result, RoutedVideo):
                raise result if isinstance(result, VideoError) else VideoError(f"{result.path}: {result.cause}")
            decisions.append(result.decision)
            logits.append(result.logits)
        if not decisions:
            raise UserError("Router: no clips were given")
        decision = Decision(
            decisions[0].steps,
            np.concatenate([part.end for part in decisions]),
            np.concatenate([part.ran for part in decisions]),
        )
        return Routed(decision, np.concatenate(logits))

    def stream(self, items: Iterable[Item]) -> Iterator[RoutedVideo | Failure | VideoError]:
        """Yields the result of each item of any source, in order, while it reads the source ahead.

        Memory does not grow with the length of the stream.

        Args:
            items: Views of one video each: a tensor `(C, T, S, S)`, `(X, C, T, S, S)` or `(K, X, C, T, S, S)`, or an
                object with `views` and `thumbnails`, such as `va.read_clips` returns. A `Failure` or `VideoError`
                stands for a video that could not be read.

        Yields:
            A `RoutedVideo` for each item; a `Failure` or `VideoError` unchanged.

        Raises:
            UserError: As in `run`, or the policy needs all clips at once.
            Exception: Whatever reading the source raises, after the results of the items before.
        """
        if "population" in self.policy.needs:
            raise UserError(f"policy {self.policy.name}: its choice depends on all clips; expected Router.run")
        yield from self._results(items, self.max_wait_s)

    def _results(self, items: Iterable[Item], max_wait_s: float | None) -> Iterator[RoutedVideo | Failure | VideoError]:
        in_memory = isinstance(items, list | tuple) and self.device.type == "cpu"  # nothing to decode or to copy
        arrivals = Arrivals(
            items,
            shape=self._shape,
            device=self.device,
            ahead=2 * max(self.batches.values()),
            threaded=not in_memory,
            thumbnails=self.policy.assigner is not None,
            copying=partial(self._timed, "transfer"),
        )
        try:
            yield from _Flow(self, arrivals, max_wait_s).results()
            arrivals.raise_error()
        finally:
            arrivals.close()

    def _timed(self, stage: Stage) -> AbstractContextManager[None]:
        return nullcontext() if self.clock is None else self.clock.of(stage)

    @torch.inference_mode()
    def _pass(self, views: Tensor, point: str) -> Tensor:
        """Runs views `(V, C, T, S, S)` at a point; returns float32 logits `(V, classes)` on the device."""
        with self._timed("preprocess"):
            clips = preprocess(self.model, views, point)
        with self._timed("model"):
            logits: Tensor = self.model(clips, point).float()
        return logits

    def _assigned(self, arrivals: Sequence[Arrival]) -> Floats | None:
        """Returns the assigner's probabilities of the clips of several videos, `(clips, points)`."""
        if self._assigner is None or not arrivals:
            return None
        given = [arrival.thumbnails for arrival in arrivals if arrival.thumbnails is not None]
        if len(given) < len(arrivals):
            raise UserError(
                f"policy {self.policy.name}: needs the clips' thumbnails; give items with `views` and `thumbnails`, as "
                "`va.read_clips` returns"
            )
        with nullcontext() if self._aside is None else torch.cuda.stream(self._aside):
            for arrival in arrivals:
                arrival.wait()
            with self._timed("assign"):
                return assign_probabilities(self._assigner, torch.cat(given))


def _split(clips: Tensor, thumbnails: Tensor | None, right: Bools | None) -> list[ClipViews]:
    """Splits tensors of n clips into n items, without copies."""
    return [
        ClipViews(
            clip[None] if clip.ndim < 6 else clip,  # noqa: PLR2004 - (X, C, T, S, S) is one clip
            None if thumbnails is None else thumbnails[n : n + 1],
            None if right is None else right[n : n + 1],
        )
        for n, clip in enumerate(clips)
    ]


@dataclass
class _Group:
    """Items that are decided together."""

    arrivals: list[Arrival]
    units: list[Sequence[Tensor]]  # the views of each unit on the device, (C, T, S, S) each
    classes: int
    assigned: Floats | None
    decisions: Generator[list[Request], Sequence[Mapping[Measure, Floats]], Decision]
    requests: list[Request] = field(default_factory=list)  # of this round
    answers: dict[int, Floats] = field(default_factory=dict)  # logits by point, (units, views, classes)
    missing: int = 0  # views of this round that have no answer
    decision: Decision | None = None  # the end

    @property
    def ended(self) -> bool:
        """Whether all results are known; always, if none of the videos could be read."""
        return self.decision is not None or all(arrival.views is None for arrival in self.arrivals)

    def expect(self, point: int) -> None:
        """Makes the array for the logits of all units at a point; NaN where nothing runs."""
        if point not in self.answers:
            shape = (len(self.units), len(self.units[0]), self.classes)
            self.answers[point] = np.full(shape, np.nan, np.float32)

    def results(self) -> Iterator[RoutedVideo | Failure | VideoError]:
        """Yields the results of the items, in order."""
        first = 0
        for arrival in self.arrivals:
            if arrival.views is None or self.decision is None:
                yield arrival.item
                continue
            some = slice(first, first + arrival.units)
            first = some.stop
            decision = replace(self.decision, end=self.decision.end[some], ran=self.decision.ran[some])
            by_point = {point: logits[some] for point, logits in self.answers.items()}
            logits = np.stack([by_point[point][unit] for unit, point in enumerate(decision.points.tolist())])
            assigned = None if self.assigned is None else self.assigned[some]
            yield RoutedVideo(decision, logits, arrival.item, by_point, assigned)


@dataclass(frozen=True)
class _View:
    """A view that waits for its point."""

    group: _Group
    unit: int
    view: int


@dataclass(frozen=True)
class _Flying:
    """A pass that a GPU may not have finished."""

    point: int
    views: list[_View]
    logits: Tensor  # (V, classes), on the host as soon as `done` is
    begun_s: float
    done: torch.cuda.Event | None


class _Flow:
    """One call of a router: items come in, wait in queues, run, and leave in order."""

    def __init__(
        self,
        router: Router,
        arrivals: Arrivals,
        max_wait_s: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._router, self._arrivals, self._clock = router, arrivals, clock
        self._points = router.model.config.points
        sizes = {number: router.batches[point] for number, point in enumerate(self._points)}
        self._queues: Queues[_View] = Queues(sizes, max_wait_s)
        self._groups: deque[_Group] = deque()  # in order
        self._flying: deque[_Flying] = deque()
        self._inside = 0  # views in `_groups`
        self._counts: set[int] = set()  # views of a unit: one number
        self._most = max(sizes.values())
        self._window = _WINDOW * self._most

    def results(self) -> Iterator[RoutedVideo | Failure | VideoError]:
        """Yields the results in order until the source has ended and all queues are empty."""
        while True:
            while self._groups and self._groups[0].ended:
                group = self._groups.popleft()
                self._inside -= sum(arrival.size for arrival in group.arrivals)
                yield from group.results()
            point = self._queues.full()
            if point is None:
                point = self._queues.due(self._clock())
            if point is not None:
                self._start(point)
            elif not (self._arrivals.ended or self._inside >= self._window):
                self._admit()
            elif self._flying:
                self._land()
            elif self._groups:
                self._start(self._waited_for())
            else:
                return

    def _waited_for(self) -> int:
        """Returns the point to run with less than a batch, because no view will come to fill it."""
        waiting = self._queues.waiting
        if not self._arrivals.ended:  # results leave in order, so all groups wait for the oldest
            waiting &= {request.step.point for request in self._groups[0].requests}
        # The cheapest point: in a cascade, what goes on from there shares the batch of a dearer point.
        return max(waiting)

    def _admit(self) -> None:
        """Takes items that have arrived and decides their first points. Waits for items if nothing else is to do."""
        patient = self._queues.max_wait_s is None
        taken = self._arrivals.take(
            self._most,
            least=self._most if patient else 1,
            until_s=self._clock() if self._flying else self._queues.next_due_s(),
        )
        if "population" in self._router.policy.needs:
            while not self._arrivals.ended:
                taken += self._arrivals.take(self._most, least=1, until_s=math.inf)
        if taken:
            self._groups.append(self._group(taken))
            if not self._groups[-1].ended:
                self._advance(self._groups[-1])
        elif self._flying:
            self._land()

    def _group(self, arrivals: list[Arrival]) -> _Group:
        read = [arrival for arrival in arrivals if arrival.views is not None]
        for arrival in read:
            arrival.wait()
        router, videos = self._router, self._router.policy.unit == "video"
        units = [unit for arrival in read for unit in arrival.of_units(videos=videos)]
        # The same in all groups, so that it does not depend on the batches whether a stream is refused.
        self._counts |= {len(unit) for unit in units}
        if len(self._counts) > 1:
            raise UserError(f"Router: expected the same number of views in every item, got {sorted(self._counts)}")
        assigned = router._assigned(read)
        draws = _draws(read) if "pixels" in router.policy.needs else None
        count = len(units[0]) if units else 1
        evidence = Evidence(len(units), self._points, assigned, _right(read), views=count, draws=draws)
        self._inside += sum(arrival.size for arrival in arrivals)
        if units:
            self._window = max(2 * self._most, min(self._window, _WINDOW_BYTES // units[0][0].numel()))
        return _Group(arrivals, units, router.model.config.num_classes, assigned, rounds(router.policy, evidence))

    def _advance(self, group: _Group, answers: Answers | None = None) -> None:
        """Begins the next round of a group, or ends it."""
        try:
            # A generator that has not begun takes nothing but None.
            group.requests = group.decisions.send(cast(Answers, answers))
        except StopIteration as stopped:
            group.decision = stopped.value
            group.units.clear()
            return
        for rows, (point, first, end) in group.requests:
            group.expect(point)
            group.missing += len(rows) * (end - first)
            for unit in rows.tolist():
                for view in range(first, end):
                    self._queues.add(point, _View(group, unit, view), group.arrivals[0].at_s)

    def _start(self, point: int) -> None:
        """Starts a pass of the views that wait for a point, at most a batch."""
        if len(self._flying) == _FLYING:
            self._land()
        waiting, begun_s = self._queues.take(point), self._clock()
        views = _stacked([view.group.units[view.unit][view.view] for view in waiting])  # (V, C, T, S, S)
        logits = self._router._pass(views, self._points[point])
        done = None
        if logits.is_cuda:
            logits = logits.to("cpu", non_blocking=True)
            done = torch.cuda.current_stream(self._router.device).record_event()
        self._flying.append(_Flying(point, waiting, logits, begun_s, done))
        if done is None:
            self._land()

    def _land(self) -> None:
        """Takes the answers of the oldest pass, and goes on with the groups whose round is complete."""
        flying = self._flying.popleft()
        if flying.done is not None:
            flying.done.synchronize()
        self._queues.passed(flying.point, self._clock() - flying.begun_s)
        complete = []
        for view, logits in zip(flying.views, flying.logits.numpy(), strict=True):
            group = view.group
            group.answers[flying.point][view.unit, view.view] = logits
            group.missing -= 1
            if not group.missing:
                complete.append(group)
        for group in complete:
            self._advance(group, [self._confidences(group, request) for request in group.requests])

    def _confidences(self, group: _Group, request: Request) -> Mapping[Measure, Floats]:
        if "confidence" not in self._router.policy.needs:
            return {}
        logits = group.answers[request.step.point][request.rows, : request.step.stop]  # (rows, views, classes)
        return confidences(unit_probabilities(logits, self._router.policy.unit, self._router.average))


def _stacked(views: Sequence[Tensor]) -> Tensor:
    if views[0].is_cuda:
        return torch.stack(list(views))
    # torch copies uint8 tensors one by one with all its threads, which takes longer than the copies.
    return torch.from_numpy(np.stack([view.numpy() for view in views]))


def _draws(arrivals: Sequence[Arrival]) -> Floats:
    return np.concatenate([np.empty(0), *(pixel_draws(each.views) for each in arrivals if each.views is not None)])


def _right(arrivals: Sequence[Arrival]) -> Bools | None:
    given = [getattr(arrival.item, "right", None) for arrival in arrivals]
    known = [part for part in given if part is not None]
    return np.concatenate(known) if known and len(known) == len(given) else None


def unit_probabilities(logits: Floats, unit: Unit, average: Average) -> Floats:
    """Returns the probabilities of units from the views that have run: `(units, views, classes)` to `(units, classes)`.

    In float64. Stored and fresh logits pass through the same functions, so that equal logits give equal confidences.
    """
    return average_views(logits, 1, average) if unit == "clip" else running_answers(logits, average)[:, -1]


def assign_probabilities(assigner: Assigner, thumbnails: Tensor) -> Floats:
    """Returns the assigner's label probabilities, float64 `(clips, points)`.

    Args:
        assigner: The assigner, in eval mode and on any device.
        thumbnails: uint8 `(clips, C, A, s, s)`, A frames of each clip.
    """
    return assigner.probabilities(thumbnails.to(assigner.head.weight.device)).cpu().double().numpy()
