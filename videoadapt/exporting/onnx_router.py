#!/usr/bin/env python3
"""Routes clips through exported points with onnxruntime and numpy alone: no torch, no videoadapt.

`videoadapt export` writes this file beside the ONNX files. It can be copied with them, and needs Python 3.10,
`pip install numpy onnxruntime`, and nothing else.

    from onnx_router import OnnxRouter
    router = OnnxRouter()  # the folder of this file
    numbers = router.frame_numbers(total_frames, fps, times_s)  # (clips, T): which frames of a video to decode
    answer = router.predict(frames[numbers])  # uint8 RGB (clips, T, H, W, 3)
    answer.classes, answer.probabilities, answer.points

or, for frames that are stored with `numpy.save`: `python onnx_router.py FRAMES.npy --policy cascade:7,14:0.6`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

SETTINGS = "routing.json"  # what the router must know of the model, written with the ONNX files
WEIGHTS = "weights.bin"  # of all ONNX files
VERSION = 1
BATCH = 16  # views of one call of onnxruntime
_MEASURES = ("probability", "margin", "entropy")
_MOST_LIKELY = 1 - 1e-6  # a probability of 1 has no odds
_NEVER = 2.0  # a threshold that no confidence reaches
_DECIMALS = 6  # of positions and seconds; far below the distance of two frames
_INT16 = 1 << 15
_MOST_BITS = 22

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Answer:
    """The answer for one video.

    Attributes:
        classes: Names of the best classes, best first.
        probabilities: Their probabilities, means over all views of the video.
        points: The point where each clip ends.
        macs: Multiply-adds of all views at all points that they ran, and of the assigner.
    """

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    points: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Routed:
    """Clips that were routed: the point where each ends, and its logits there.

    Attributes:
        points: The point of each clip, `(clips,)`.
        logits: Float32 `(clips, crops, classes)`.
        macs: Multiply-adds of each clip, `(clips,)`, with the assigner.
    """

    points: tuple[str, ...]
    logits: Floats
    macs: Ints


class OnnxRouter:
    """The exported points, the assigner, and the policy that gives each clip its point.

    Args:
        folder: The folder with `routing.json` and the ONNX files. Default: the folder of this file.
        policy: `assigned[:THRESHOLD]`, `fixed:POINT`, `mixture:POINT,POINT:FRACTION`,
            `cascade:POINT,POINT,...:THRESHOLDS[:MEASURE]` or, where a leap was exported, `leap:POINT:price=NUMBER` from
            the same point, as in videoadapt. None: the one that was exported.
        providers: Execution providers of onnxruntime, such as `["CUDAExecutionProvider", "CPUExecutionProvider"]`.
        options: Session options of onnxruntime, such as the number of threads.

    Raises:
        ValueError: The folder is not complete, or the policy does not fit it.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        policy: str | None = None,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        self.settings = _read_settings(self.folder)
        self.points: tuple[str, ...] = tuple(self.settings["points"])  # costliest first
        self.policy = policy or self.settings["policy"]
        self._next = parse_policy(self.policy, self.settings)
        self.needs_thumbnails = self.policy.partition(":")[0] == "assigned"
        self._providers, self._options = list(providers), options
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}  # loaded at their first use

    def frame_numbers(self, total_frames: int, fps: float, times_s: Floats | None = None) -> Ints:
        """Returns the frames of a video that its clips show, `(clips, T)`.

        Args:
            total_frames: Number of frames of the video.
            fps: Its frames per second.
            times_s: Seconds after the first frame at which each frame is displayed, `(total_frames,)`; None only for
                evenly spaced frames: of a video with a variable frame rate, other frames would be chosen.
        """
        return _frame_numbers(self.settings, total_frames, fps, times_s)

    def views(self, frames: Bytes) -> Bytes:
        """Cuts the crops of a clip: `(T, H, W, 3)` uint8 to `(crops, 3, T, S, S)` uint8."""
        return _crops(frames, self.settings)

    def thumbnail(self, frames: Bytes) -> Bytes:
        """Makes the assigner's input of a clip: `(T, H, W, 3)` uint8 to `(3, A, s, s)` uint8."""
        kept, size = self.settings["assigner"]["frames"], self.settings["assigner"]["size"]
        small = resize(frames[_spread(len(frames), kept)], size, size)  # (A, s, s, 3)
        return np.ascontiguousarray(small.transpose(3, 0, 1, 2))  # (3, A, s, s)

    def predict(self, frames: Bytes, *, top: int = 5, batch: int = BATCH) -> Answer:
        """Predicts the class of one video.

        Args:
            frames: uint8 RGB `(clips, T, H, W, 3)`, or `(T, H, W, 3)` of one clip; see `frame_numbers`.
            top: Number of classes of the answer.
            batch: Views of one call of onnxruntime.

        Raises:
            ValueError: The frames have another shape or type, or the probabilities are NaN.
        """
        clips = frames[None] if frames.ndim == 4 else frames  # noqa: PLR2004 - one clip
        count = self.settings["num_frames"]
        if clips.ndim != 5 or clips.shape[1::3] != (count, 3) or clips.dtype != np.uint8 or not clips.size:  # noqa: PLR2004
            raise ValueError(f"frames: expected uint8 (clips, {count}, H, W, 3), got {frames.dtype} {frames.shape}")
        views = np.stack([self.views(clip) for clip in clips])
        thumbnails = np.stack([self.thumbnail(clip) for clip in clips]) if self.needs_thumbnails else None
        routed = self.run(views, thumbnails, batch=batch)
        probabilities = _mean_of_views(routed.logits, (0, 1), self.settings["average"])  # (classes,)
        if np.isnan(probabilities).any():
            raise ValueError(
                f"the model's probabilities are NaN at {' '.join(routed.points)}, so there is no best class"
            )
        best = (-probabilities).argsort(kind="stable")[:top]
        names = self.settings["classes"]
        return Answer(
            tuple(names[i] for i in best), tuple(float(probabilities[i]) for i in best), routed.points,
            int(routed.macs.sum()),
        )  # fmt: skip

    def run(self, views: Bytes, thumbnails: Bytes | None = None, *, batch: int = BATCH) -> Routed:
        """Runs each clip at the points that the policy chooses; clips of one point share batches.

        Args:
            views: uint8 `(clips, crops, 3, T, S, S)`.
            thumbnails: uint8 `(clips, 3, A, s, s)`, for the policy `assigned`.
            batch: Views of one call of onnxruntime.

        Raises:
            ValueError: The policy needs thumbnails, and there are none.
        """
        clips, crops = views.shape[:2]
        logits = np.zeros((clips, crops, len(self.settings["classes"])), np.float32)
        # NaN where a clip has not run a point
        confidence = np.full((clips, len(self.points), len(_MEASURES)), np.nan)
        macs = np.zeros(clips, np.int64)
        known = _pixel_draws(views)  # what the policy knows before the model runs
        if self.needs_thumbnails:
            if thumbnails is None:
                raise ValueError(f"policy {self.policy}: needs the thumbnails of the clips")
            known = self._call("assigner", thumbnails, batch).astype(np.float64)  # (clips, points)
            macs += self.settings["assigner"]["macs"]
        last, active = np.full(clips, -1), np.arange(clips)
        while len(active):
            following = self._next(last[active], confidence[active], known[active])
            active, following = active[following >= 0], following[following >= 0]
            for number in np.unique(following).tolist():
                rows, point = active[following == number], self.points[number]  # full batches: all clips of a point
                outputs = self._call(point, views[rows].reshape(-1, *views.shape[2:]), batch)
                logits[rows] = outputs.reshape(len(rows), crops, -1)
                probabilities = _mean_of_views(logits[rows], 1, self.settings["average"])
                confidence[rows, number] = _confidences(probabilities)
                macs[rows] += crops * self.settings["macs"][point]
            last[active] = following
        return Routed(tuple(self.points[number] for number in last), logits, macs)

    def _call(self, name: str, inputs: Bytes, batch: int) -> Floats:
        """Runs one graph, a point or the assigner, on uint8 inputs in batches."""
        if name not in self._sessions:
            path = self.folder / self.settings["files"][name]
            self._sessions[name] = onnxruntime.InferenceSession(path, self._options, providers=self._providers)
        session = self._sessions[name]
        key = session.get_inputs()[0].name
        parts = [session.run(None, {key: inputs[i : i + batch]})[0] for i in range(0, len(inputs), batch)]
        return np.concatenate(parts)


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); run `videoadapt export` again") from None
    if not isinstance(settings, dict) or settings.get("version") != VERSION:
        raise ValueError(f"{path}: of another version; use the onnx_router.py that lies beside it")
    missing = [name for name in (*settings["files"].values(), WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder / missing[0]}: is missing; copy the whole folder")
    return settings


# ---- policies: each returns the point that a clip runs next, or -1 at the end

# Of some clips: the last point (-1 before the first), the confidences `(clips, points, measures)`, and what is known
# before the model runs: the assigner's probabilities, or a draw for each clip.
_Next = Callable[[Ints, Floats, Floats], Ints]


def parse_policy(text: str, settings: Mapping[str, Any]) -> _Next:
    """Parses a policy that this router can run.

    Args:
        text: The policy as text; see `OnnxRouter`.
        settings: The contents of `routing.json`.

    Raises:
        ValueError: The text is no such policy, or does not fit the model.
    """
    points, assigner = list(settings["points"]), settings["assigner"]
    kind, _, rest = text.partition(":")
    found: _Next | None = None
    if kind == "fixed" and rest in points:
        found = _once(lambda known: np.full(len(known), points.index(rest)))
    elif kind == "assigned" and assigner and (not rest or len(_fractions(rest)) == 1):
        threshold = float(rest) if rest else assigner["threshold"]
        found = _once(lambda known: _cheapest_sufficient(known, threshold))
    elif kind == "mixture":
        names, _, fraction = rest.partition(":")
        if set(names.split(",")) <= set(points) and names.count(",") == 1 and len(_fractions(fraction)) == 1:
            first, second = map(points.index, names.split(","))
            found = _once(lambda known: np.where(known < float(fraction), second, first))
    elif kind == "cascade":
        found = _parse_cascade(rest, points)
    elif kind == "leap" and settings.get("leap"):
        found = _parse_leap(rest, points, settings["leap"])
    if found is None:
        raise ValueError(
            f"policy {text!r}: expected {'assigned, ' if assigner else ''}fixed:POINT, mixture:POINT,POINT:FRACTION or "
            f"cascade:POINT,POINT,...:THRESHOLDS[:{'|'.join(_MEASURES)}], with points of {', '.join(points)}; a leap "
            "needs the regressions of a leap that was exported (export.policy), from the same point"
        )
    return found


def _once(choose: Callable[[Floats], Ints]) -> _Next:
    """Returns a policy that chooses one point for each clip before the model runs."""
    return lambda last, _, known: np.where(last < 0, choose(known), -1)


def _fractions(text: str, also: float = 1.0) -> list[float]:
    """Returns the numbers of a list with commas, from 0 to 1 or equal to `also`; empty if there is anything else."""
    try:
        values = [float(value) for value in text.split(",")]
    except ValueError:
        return []
    return values if all(0.0 <= value <= 1.0 or value == also for value in values) else []


def _parse_cascade(text: str, points: Sequence[str]) -> _Next | None:
    listed, _, rest = text.partition(":")
    written, _, measure = rest.partition(":")
    names, thresholds = listed.split(","), _fractions(written, _NEVER)
    if len(thresholds) == 1:
        thresholds *= len(names) - 1  # one number applies to every point but the last
    known = set(names) <= set(points) and len(set(names)) == len(names) > 1
    if not known or len(thresholds) != len(names) - 1 or measure not in ("", *_MEASURES):
        return None
    numbers, column = [points.index(name) for name in names], _MEASURES.index(measure or "probability")

    def following(last: Ints, confidence: Floats, _known: Floats) -> Ints:
        chosen = np.where(last < 0, numbers[0], -1)
        for number, after, threshold in zip(numbers, numbers[1:], thresholds, strict=False):
            unsure = ~(confidence[:, number, column] >= threshold)  # NaN is not sure
            chosen = np.where((last == number) & unsure, after, chosen)
        return chosen

    return following


def _parse_leap(text: str, points: Sequence[str], leap: Mapping[str, Any]) -> _Next | None:
    first, _, written = text.partition(":price=")
    try:
        price = float(written)
    except ValueError:
        return None
    if first != leap["first"] or not 0 <= price < math.inf:
        return None
    number, (mean, scale, weights) = points.index(first), (np.array(leap[key]) for key in ("mean", "scale", "weights"))
    further = np.where(np.arange(len(points)) == number, 0.0, leap["costs"])  # the first point is paid for

    def following(last: Ints, confidence: Floats, _known: Floats) -> Ints:
        sure = confidence[:, number]  # (clips, measures)
        likely = np.minimum(sure[:, 0], _MOST_LIKELY)
        features = np.column_stack([sure, np.log(likely / (1 - likely))])
        x = np.column_stack([(features - mean) / scale, np.ones(len(sure))])
        chances = 0.5 * (1 + np.tanh(0.5 * (x @ weights.T)))  # the logistic function, `(clips, points)`
        value = chances - price * further
        best = np.argmax(np.where(np.isnan(value), -np.inf, value), axis=1)  # NaN: the costliest point
        after = np.where((last == number) & (best != number), best, -1)
        return np.where(last < 0, number, after)

    return following


def _pixel_draws(views: Bytes) -> Floats:
    """Returns a number in [0, 1) for each clip, which depends on its pixels alone, `(clips,)`; for mixtures."""
    clips, crops, _, frames, *_ = views.shape
    middle = np.ascontiguousarray(views[:, crops // 2, :, frames // 2])  # (clips, 3, S, S)
    digests = [hashlib.blake2b(image, digest_size=6).digest() for image in middle]
    return np.array([int.from_bytes(digest, "big") / 2**48 for digest in digests])


def _cheapest_sufficient(probabilities: Floats, threshold: float) -> Ints:
    """Returns the cheapest point that suffices with probability `threshold`; sums run from the cheapest point."""
    suffices = np.cumsum(probabilities[:, ::-1], axis=1)[:, ::-1] >= threshold  # (clips, points)
    suffices[:, 0] = True  # the costliest point always suffices
    return suffices.shape[1] - 1 - np.argmax(suffices[:, ::-1], axis=1)


def _softmax(logits: Floats) -> Floats:
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def _mean_of_views(logits: Floats, axis: int | tuple[int, ...], average: str) -> Floats:
    """Returns the probabilities of several views together, in float64; the axes of the views are removed."""
    if average == "logits":
        return _softmax(logits.astype(np.float64).mean(axis))
    means: Floats = _softmax(logits).mean(axis)
    return means


def _confidences(probabilities: Floats) -> Floats:
    """Returns how sure answers are by each measure: `(clips, classes)` to `(clips, measures)`."""
    return np.stack([_confidence(probabilities, measure) for measure in _MEASURES], axis=-1)


def _confidence(probabilities: Floats, measure: str) -> Floats:
    if probabilities.shape[-1] == 1:  # of a single class, every measure is its probability
        return probabilities.max(-1)
    if measure == "margin":
        return np.diff(np.partition(probabilities, -2)[..., -2:])[..., 0]  # the best minus the second
    if measure == "entropy":
        logs = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
        return np.maximum(1 + (probabilities * logs).sum(-1) / np.log(probabilities.shape[-1]), 0.0)
    return probabilities.max(-1)


# ---- which frames, and which pixels of them: as in videoadapt


def _frame_numbers(settings: Mapping[str, Any], total: int, fps: float, times_s: Floats | None) -> Ints:
    frames, clips = settings["num_frames"], settings["temporal_views"]
    if settings["sampling"] == "segments":
        steps = 2 * clips * np.arange(frames)
        positions = np.stack([(steps + 2 * view + 1) * total / (2 * clips * frames) for view in range(clips)])
    else:
        model_fps = settings["fps"] or fps
        span_s = settings["stride_frames"] * frames / model_fps
        latest_s = max(total / fps - span_s, 0.0)
        centred = clips == 1 and settings["single_clip"] == "centre"
        starts = [latest_s / 2 * fps] if centred else [view * latest_s / clips * fps for view in range(clips)]
        length = max(settings["stride_frames"] * frames * (fps / model_fps), 1.0)
        positions = np.stack([np.linspace(start, start + length - 1, frames).round(_DECIMALS) for start in starts])
    if times_s is not None:
        positions = np.searchsorted(times_s.round(_DECIMALS), (positions / fps).round(_DECIMALS), side="right") - 1
    return np.clip(positions, 0, total - 1).astype(np.int64)  # (clips, T)


def _spread(total: int, kept: int) -> Ints:
    """Returns `kept` indices of `range(total)`, both ends included; a single one is the middle."""
    return np.array([total // 2]) if kept == 1 else np.linspace(0, total - 1, kept).round().astype(np.int64)


def _crops(frames: Bytes, settings: Mapping[str, Any]) -> Bytes:
    size, count, short = settings["size"], settings["spatial_crops"], settings["short_side"]
    height, width = frames.shape[1:3]
    scale = short / min(height, width)  # the long side is rounded down, as torchvision does
    tall, wide = (int(short * height / width), short) if height > width else (short, int(short * width / height))
    images = frames if scale == 1 else resize(
        frames, tall, wide, cubic=settings["interpolation"] == "bicubic", antialias=settings["antialias"]
    )  # fmt: skip
    fractions = [0.5] if count == 1 else np.linspace(0.0, 1.0, count).tolist()
    round_up = settings["crop_offset"] == "ceil"
    cut = []
    for fraction in fractions:
        y = _to_pixel((fraction if tall > wide else 0.5) * (tall - size), round_up)
        x = _to_pixel((0.5 if tall > wide else fraction) * (wide - size), round_up)
        cut.append(images[:, y : y + size, x : x + size].transpose(3, 0, 1, 2))  # (T, S, S, C) -> (C, T, S, S)
    return np.stack(cut)


def _to_pixel(position: float, round_up: bool) -> int:
    return math.ceil(round(position, 6)) if round_up else round(position)


def resize(frames: Bytes, height: int, width: int, *, cubic: bool = False, antialias: bool = True) -> Bytes:
    """Resizes frames `(F, H, W, C)` as torch does on CPUs, to the bit with `antialias`.

    With antialiasing, torch sums uint8 pixels with weights of 16 bits, first along rows, then along columns. Without,
    it computes in float32; rounding may then differ by one grey level.
    """
    if antialias:
        return _along(_along(frames, width, 2, cubic), height, 1, cubic)
    rows, columns = (_weights(old, new, cubic, False).astype(np.float32) for old, new in (
        (frames.shape[1], height), (frames.shape[2], width)
    ))  # fmt: skip
    small = np.einsum("yh,fhwc->fywc", rows, frames.astype(np.float32), optimize=True)
    small = np.einsum("xw,fywc->fyxc", columns, small, optimize=True)
    return small.round().clip(0, 255).astype(np.uint8)


def _along(frames: Bytes, new: int, axis: int, cubic: bool) -> Bytes:
    """Resizes one axis in integers, `torch`'s kernel for uint8 (aten/native/cpu/UpSampleKernel.cpp)."""
    if frames.shape[axis] == new:
        return frames
    weights = _weights(frames.shape[axis], new, cubic, True)
    bits = 0  # as many as the largest weight leaves in a signed number of 16 bits
    while bits < _MOST_BITS and int(0.5 + weights.max() * (1 << (bits + 1))) < _INT16:
        bits += 1
    whole = np.trunc(weights * (1 << bits) + np.where(weights < 0, -0.5, 0.5))  # integers, exact in float64
    sums = np.moveaxis(np.tensordot(frames.astype(np.float64), whole, ([axis], [1])), -1, axis)
    return ((sums.astype(np.int64) + (1 << (bits - 1))) >> bits).clip(0, 255).astype(np.uint8)


def _weights(old: int, new: int, cubic: bool, antialias: bool) -> Floats:
    """Returns the weight of each old pixel in each new one, `(new, old)`, float64."""
    scale = old / new
    stretch = max(scale, 1.0) if antialias else 1.0  # antialiasing widens the filter where pixels become fewer
    a = -0.5 if antialias else -0.75  # of the cubic filter: Pillow's, and OpenCV's
    radius = (2.0 if cubic else 1.0) * stretch
    matrix = np.zeros((new, old))
    for i in range(new):
        if antialias:
            centre = scale * (i + 0.5)
            first, end = max(int(centre - radius + 0.5), 0), min(int(centre + radius + 0.5), old)
            taps = np.arange(first, end)
            values = _filter((taps - centre + 0.5) / stretch, cubic, a)
            matrix[i, taps] = values / values.sum()
        else:
            centre = scale * (i + 0.5) - 0.5
            centre = centre if cubic else max(centre, 0.0)
            taps = np.arange(math.floor(centre) - cubic, math.floor(centre) + 2 + cubic)
            np.add.at(matrix[i], taps.clip(0, old - 1), _filter(taps - centre, cubic, a))  # the border repeats
    return matrix


def _filter(x: Floats, cubic: bool, a: float) -> Floats:
    x = np.abs(x)
    if not cubic:
        return np.maximum(1.0 - x, 0.0)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))  # noqa: PLR2004 - the filter's radius


def _read_frames(path: Path) -> Bytes:
    try:
        frames = np.load(path, allow_pickle=False)
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path}: is no file of numpy.save ({error})") from None
    if not isinstance(frames, np.ndarray):
        raise ValueError(f"{path}: has several arrays; expected one, of numpy.save")
    return frames


def main() -> None:
    """Predicts the frames of one video, and prints the answer as JSON."""
    parser = argparse.ArgumentParser(description="Predict one video with onnxruntime.")
    parser.add_argument("frames", type=Path, help="numpy.save of uint8 RGB frames (T, H, W, 3) or (clips, T, H, W, 3)")
    parser.add_argument("--policy", help="assigned, fixed:POINT, cascade:POINTS:THRESHOLDS; see OnnxRouter")
    parser.add_argument("--folder", type=Path, help="folder with routing.json; default: the folder of this file")
    arguments = parser.parse_args()
    try:
        answer = OnnxRouter(arguments.folder, arguments.policy).predict(_read_frames(arguments.frames))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(json.dumps(asdict(answer), indent=2))


if __name__ == "__main__":
    main()
