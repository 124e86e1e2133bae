"""Copies of videos that are quick to read at random places: `python tools/resize_videos.py SRC DST --short-side 256`.

Each video under SRC, a folder or a manifest.parquet, becomes DST/NAME.mp4: rotated as it is to be shown, its short side
resized, in 8 bits and 4:2:0, with a keyframe at least every `--gop` frames, without sound. It has all frames of its
source, evenly spaced at the rate that `index` finds in the source, so that clips of both have the same frames; of a
video with uneven times, the times are not kept. Names change where the source is no mp4: annotations that name files
with their suffix, such as `path label` lists, must name the copies with .mp4; official CSVs go on working. A video
whose short side is smaller already keeps its size, and is encoded again too, so that all of DST is of one kind.

The same command goes on where it was stopped, and does again what has changed: every result says in its own metadata
what it was made from. A file in DST that does not say so is not this tool's, and is left alone. A result gets its name
when it was found to have all frames of its source; damaged videos are listed in DST/failed.csv, and nothing else is
written for them. One call at a time should work on a name in DST.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import av
import numpy as np
import typer
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from videoadapt.data.index.find_files import walk
from videoadapt.data.index.probe_pool import run_on_files
from videoadapt.data.synthetic import open_encoder
from videoadapt.data.video.decoding import decode
from videoadapt.data.video.files import reason
from videoadapt.data.video.frame_sampling import frame_indices
from videoadapt.data.video.probe import VIDEO_SUFFIXES, VideoInfo, open_container, probe, upright
from videoadapt.data.video.readers import open_video
from videoadapt.errors import RunError, UserError, VideoError
from videoadapt.runtime.console import Bar, print_table, say
from videoadapt.runtime.files import replacing

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FAILED = "failed.csv"  # in DST
FAILURES_SHOWN = 10
SAMPLE = 20  # files whose speed of reading is measured before and after
_KEY = "comment"  # of the metadata that mp4 keeps
_MARK = "videoadapt resize_videos "

# What libraries beside FFmpeg's own need to be told, to take one thread and be silent.
_ENCODER_OPTIONS = {
    "libx264": {"threads": "1"},
    "libx265": {"x265-params": "pools=1:frame-threads=1:log-level=error"},
    "libsvtav1": {"svtav1-params": "lp=1"},
}


@dataclass(frozen=True)
class Encoding:
    """How results are made; `crf` and `preset` none are the encoder's own defaults."""

    short_side: int = 256
    codec: str = "libx264"
    gop: int = 12
    crf: int | None = None
    preset: str | None = None

    def options(self) -> dict[str, str]:
        """For the encoder, in FFmpeg's words."""
        given = {"crf": self.crf, "preset": self.preset}
        return _ENCODER_OPTIONS.get(self.codec, {}) | {
            key: str(value) for key, value in given.items() if value is not None
        }


@dataclass(frozen=True)
class Outcome:
    """What came of a video."""

    status: Literal["done", "skipped"]
    bytes_before: int
    bytes_after: int


def find_videos(source: Path) -> tuple[Path, list[str]]:
    """The folder that all videos of a folder or a manifest lie in, and their names in it, sorted.

    Of a manifest, those that it found readable. Raises `UserError` if there is not one, or nothing at `source`.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if source.is_dir():
        paths = [
            Path(folder, name)
            for folder, names in walk(source)
            for name in names
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith(".")
        ]
        root = source
    else:
        from videoadapt.data.index.manifest import Manifest  # brings torch, which the workers need not load

        table = Manifest.load(source).readable
        paths = [Path(row.path) for row in map(table.row, range(len(table))) if row.reader != "image"]
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else source
    if not paths:
        raise UserError(f"{source}: there is no video in it")
    return root, sorted(path.relative_to(root).as_posix() for path in paths)


def result_path(name: str, target: Path) -> Path:
    """Where the result of a video goes: its name with the suffix of mp4."""
    return (target / name).with_suffix(".mp4")


def split_clashing(names: Sequence[str], target: Path) -> tuple[list[str], dict[str, str]]:
    """The names whose results have a file each, and, of the others, why not."""
    claims = Counter(result_path(name, target) for name in names)
    clashing = {
        name: f"another file of SRC would become {result_path(name, target)} too; rename one"
        for name in names
        if claims[result_path(name, target)] > 1
    }
    return [name for name in names if name not in clashing], clashing


def resized(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) with the short side at most `short_side`, even, as 4:2:0 wants them."""
    scale = min(1.0, short_side / min(size))
    height, width = (max(2, round(side * scale / 2) * 2) for side in size)
    return height, width


def resize(name: str, *, root: Path, target: Path, encoding: Encoding) -> Outcome:
    """Makes the result of one video, unless it is there already. Raises `VideoError`, and leaves nothing behind."""
    source, result = root / name, result_path(name, target)
    mark = mark_of(source, encoding)
    if result.exists():
        found = read_mark(result)
        if found is None:
            raise VideoError(f"{source}: {result} is there already and was not made by this tool; move it away")
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
    """A result before it is finished; the same name in each call, so that what a kill has left is written over."""
    return result.with_name(f".{result.name}.part")


def mark_of(source: Path, encoding: Encoding) -> str:
    """What a result says of itself: changes when the source or the encoding does. Raises `VideoError`."""
    try:
        stat = source.stat()
    except OSError as error:
        raise VideoError(f"{source}: {error.strerror}") from None
    return _MARK + json.dumps({"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns} | asdict(encoding), sort_keys=True)


def read_mark(result: Path) -> str | None:
    """What a file says that it was made from; none if it is not a result of this tool."""
    try:
        with open_container(result) as (container, _):
            mark = container.metadata.get(_KEY, "")
    except VideoError:
        return None
    return mark if mark.startswith(_MARK) else None


def encode(source: Path, path: Path, info: VideoInfo, encoding: Encoding, mark: str) -> None:
    """Writes all frames of a video. Raises `VideoError` if one of them is damaged, or the encoder fails."""
    size = resized((info.height, info.width), encoding.short_side)
    with open_container(source) as (container, stream):
        rate = Fraction(info.fps).limit_denominator(1 << 16)
        try:
            with av.open(str(path), "w", format="mp4") as output:
                output.metadata[_KEY] = mark
                copy = cast("VideoStream", output.add_stream(encoding.codec, rate=rate))
                set_up(copy.codec_context, stream.codec_context, size, encoding)
                copy.codec_context.time_base = 1 / rate
                open_encoder(copy.codec_context)
                for number, frame in enumerate(upright_frames(source, container, stream, size)):
                    frame.pts, frame.time_base = number, 1 / rate
                    frame.pict_type = PictureType.NONE  # the source's must not tell the encoder where keyframes are
                    output.mux(copy.encode(frame))
                output.mux(copy.encode())
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{source}: cannot be encoded with {encoding.codec}: {reason(error)}") from None


def set_up(context: VideoCodecContext, source: VideoCodecContext, size: tuple[int, int], encoding: Encoding) -> None:
    """An encoder of (height, width) that says of its colours what the source says."""
    context.height, context.width = size
    context.pix_fmt, context.gop_size, context.thread_count = "yuv420p", encoding.gop, 1
    context.options = encoding.options()
    context.colorspace, context.color_primaries = source.colorspace, source.color_primaries
    context.color_trc = source.color_trc


def upright_frames(
    source: Path, container: InputContainer, stream: VideoStream, size: tuple[int, int]
) -> Iterator[VideoFrame]:
    """The frames turned as to be shown and resized to (height, width). Raises `VideoError` at one that is damaged."""
    resizer = VideoReformatter()  # one for all frames: it keeps its tables
    for number, decoded in enumerate(decode(stream.codec_context, container.demux(stream))):
        frame = decoded.frame
        if frame is None or decoded.damaged:
            raise VideoError(f"{source}: frame {number} is damaged")
        height, width = upright(size, frame.rotation)
        reformat = partial(resizer.reformat, frame, width, height, interpolation="BICUBIC", threads=1)
        if frame.rotation % 360 == 0:
            yield reformat("yuv420p", dst_color_range="MPEG")
        else:
            turned = np.ascontiguousarray(np.rot90(reformat("rgb24").to_ndarray(), frame.rotation // 90), np.uint8)
            rotated = av.VideoFrame.from_ndarray(turned, "rgb24")
            yield rotated.reformat(format="yuv420p", dst_colorspace=frame.colorspace)


def _require_same_frames(source: Path, info: VideoInfo, part: Path) -> None:
    frames = probe(part).frames
    if frames != info.frames:
        raise VideoError(f"{source}: {frames} frames came out of {info.frames}; it is damaged")


def require_encoder(encoding: Encoding) -> None:
    """Raises `UserError` if FFmpeg has no such encoder, or it refuses the options."""
    try:
        av.CodecContext.create(encoding.codec, "w")
    except (av.FFmpegError, ValueError):
        raise UserError(f"--codec {encoding.codec}: FFmpeg has no such encoder; libx264 is one") from None
    cause = _refusal(encoding)
    if not cause:
        return
    for option, others in (("preset", replace(encoding, preset=None)), ("crf", replace(encoding, crf=None))):
        if others != encoding and not _refusal(others):
            value = encoding.options()[option]
            raise UserError(f"--{option} {value}: {encoding.codec} does not take it ({cause})")
    raise UserError(f"--codec {encoding.codec}: cannot encode with {encoding.options()}: {cause}")


def _refusal(encoding: Encoding) -> str:
    """Why an encoder does not start; empty if it does."""
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
    """The folder that the videos of SRC lie in, and by their names in it what came of them, or why it failed.

    A video that crashes its process or takes longer than `timeout_s` fails alone.
    """
    root, names = find_videos(source)
    if target.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{target}: lies in {root}, and its files would be taken for videos to resize; choose another")
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
        for name in todo:  # whose process was stopped
            if not isinstance(outcomes.get(name), Outcome):
                part_of(result_path(name, target)).unlink(missing_ok=True)
    return root, outcomes


def reading_speeds(pairs: Sequence[tuple[Path, Path]]) -> tuple[float, float] | None:
    """Clips per CPU-second from the sources and from the results, by the same reader; none if none can be read."""
    used = np.zeros(2)
    clips = 0
    for path in chain.from_iterable(pairs[:1]):  # what is first used is imported then; that is nobody's reading
        with suppress(VideoError):
            _clip_cpu_s(path)
    for source, result in pairs:
        with suppress(VideoError):
            used += [_clip_cpu_s(source), _clip_cpu_s(result)]
            clips += 1
    return (clips / used[0], clips / used[1]) if clips else None


def _clip_cpu_s(path: Path) -> float:
    """CPU seconds to read 8 frames, 32 apart, from the middle of a video."""
    info = probe(path)
    start_s = max(0, info.frames - 8 * 32) / 2 / info.fps
    indices = frame_indices(
        start_s, total_frames=info.frames, file_fps=info.fps, num_frames=8, stride_frames=32, fps=None
    )
    before = time.process_time()
    open_video(path, "pyav", info).frames(indices)
    return time.process_time() - before


def write_failures(path: Path, root: Path, outcomes: dict[str, Outcome | str]) -> None:
    """A CSV of all videos that failed and why; no file if there is none."""
    failed = [(str(root / name), outcome) for name, outcome in sorted(outcomes.items()) if isinstance(outcome, str)]
    if not failed:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "cause"), *failed])


def print_summary(root: Path, target: Path, outcomes: dict[str, Outcome | str]) -> None:
    """How many videos became what, why others failed, and what it was good for."""
    good = {name: outcome for name, outcome in sorted(outcomes.items()) if isinstance(outcome, Outcome)}
    causes = {name: outcome for name, outcome in sorted(outcomes.items()) if isinstance(outcome, str)}
    for name, cause in list(causes.items())[:FAILURES_SHOWN]:
        say(f"failed: {root / name}: {cause}")
    if causes:
        say(f"failed: {len(causes)} videos in all; {target / FAILED} names each with the cause")
    renamed = sum(Path(name).suffix != ".mp4" for name in good)
    if renamed:
        say(
            f"renamed: {renamed} copies end in .mp4 and their sources do not; change the names in `path label` lists, "
            "which would not find them"
        )
    status = Counter(outcome.status for outcome in good.values())
    before, after = (sum(getattr(o, field) for o in good.values()) for field in ("bytes_before", "bytes_after"))
    rows = [("done", status["done"]), ("done before", status["skipped"]), ("failed", len(causes))]
    print_table(f"{root} -> {target}", ("videos", "number"), rows)
    sample = list(good)[:: -(-len(good) // SAMPLE) or 1]
    speeds = reading_speeds([(root / name, result_path(name, target)) for name in sample])
    gains = [("MB", f"{before / 1e6:.1f}", f"{after / 1e6:.1f}")]
    if speeds:
        gains.append((f"clips / CPU-s, of {len(sample)} files", f"{speeds[0]:.1f}", f"{speeds[1]:.1f}"))
    print_table("Before and after", ("", "before", "after"), gains)


def main(  # noqa: PLR0913 - the options
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A folder, or a manifest.parquet.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="The folder of the results.")],
    *,
    short_side: Annotated[int, typer.Option(min=16, help="Of the results, in pixels; no video is enlarged.")] = 256,
    codec: Annotated[str, typer.Option(help="An encoder of FFmpeg: libx264, libx265, libsvtav1 ...")] = "libx264",
    gop: Annotated[
        int,
        typer.Option(
            min=1, help="Frames from keyframe to keyframe at most. 12 makes random access about twice as fast as 250."
        ),
    ] = 12,
    crf: Annotated[int | None, typer.Option(help="Quality, lower is better; without it, the encoder's own.")] = None,
    preset: Annotated[str | None, typer.Option(help="Effort, such as fast; without it, the encoder's own.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; without it, one for each CPU.")] = None,
    timeout_s: Annotated[float, typer.Option(min=1.0, help="For one video.")] = 600.0,
) -> None:
    """Copies of videos that are quick to read at random places, as mp4 without sound.

    a.avi and b.mkv become a.mp4 and b.mp4: `path label` lists must name these.
    """
    from videoadapt.runtime.machine import worker_count  # brings torch, which the workers need not load

    encoding = Encoding(short_side, codec, gop, crf, preset)
    try:
        require_encoder(encoding)
        root, outcomes = resize_all(
            source, target, encoding, workers=workers or worker_count("auto"), timeout_s=timeout_s
        )
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is done", file=sys.stderr)
        raise typer.Exit(130) from None
    write_failures(target / FAILED, root, outcomes)
    print_summary(root, target, outcomes)
    if any(isinstance(outcome, str) for outcome in outcomes.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
