"""Copies videos so that they decode fast at random positions: `python tools/resize_videos.py SRC DST --short-side 256`.

SRC is a folder or a manifest.parquet. Each of its videos becomes DST/NAME.mp4: rotated as it is displayed, with a
smaller short side, in 8 bits and 4:2:0, with a keyframe at least every `--gop` frames, without sound. A copy has all
frames of its source, at the same times, so that clips of both have the same frames. A source that is not an mp4 changes
its name: annotations that contain the suffix, such as `path label` lists, must name the copies with .mp4; official CSVs
stay valid. A video with a smaller short side keeps its size and is encoded again, so that all files in DST are alike.

The same command resumes where it was stopped, and repeats changed copies: each copy records its source and encoder
settings in its metadata. A file in DST without this record is never overwritten. A copy gets its final name only after
a check that it has all frames of its source. Damaged videos get no copy and are listed in DST/failed.csv. Two processes
must not write the same copy at the same time.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import av
import numpy as np
import typer
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from open_encoder import open_encoder
from videoadapt.data.index.find_files import walk
from videoadapt.data.index.probe_pool import run_on_files
from videoadapt.data.video.decoding import decode, display_times
from videoadapt.data.video.files import reason
from videoadapt.data.video.frame_sampling import frame_indices
from videoadapt.data.video.orientation import UPRIGHT, Orientation
from videoadapt.data.video.probe import VideoInfo, open_container, probe
from videoadapt.data.video.readers import open_video
from videoadapt.data.video.suffixes import is_video
from videoadapt.errors import RunError, UserError, VideoError
from videoadapt.runtime.console import Bar, print_table, say
from videoadapt.runtime.files import replacing

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FAILED = "failed.csv"  # a file in DST
COLUMNS = ("path", "cause")  # of that file
FAILURES_SHOWN = 10  # failures printed on the terminal; the CSV has all
SAMPLE = 20  # files that are read before and after, to measure the gain
_KEY = "comment"  # one of the few metadata keys that mp4 keeps
_UNEVEN_TICK_S = Fraction(1, 90_000)  # unit of the times of frames that are not evenly spaced
_MARK = "videoadapt resize_videos "

# Options that limit an encoder to one thread: the videos are encoded in parallel. x265 would also write its log.
_ENCODER_OPTIONS = {
    "libx264": {"threads": "1"},
    "libx265": {"x265-params": "pools=1:frame-threads=1:log-level=error"},
    "libsvtav1": {"svtav1-params": "lp=1"},
}


@dataclass(frozen=True)
class Encoding:
    """The settings of the copies."""

    short_side: int = 256  # pixels
    codec: str = "libx264"
    gop: int = 12  # largest distance between keyframes, in frames
    crf: int | None = None  # quality; None: the encoder's default
    preset: str | None = None  # effort; None: the encoder's default

    def options(self) -> dict[str, str]:
        """Returns FFmpeg's options of the encoder."""
        given = {"crf": self.crf, "preset": self.preset}
        return _ENCODER_OPTIONS.get(self.codec, {}) | {
            key: str(value) for key, value in given.items() if value is not None
        }


@dataclass(frozen=True)
class Outcome:
    """The result of a video that did not fail."""

    status: Literal["done", "skipped"]  # skipped: an earlier call has made the copy
    bytes_before: int
    bytes_after: int


def find_videos(source: Path) -> tuple[Path, list[str]]:
    """Finds the videos of a folder, or the readable videos of a manifest.

    Returns:
        The folder that contains all of them, and their paths relative to it, sorted.

    Raises:
        UserError: `source` does not exist or has no video.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.is_dir():
        paths = [
            Path(folder, name)
            for folder, names in walk(source)
            for name in names
            if is_video(name) and not name.startswith(".")
        ]
        root = source
    else:
        from videoadapt.data.index.manifest import Manifest  # imports torch, which the workers do not need

        table = Manifest.load(source).readable
        paths = [Path(row.path) for row in map(table.row, range(len(table))) if row.reader != "image"]
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else source
    if not paths:
        raise UserError(f"{source}: contains no video")
    return root, sorted(path.relative_to(root).as_posix() for path in paths)


def result_path(name: str, target: Path) -> Path:
    """Returns the path of a copy: the name of its video with the suffix .mp4."""
    return (target / name).with_suffix(".mp4")


def split_clashing(names: Sequence[str], target: Path) -> tuple[list[str], dict[str, str]]:
    """Returns the names whose copies have different paths, and the cause of failure for each of the others."""
    claims = Counter(result_path(name, target) for name in names)
    clashing = {
        name: f"another file of SRC would also become {result_path(name, target)}; rename one"
        for name in names
        if claims[result_path(name, target)] > 1
    }
    return [name for name in names if name not in clashing], clashing


def resized(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Returns (height, width) with a short side of at most `short_side`; both are even, because 4:2:0 needs it."""
    scale = min(1.0, short_side / min(size))
    height, width = (max(2, round(side * scale / 2) * 2) for side in size)
    return height, width


def resize(name: str, *, root: Path, target: Path, encoding: Encoding) -> Outcome:
    """Makes the copy of one video, unless it exists already.

    Raises:
        VideoError: The video is damaged, or cannot be encoded, or the copy's path has another file. Nothing is written.
    """
    source, result = root / name, result_path(name, target)
    mark = mark_of(source, encoding)
    if result.exists():
        found = read_mark(result)
        if found is None:
            raise VideoError(f"{source}: {result} exists and was not made by this tool; move it away")
        if found == mark:
            return Outcome("skipped", source.stat().st_size, result.stat().st_size)
    result.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(result)
    try:
        info = probe(source)
        encode(source, part, info, encoding, mark)
        _require_same_frames(source, info, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(result)
    finally:
        part.unlink(missing_ok=True)
    return Outcome("done", info.bytes, result.stat().st_size)


def part_of(result: Path) -> Path:
    """Returns the path of an unfinished copy; the same in each call, so that a copy left by a kill is overwritten."""
    return result.with_name(f".{result.name}.part")


def mark_of(source: Path, encoding: Encoding) -> str:
    """Returns the record in a copy's metadata, which changes with the source and the encoding.

    Raises:
        VideoError: The source cannot be read.
    """
    try:
        stat = source.stat()
    except OSError as error:
        raise VideoError(f"{source}: {error.strerror}") from None
    return _MARK + json.dumps({"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} | asdict(encoding), sort_keys=True)


def read_mark(result: Path) -> str | None:
    """Returns the record in a file's metadata; None if this tool did not make the file."""
    try:
        with open_container(result) as (container, _):
            mark = container.metadata.get(_KEY, "")
    except VideoError:
        return None
    return mark if mark.startswith(_MARK) else None


def encode(source: Path, path: Path, info: VideoInfo, encoding: Encoding, mark: str) -> None:
    """Writes all frames of `source` to `path`, resized and upright, evenly spaced or at the times of the source.

    Raises:
        VideoError: A frame is damaged, or the encoder fails.
    """
    size = resized((info.height, info.width), encoding.short_side)
    with open_container(source) as (container, stream):
        rate = Fraction(info.fps).limit_denominator(1 << 16)
        try:
            with av.open(str(path), "w", format="mp4") as output:
                output.metadata[_KEY] = mark
                copy = cast("VideoStream", output.add_stream(encoding.codec, rate=rate))
                set_up(copy.codec_context, stream.codec_context, size, encoding)
                tick_s = _UNEVEN_TICK_S if info.variable_rate else 1 / rate
                ticks = _ticks(source, info)
                copy.codec_context.time_base = tick_s
                open_encoder(copy.codec_context)
                frames = upright_frames(source, container, stream, size)
                for tick, frame in zip(ticks, frames, strict=False):  # the number of frames is checked later
                    frame.pts, frame.time_base = tick, tick_s
                    frame.pict_type = PictureType.NONE  # otherwise the source's keyframes become keyframes of the copy
                    output.mux(copy.encode(frame))
                output.mux(copy.encode())  # the frames that the encoder still holds
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{source}: cannot be encoded with {encoding.codec}: {reason(error)}") from None


def _ticks(source: Path, info: VideoInfo) -> Iterable[int]:
    """Returns the timestamps of the copy's frames: 0, 1, 2, ... or, of a variable rate, the times of the source."""
    if not info.variable_rate:
        return count()
    return (display_times(source) / float(_UNEVEN_TICK_S)).round().astype(int).tolist()


def set_up(context: VideoCodecContext, source: VideoCodecContext, size: tuple[int, int], encoding: Encoding) -> None:
    """Sets up an encoder for frames of `size` (height, width), with the colour description of the source."""
    context.height, context.width = size
    context.pix_fmt, context.gop_size, context.thread_count = "yuv420p", encoding.gop, 1
    context.options = encoding.options()
    context.colorspace, context.color_primaries = source.colorspace, source.color_primaries
    context.color_trc = source.color_trc


def upright_frames(
    source: Path, container: InputContainer, stream: VideoStream, size: tuple[int, int]
) -> Iterator[VideoFrame]:
    """Yields all frames as they are displayed, resized to `size` (height, width).

    Raises:
        VideoError: A frame is damaged, or to be turned by another angle than a quarter turn.
    """
    resizer = VideoReformatter()  # one for all frames, because it caches its tables
    for number, decoded in enumerate(decode(stream.codec_context, container.demux(stream))):
        frame = decoded.frame
        if frame is None or decoded.damaged:
            raise VideoError(f"{source}: frame {number} is damaged")
        orientation = Orientation.of(frame, source)
        height, width = orientation.size(size)  # of the stored frame
        reformat = partial(resizer.reformat, frame, width, height, interpolation="BICUBIC", threads=1)
        if orientation == UPRIGHT:
            yield reformat("yuv420p", dst_color_range="MPEG")
        else:  # FFmpeg's scaler does not turn frames; numpy does, in RGB
            turned = np.ascontiguousarray(orientation.turned(reformat("rgb24").to_ndarray()))
            rotated = av.VideoFrame.from_ndarray(turned, "rgb24")
            yield rotated.reformat(format="yuv420p", dst_colorspace=frame.colorspace)


def _require_same_frames(source: Path, info: VideoInfo, part: Path) -> None:
    frames = probe(part).frames
    if frames != info.frames:
        raise VideoError(f"{source}: {frames} frames came out of {info.frames}; the video is damaged")


def require_encoder(encoding: Encoding) -> None:
    """Tries the encoder out, before the work on many videos starts.

    Raises:
        UserError: FFmpeg has no such encoder, or the encoder rejects an option; the message names the option.
    """
    try:
        av.CodecContext.create(encoding.codec, "w")
    except (av.FFmpegError, ValueError):
        raise UserError(f"--codec {encoding.codec}: FFmpeg has no such encoder; use for example libx264") from None
    cause = _rejection(encoding)
    if not cause:
        return
    # The wrong option is the one without which the encoder starts.
    for option, others in (("preset", replace(encoding, preset=None)), ("crf", replace(encoding, crf=None))):
        if others != encoding and not _rejection(others):
            value = encoding.options()[option]
            raise UserError(f"--{option} {value}: {encoding.codec} does not accept it ({cause})")
    raise UserError(f"--codec {encoding.codec}: cannot encode with {encoding.options()}: {cause}")


def _rejection(encoding: Encoding) -> str:
    """Returns the reason why an encoder does not start; empty if it starts."""
    context = cast("VideoCodecContext", av.CodecContext.create(encoding.codec, "w"))
    try:
        set_up(context, context, (64, 64), encoding)
        context.time_base = Fraction(1, 30)
        open_encoder(context)
    except (av.FFmpegError, ValueError) as error:
        return reason(error)
    return ""


def resize_all(
    source: Path, target: Path, encoding: Encoding, *, workers: int, timeout_s: float
) -> tuple[Path, dict[str, Outcome | str]]:
    """Makes the copies of all videos in parallel.

    A video that crashes its process or takes longer than `timeout_s` fails; the others go on.

    Returns:
        The folder of the videos and, by their path relative to it, the outcome or the cause of the failure.

    Raises:
        UserError: SRC has no video, or DST lies inside SRC.
    """
    root, names = find_videos(source)
    if target.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{target}: is inside {root}, and the next call would resize the copies; choose another folder")
    todo, clashing = split_clashing(names, target)
    outcomes: dict[str, Outcome | str] = {**clashing}
    work = partial(resize, root=root, target=target, encoding=encoding)
    try:
        with (
            Bar("resize", total=len(names), unit="videos", start=len(clashing)) as bar,
            closing(cast(Any, run_on_files)(todo, work, workers=workers, timeout_s=timeout_s)) as findings,
        ):
            for name, finding in findings:
                failed = isinstance(finding, str)
                outcomes[name] = finding.removeprefix(f"{root / name}: ") if failed else finding
                bar.step(note=f"{sum(isinstance(outcome, str) for outcome in outcomes.values())} failed")
    finally:
        for name in todo:  # a stopped process leaves its unfinished copy
            if not isinstance(outcomes.get(name), Outcome):
                part_of(result_path(name, target)).unlink(missing_ok=True)
    return root, outcomes


def reading_speeds(pairs: Sequence[tuple[Path, Path]]) -> tuple[float, float] | None:
    """Returns clips per CPU-second of the sources and of the copies with the same reader; None if none can be read."""
    used = np.zeros(2)
    clips = 0
    for path in chain.from_iterable(pairs[:1]):  # the first clip also imports libraries, so it does not count
        with suppress(VideoError):
            _clip_cpu_s(path)
    for source, result in pairs:
        with suppress(VideoError):
            used += [_clip_cpu_s(source), _clip_cpu_s(result)]
            clips += 1
    return (clips / used[0], clips / used[1]) if clips else None


def _clip_cpu_s(path: Path) -> float:
    """Measures the CPU seconds to read a clip of TimeSformer (8 frames, stride 32) from the middle of a video."""
    info = probe(path)
    start_s = max(0, info.frames - 8 * 32) / 2 / info.fps
    indices = frame_indices(
        start_s, total_frames=info.frames, file_fps=info.fps, num_frames=8, stride_frames=32, fps=None
    )
    before = time.process_time()
    open_video(path, "pyav", info).frames(indices)
    return time.process_time() - before


def require_own_list(path: Path) -> None:
    """Raises UserError if a file is there that `write_failures` has not written: it would be replaced or deleted."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if file.readline().strip() != ",".join(COLUMNS):
                raise UserError(f"{path}: is no list of failures of this script; rename it, or choose another folder")


def write_failures(path: Path, root: Path, outcomes: dict[str, Outcome | str]) -> None:
    """Writes a CSV of all videos that failed, with the cause. Deletes the file if there are none."""
    failed = [(str(root / name), outcome) for name, outcome in sorted(outcomes.items()) if isinstance(outcome, str)]
    if not failed:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:  # of any names
            csv.writer(file).writerows([COLUMNS, *failed])


def print_summary(root: Path, target: Path, outcomes: dict[str, Outcome | str]) -> None:
    """Prints counts, causes of failures, and sizes and reading speeds before and after."""
    good = {name: outcome for name, outcome in sorted(outcomes.items()) if isinstance(outcome, Outcome)}
    causes = {name: outcome for name, outcome in sorted(outcomes.items()) if isinstance(outcome, str)}
    for name, cause in list(causes.items())[:FAILURES_SHOWN]:
        say(f"failed: {root / name}: {cause}")
    if causes:
        say(f"failed: {len(causes)} videos in all; {target / FAILED} names each with the cause")
    renamed = sum(Path(name).suffix != ".mp4" for name in good)
    if renamed:
        say(
            f"renamed: {renamed} copies end in .mp4, but their sources do not; change these names in `path label` lists"
        )
    status = Counter(outcome.status for outcome in good.values())
    before, after = (sum(getattr(o, field) for o in good.values()) for field in ("bytes_before", "bytes_after"))
    rows = [("done", status["done"]), ("done before", status["skipped"]), ("failed", len(causes))]
    print_table(f"{root} -> {target}", ("videos", "number"), rows)
    sample = list(good)[:: -(-len(good) // SAMPLE) or 1]  # at most SAMPLE, evenly spread
    speeds = reading_speeds([(root / name, result_path(name, target)) for name in sample])
    gains = [("MB", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}")]
    if speeds:
        gains.append((f"clips / CPU-s, of {len(sample)} files", f"{speeds[0]:.1f}", f"{speeds[1]:.1f}"))
    print_table("Before and after", ("", "before", "after"), gains)


def main(  # noqa: PLR0913 - the options
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder, or a manifest.parquet.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder of the copies.")],
    *,
    short_side: Annotated[int, typer.Option(min=16, help="Of the copies, in pixels; no video is enlarged.")] = 256,
    codec: Annotated[
        str, typer.Option(help="An encoder of FFmpeg, for example libx264, libx265 or libsvtav1.")
    ] = "libx264",
    gop: Annotated[
        int,
        typer.Option(
            min=1,
            help="Largest distance between keyframes, in frames. With 12, random access is twice as fast as with 250.",
        ),
    ] = 12,
    crf: Annotated[int | None, typer.Option(help="Quality, lower is better [default: the encoder's].")] = None,
    preset: Annotated[str | None, typer.Option(help="Effort, for example fast [default: the encoder's].")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes [default: one for each CPU].")] = None,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="Time limit of one video, in seconds.")] = 600.0,
) -> None:
    """Copies videos as mp4 without sound, so that they decode fast at random positions.

    a.avi and b.mkv become a.mp4 and b.mp4: `path label` lists must name the copies.
    """
    from videoadapt.runtime.machine import worker_count  # imports torch, which the workers do not need

    encoding = Encoding(short_side, codec, gop, crf, preset)
    try:
        require_own_list(target / FAILED)
        require_encoder(encoding)
        root, outcomes = resize_all(
            source, target, encoding, workers=workers or worker_count("auto"), timeout_s=timeout_s
        )
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        raise typer.Exit(130) from None
    write_failures(target / FAILED, root, outcomes)
    print_summary(root, target, outcomes)
    if any(isinstance(outcome, str) for outcome in outcomes.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
