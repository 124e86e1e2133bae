"""Reads the properties of a video file: frames, size, rate, rotation, and the exact reader. Decodes only one frame.

Every error of a library becomes a `VideoError` of one line that starts with the path.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from videoadapt.data.video.files import exists, file_size, hash_file, open_regular, reason
from videoadapt.data.video.frame_times import Rate, frame_rate, is_rate
from videoadapt.data.video.images import (
    IMAGE_FOLDER_FPS,
    errors_named_after,
    hash_images,
    image_codec,
    image_files,
    read_image,
)
from videoadapt.data.video.limits import DEFAULT_LIMITS, Limits
from videoadapt.data.video.orientation import UPRIGHT, Orientation
from videoadapt.data.video.suffixes import is_image
from videoadapt.errors import VideoError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

ReaderName = Literal["decord", "pyav", "image"]

PROBE_VERSION = 5  # raise it when `probe` or `verify` returns another result for the same file

# Files for which decord 0.6 was measured to be exact. It returns wrong frames of MPEG-TS, and of avi with B-frames,
# and raises no error.
_DECORD_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv"})
_DECORD_CODECS = frozenset({"h264", "hevc", "vp9"})
_DECORD_MIN_WIDTH = 32
_DECORD_REFUSED_WIDTHS = frozenset({48, 72})
_IDR_TYPES = {"h264": frozenset({5}), "hevc": frozenset({19, 20})}  # types of NAL units

# FFmpeg also "plays" text, still images, and lists of other files or addresses.
_NOT_VIDEO = frozenset({"tty", "bin", "xbin", "adf", "idf", "image2", "hls", "concat", "dash", "sdp", "imf"})
_OPEN_OPTIONS = {"protocol_whitelist": "file"}  # a file must not make FFmpeg open the network
CUT_ANYWHERE = frozenset({"mpegts", "mpeg", "mpegvideo", "h264", "hevc"})  # recorders and users cut these by bytes
_PADDED = 2  # pixels that a decoder stores for one of a frame, at most
_PYAV_READS_ANY_METADATA = 19  # the first version without the argument `metadata_errors`


@dataclass(frozen=True)
class VideoInfo:
    """Result of `probe`. Width and height describe the displayed frame, after the rotation."""

    frames: int
    fps: float  # measured from the timestamps; the mean if the rate is variable
    width: int
    height: int
    duration_s: float  # frames / fps, or the span of the timestamps if it differs by more than a frame
    codec: str
    container: str
    rotation: int  # degrees anticlockwise; a mirrored frame is mirrored besides
    reader: ReaderName  # decord: decord, if installed, is exact for this file
    bytes: int
    content: str  # hash of the file's bytes, or of the names and bytes of a folder's frames; empty if not requested
    damage: str | None = None  # damage that decoding all frames found; empty: none; None: not decoded
    variable_rate: bool = False  # the frames are not evenly spaced, so a clip's frames are chosen by their timestamps


def probe(path: str | Path, *, content: bool = True, limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
    """Reads the properties of a video from its packets and its first frame, in a few ms.

    Args:
        path: A video, an image, or a folder of images that form one video.
        content: Whether to hash the bytes.
        limits: The largest video that is read.

    Raises:
        VideoError: The file cannot be read as a video, or is larger than the limits.
    """
    path = Path(path)
    info = _probe_folder(path, limits) if os.path.isdir(path) else _probe_file(path, limits)
    return replace(info, content=content_hash(path)) if content else info


def content_hash(path: Path) -> str:
    """Returns 32 hex digits, the hash of a file's bytes, or of the names and bytes of a folder's frames.

    Raises:
        VideoError: The file or folder cannot be read.
    """
    return hash_images(path) if os.path.isdir(path) else hash_file(path)


def check_unchanged(path: Path, info: VideoInfo) -> None:
    """Compares a file with its `VideoInfo`: the size of a file, the number of frames of a folder.

    Raises:
        VideoError: The file does not exist any more, or has changed.
    """
    gone = "not found; it was moved or deleted after it was indexed; run `videoadapt index`"
    if info.container == "folder":
        if not exists(path):
            raise VideoError(f"{path}: {gone}")
        now, then, unit = len(image_files(path)), info.frames, "frames"
    else:
        now, then, unit = file_size(path, gone), info.bytes, "bytes"
    if now != then:
        raise VideoError(f"{path}: has {now} {unit}, but had {then} when it was indexed; run `videoadapt index`")


@contextmanager
def open_container(path: Path, limits: Limits = DEFAULT_LIMITS) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file with PyAV and finds its video stream, to be decoded in one thread.

    Raises:
        VideoError: The file cannot be read as a video, or is larger than the limits. Errors of PyAV inside the block
            are converted too.
    """
    import av

    try:
        with open_regular(path) as file:
            limits.check_claims(path, file)
        # FFmpeg takes some relative names for addresses, but never an absolute path.
        with av.open(os.path.abspath(path), options=_OPEN_OPTIONS, **_metadata_options()) as container:
            stream = _video_stream(path, container)
            limits.check_pixels(path, stream.width, stream.height)
            # A frame may be larger than the header states. The decoder counts a frame with its padding.
            stream.codec_context.options = {"max_pixels": str(_PADDED * limits.max_pixels)}
            yield container, stream
    except VideoError:
        raise
    except (av.FFmpegError, OSError, EOFError, ValueError) as error:
        raise VideoError(f"{path}: cannot be read as a video: {reason(error)}") from None


@functools.cache
def _metadata_options() -> dict[str, Any]:
    """Returns the arguments of `av.open` for metadata that are not UTF-8. PyAV 19 reads them without an argument."""
    import av

    return {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < _PYAV_READS_ANY_METADATA else {}


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    from av.stream import Disposition

    name = container.format.name
    if name in _NOT_VIDEO or name.endswith("_pipe"):
        raise VideoError(f"{path}: not a video file (FFmpeg reads it as {name})")
    stream = container.streams.best("video")
    if stream is None or Disposition.attached_pic in stream.disposition:  # the cover picture of a music file
        raise VideoError(f"{path}: holds no video stream")
    # FFmpeg gives each tile of a large photograph as a video of its own, and maybe a small copy of the whole.
    if any(Disposition.dependent in each.disposition and each.frames == 1 for each in container.streams.video):
        raise VideoError(f"{path}: a photograph in tiles, as HEIC files of phones are; convert it to JPEG")
    video = cast("VideoStream", stream)
    if video.codec_context is None:
        raise VideoError(f"{path}: FFmpeg has no decoder for its video")
    video.thread_type = "NONE"  # the workers of a loader are the parallelism
    return video


def _probe_folder(path: Path, limits: Limits) -> VideoInfo:
    images = image_files(path)
    limits.check_frames(path, len(images))
    with errors_named_after(path, images[0]):
        height, width = read_image(images[0], limits).shape[:2]
    size = 0
    for image in images:
        with errors_named_after(path, image):
            size += file_size(image)
    return VideoInfo(
        frames=len(images),
        fps=IMAGE_FOLDER_FPS,
        width=width,
        height=height,
        duration_s=len(images) / IMAGE_FOLDER_FPS,
        codec=image_codec(images[0]),
        container="folder",
        rotation=0,
        reader="image",
        bytes=size,
        content="",
    )


def _probe_file(path: Path, limits: Limits) -> VideoInfo:
    size = file_size(path)
    if is_image(path.name):
        height, width = read_image(path, limits).shape[:2]
        return VideoInfo(1, 1.0, width, height, 1.0, image_codec(path), "image", 0, "image", size, content="")
    with open_container(path, limits) as (container, stream):
        return _probe_stream(path, container, stream, size, limits)


@dataclass
class PacketTimes:
    """What the packets of a stream state about its frames, in decoding order."""

    container: str  # name of the format
    times: list[int | None] = field(default_factory=list)  # of display, as the packets state them
    keyframes: list[int] = field(default_factory=list)  # packet numbers, ascending
    decoding_order: bool = True  # the times of display equal those of decoding
    _hidden: set[int] = field(default_factory=set)  # packet numbers

    def add(self, packet: Packet[VideoStream]) -> None:
        """Adds the next packet."""
        number = len(self.times)
        self.times.append(packet.pts)
        self.decoding_order &= packet.pts == packet.dts
        if packet.is_keyframe:
            self.keyframes.append(number)
        if packet.is_discard:
            self._hidden.add(number)

    def shown(self) -> list[int]:
        """Returns the numbers of the packets whose frames are displayed.

        An edit list hides some. A stream that was cut inside a GOP begins with packets that no decoder can show: all
        before its first keyframe, in the order of decoding or of display. Other formats begin with a keyframe, and if
        none is seen there, it is damaged.
        """
        first = next(iter(self.keyframes), 0) if self.container in CUT_ANYWHERE else 0
        start = self.times[first] if first else None
        return [
            number
            for number, time in enumerate(self.times)
            if number >= first and number not in self._hidden and (start is None or time is None or time >= start)
        ]


class _Scan(NamedTuple):
    """The result of reading all packets of a stream."""

    first_frame: VideoFrame
    times: list[int | None]  # times of all packets
    shown: list[int | None]  # times of the packets that are displayed
    closed: bool  # no frame after a keyframe needs a frame before it
    timed: bool  # the times are those of display


def _probe_stream(path: Path, container: InputContainer, stream: VideoStream, size: int, limits: Limits) -> VideoInfo:
    _refuse_torn(path, container, stream, size)
    first, times, shown, closed, timed = _scan(path, container, stream, limits)
    # In some files all packets have the same time: decord then seeks to wrong frames, and the average rate is wrong.
    times_valid = len(set(times) - {None}) == len(times)
    rate = _frame_rate(path, stream, shown if timed else [None], times_valid)
    complete = len(shown) == len(times) == (stream.frames or len(times))  # 0: the container states no number
    # decord converts interlaced frames to RGB as progressive ones, which shifts colours by a line.
    orientation = Orientation.of(first, path)
    plain = closed and orientation == UPRIGHT and not first.interlaced_frame and len(container.streams.video) == 1
    decord_exact = times_valid and complete and plain and _suits_decord(container.format.name, stream)
    height, width = orientation.size((first.height, first.width))
    return VideoInfo(
        frames=len(shown),
        fps=rate.fps,
        width=width,
        height=height,
        duration_s=_duration_s(shown, rate.fps, stream),
        codec=stream.codec_context.name,
        container=container.format.name,
        rotation=orientation.degrees,
        reader="decord" if decord_exact else "pyav",
        bytes=size,
        content="",
        variable_rate=rate.variable,
    )


def _scan(path: Path, container: InputContainer, stream: VideoStream, limits: Limits) -> _Scan:
    """Reads all packets, and decodes only until the first frame."""
    import av

    codec, read = stream.codec_context, PacketTimes(container.format.name)
    first, closed = None, True
    for packet in container.demux(stream):
        if first is None:
            try:
                first = _first_frame(codec, packet, alone=not read.times)
            except (av.FFmpegError, EOFError, ValueError):
                closed = False  # damaged: decord would return wrong frames without an error
        if packet.size:  # an empty packet marks the end of the stream
            is_later_keyframe = bool(read.times) and packet.is_keyframe
            closed &= not is_later_keyframe or _starts_closed_gop(codec.name, packet)
            read.add(packet)
            limits.check_frames(path, len(read.times))
    shown = [read.times[number] for number in read.shown()]
    if first is None or not shown:
        raise VideoError(f"{path}: none of its frames can be decoded")
    timed = shows_display_times(container.format.name, codec, read.decoding_order)
    return _Scan(first, read.times, shown, closed, timed)


def shows_display_times(container: str, codec: VideoCodecContext, decoding_order: bool) -> bool:
    """Returns whether the timestamps of packets are times of display.

    Avi stores no display times, and some writers copy the decoding times: wrong as soon as frames change order.

    Args:
        container: Name of the format.
        codec: The decoder, after it has read packets.
        decoding_order: Whether the timestamps equal the decoding times.
    """
    return not (codec.has_b_frames and (decoding_order or container == "avi"))


def _refuse_torn(path: Path, container: InputContainer, stream: VideoStream, size: int) -> None:
    """Raises `VideoError` if an mp4 or mov lists frames beyond the end of the file: the copy was interrupted."""
    if not container.format.name.startswith("mov"):  # other containers have no such list
        return
    beyond = sum(entry.pos + entry.size > size for entry in stream.index_entries)
    if beyond:
        raise VideoError(f"{path}: torn: {beyond} of {len(stream.index_entries)} frames lie beyond the end of the file")


def _first_frame(codec: VideoCodecContext, packet: Packet[VideoStream], alone: bool) -> VideoFrame | None:
    """Returns the first frame that the decoder outputs for a packet, or None.

    `alone` marks the first packet. If it is a keyframe, flushing the decoder returns its frame without waiting for the
    packets after it.
    """
    frames = codec.decode(packet)
    if alone and not frames and packet.is_keyframe and not packet.is_discard:
        frames = codec.decode(None)
        codec.flush_buffers()
        if not frames:
            frames = codec.decode(packet)  # feed it again, so that later packets can refer to it
    return frames[0] if frames else None


def _starts_closed_gop(codec: str, keyframe: Packet[VideoStream]) -> bool:
    """Returns whether no frame after a keyframe needs a frame before it: in H.264 and HEVC, an IDR picture.

    Otherwise (open GOP, or intra refresh) decord seeks to wrong frames.
    """
    if codec not in _IDR_TYPES:
        return True
    data, offset = memoryview(keyframe), 0
    while offset + 4 < len(data):  # each unit: 4 bytes of length, then a header byte with its type
        header = data[offset + 4]
        if (header & 0x1F if codec == "h264" else header >> 1 & 0x3F) in _IDR_TYPES[codec]:
            return True
        offset += 4 + int.from_bytes(data[offset : offset + 4], "big")
    return False


def _frame_rate(path: Path, stream: VideoStream, shown: Sequence[int | None], times_valid: bool) -> Rate:
    """Returns the rate by the timestamps. Without usable timestamps it is the rate that the file states."""
    average, guessed = stream.average_rate, stream.guessed_rate
    without_times = filter(is_rate, (average, guessed) if times_valid else (guessed, stream.base_rate))
    rate = frame_rate(shown, stream.time_base, (average, guessed), next(without_times, None))
    if rate is None:
        raise VideoError(
            f"{path}: has no usable frame rate: its timestamps are missing or broken, and it states {average}"
        )
    return rate


def _duration_s(shown_pts: Sequence[int | None], fps: float, stream: VideoStream) -> float:
    """Returns frames / fps, or the span of the timestamps if all are known and it differs by more than a frame."""
    by_rate_s = len(shown_pts) / fps
    times = [pts for pts in shown_pts if pts is not None]
    if stream.time_base is None or len(set(times)) < len(shown_pts):
        return by_rate_s
    by_times_s = float((max(times) - min(times)) * stream.time_base) + 1 / fps  # the last frame lasts 1 / fps
    return by_times_s if abs(by_times_s - by_rate_s) > 1 / fps else by_rate_s


def _suits_decord(container: str, stream: VideoStream) -> bool:
    return (
        container in _DECORD_CONTAINERS
        and stream.codec_context.name in _DECORD_CODECS
        and stream.width >= _DECORD_MIN_WIDTH
        and stream.width not in _DECORD_REFUSED_WIDTHS
    )
