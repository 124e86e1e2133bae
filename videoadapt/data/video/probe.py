"""What a video file holds, found without decoding it: its frames, size, rate, rotation, and the reader to trust.

Whatever a library has to say against a file comes out as a `VideoError` of one line that names the file.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, cast

from videoadapt.data.video.files import exists, file_size, reason
from videoadapt.data.video.images import IMAGE_FOLDER_FPS, IMAGE_SUFFIXES, _image_codec, image_files, naming, read_image
from videoadapt.errors import VideoError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

ReaderName = Literal["decord", "pyav", "image"]

PROBE_VERSION = 2  # to be raised when `probe` or `verify` finds something else in a file than before

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".flv", ".avi", ".ts", ".mpg", ".mpeg", ".wmv", ".3gp", ".ogv"}
)

# Where decord 0.6 was measured to be exact. It reads MPEG-TS, and avi with B-frames, wrong and says nothing.
_DECORD_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv"})
_DECORD_CODECS = frozenset({"h264", "hevc", "vp9"})
_DECORD_MIN_WIDTH = 32
_DECORD_REFUSED_WIDTHS = frozenset({48, 72})
_IDR_TYPES = {"h264": frozenset({5}), "hevc": frozenset({19, 20})}  # of NAL units

# FFmpeg also "plays" text, still images, and lists of other files or addresses.
_NOT_VIDEO = frozenset({"tty", "bin", "xbin", "adf", "idf", "image2", "hls", "concat", "dash", "sdp", "imf"})
_OPEN_OPTIONS = {"protocol_whitelist": "file"}  # a file must not make us open others, or the network


_MAX_FPS = 1000.0  # a rate beyond it is the work of broken timestamps


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds. Width and height are as shown, after the rotation (degrees anticlockwise)."""

    frames: int
    fps: float
    width: int
    height: int
    duration_s: float  # frames / fps, or what the timestamps span if that is another number of frames
    codec: str
    container: str
    rotation: int
    reader: ReaderName  # decord: may be trusted with it, where it is installed
    bytes: int
    content: str  # hash of the file's bytes, or of the names and bytes of a folder's images; may be left out
    damage: str | None = None  # what decoding all of it found, empty if all is well; none = not decoded


def probe(path: str | Path, *, content: bool = True) -> VideoInfo:
    """What a file holds, from its packets and its first frame: a few ms. A folder of images is one video.

    Without `content` its bytes are not hashed. Raises `VideoError` if it is no video.
    """
    path = Path(path)
    info = _probe_folder(path) if path.is_dir() else _probe_file(path)
    return replace(info, content=content_hash(path)) if content else info


def _probe_file(path: Path) -> VideoInfo:
    size = file_size(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        height, width = read_image(path).shape[:2]
        return VideoInfo(1, 1.0, width, height, 1.0, _image_codec(path), "image", 0, "image", size, content="")
    with open_container(path) as (container, stream):
        return _probe_stream(path, container, stream, size)


def _probe_folder(path: Path) -> VideoInfo:
    images = image_files(path)
    with naming(path, images[0]):
        height, width = read_image(images[0]).shape[:2]
    size = 0
    for image in images:
        with naming(path, image):
            size += file_size(image)
    return VideoInfo(
        frames=len(images),
        fps=IMAGE_FOLDER_FPS,
        width=width,
        height=height,
        duration_s=len(images) / IMAGE_FOLDER_FPS,
        codec=_image_codec(images[0]),
        container="folder",
        rotation=0,
        reader="image",
        bytes=size,
        content="",
    )


def check_unchanged(path: Path, info: VideoInfo) -> None:
    """Raise `VideoError` if a file is gone or has not the size that it was probed with, a folder not as many frames."""
    if not exists(path):
        raise VideoError(f"{path}: lies elsewhere, or is gone, since it was indexed; run `videoadapt index`")
    if info.container == "folder":
        now, then, unit = len(image_files(path)), info.frames, "frames"
    else:
        now, then, unit = file_size(path), info.bytes, "bytes"
    if now != then:
        raise VideoError(f"{path}: has {now} {unit}, but had {then} when it was indexed; run `videoadapt index`")


def _probe_stream(path: Path, container: InputContainer, stream: VideoStream, size: int) -> VideoInfo:
    _refuse_torn(path, container, stream, size)
    first, closed = None, True
    times: list[int | None] = []
    shown: list[int | None] = []
    for packet in container.demux(stream):
        if first is None:
            first = _first_frame(stream.codec_context, packet, alone=not times)
        if packet.size:  # the packet after the last one is empty
            closed &= not (times and packet.is_keyframe) or _stands_alone(stream.codec_context.name, packet)
            times.append(packet.pts)
            if not packet.is_discard:
                shown.append(packet.pts)
    if first is None or not shown:
        raise VideoError(f"{path}: not one frame of it can be decoded")
    # Some files have one time for all packets: decord then seeks to wrong frames, and the average rate is wild.
    sound = len(set(times) - {None}) == len(times)
    fps = _frame_rate(path, stream, sound)
    whole = len(shown) == len(times) == (stream.frames or len(times))
    # decord turns interlaced frames into RGB as if they were not: colours move by a line.
    plain = closed and first.rotation == 0 and not first.interlaced_frame and len(container.streams.video) == 1
    height, width = upright((first.height, first.width), first.rotation)
    return VideoInfo(
        frames=len(shown),
        fps=fps,
        width=width,
        height=height,
        duration_s=_duration_s(shown, fps, stream),
        codec=stream.codec_context.name,
        container=container.format.name,
        rotation=first.rotation % 360,
        reader="decord" if sound and whole and plain and _suits_decord(container.format.name, stream) else "pyav",
        bytes=size,
        content="",
    )


def _stands_alone(codec: str, keyframe: Packet[VideoStream]) -> bool:
    """Whether no frame after a keyframe needs one from before it: an IDR picture, in H.264 and HEVC.

    Elsewhere decord seeks to wrong frames: with an open GOP, or pictures that are refreshed bit by bit.
    """
    if codec not in _IDR_TYPES:
        return True
    data, place = memoryview(keyframe), 0
    while place + 4 < len(data):
        header = data[place + 4]
        if (header & 0x1F if codec == "h264" else header >> 1 & 0x3F) in _IDR_TYPES[codec]:
            return True
        place += 4 + int.from_bytes(data[place : place + 4], "big")  # units come after their lengths
    return False


def _first_frame(codec: VideoCodecContext, packet: Packet[VideoStream], alone: bool) -> VideoFrame | None:
    """A frame that comes out at a packet; the first packet, `alone`, need not wait for those that follow it."""
    frames = codec.decode(packet)
    if alone and not frames and packet.is_keyframe and not packet.is_discard:
        frames = codec.decode(None)
        codec.flush_buffers()
        if not frames:
            frames = codec.decode(packet)
    return frames[0] if frames else None


def _refuse_torn(path: Path, container: InputContainer, stream: VideoStream, size: int) -> None:
    """An mp4 or mov lists where each frame lies: what lies beyond the end of the file was never copied."""
    if not container.format.name.startswith("mov"):
        return
    beyond = sum(entry.pos + entry.size > size for entry in stream.index_entries)
    if beyond:
        raise VideoError(f"{path}: torn: {beyond} of {len(stream.index_entries)} frames lie beyond the end of the file")


def _frame_rate(path: Path, stream: VideoStream, sound: bool) -> float:
    """Frames a second: the average if the timestamps are sound, else the rate that the stream states."""
    rates = (stream.average_rate, stream.guessed_rate) if sound else (stream.guessed_rate, stream.base_rate)
    for rate in rates:
        if rate and 0 < rate < _MAX_FPS:
            return float(rate)
    raise VideoError(f"{path}: has no usable frame rate (it states {rates[0]})")


def _duration_s(shown_pts: Sequence[int | None], fps: float, stream: VideoStream) -> float:
    """What the timestamps span, if they are known and say otherwise than the rate by more than a frame."""
    by_rate_s = len(shown_pts) / fps
    times = [pts for pts in shown_pts if pts is not None]
    if stream.time_base is None or len(set(times)) < len(shown_pts):
        return by_rate_s
    by_times_s = float((max(times) - min(times)) * stream.time_base) + 1 / fps
    return by_times_s if abs(by_times_s - by_rate_s) > 1 / fps else by_rate_s


def _suits_decord(container: str, stream: VideoStream) -> bool:
    return (
        container in _DECORD_CONTAINERS
        and stream.codec_context.name in _DECORD_CODECS
        and stream.width >= _DECORD_MIN_WIDTH
        and stream.width not in _DECORD_REFUSED_WIDTHS
    )


def upright(size: tuple[int, int], rotation: int) -> tuple[int, int]:
    """(height, width) after turning by `rotation` degrees; turning back is the same."""
    return size if rotation % 180 == 0 else (size[1], size[0])


@contextmanager
def open_container(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file opened by PyAV and its video stream, to be decoded by one thread; PyAV's errors become `VideoError`."""
    import av

    file_size(path)
    try:
        # An absolute path is never taken for an address, and foreign metadata need not be text.
        with av.open(os.path.abspath(path), options=_OPEN_OPTIONS, metadata_errors="replace") as container:
            yield container, _video_stream(path, container)
    except VideoError:
        raise
    except (av.FFmpegError, OSError, EOFError, ValueError) as error:
        raise VideoError(f"{path}: cannot be read as a video: {reason(error)}") from None


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    from av.stream import Disposition

    name = container.format.name
    if name in _NOT_VIDEO or name.endswith("_pipe"):
        raise VideoError(f"{path}: not a video file (FFmpeg takes it for {name})")
    stream = container.streams.best("video")
    if stream is None or Disposition.attached_pic in stream.disposition:  # the cover of a piece of music
        raise VideoError(f"{path}: holds no video stream")
    video = cast("VideoStream", stream)
    if video.codec_context is None:
        raise VideoError(f"{path}: FFmpeg has no decoder for its video")
    video.thread_type = "NONE"
    return video


def _digest(content: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(content, digest_size=16)


def content_hash(path: Path) -> str:
    """32 hex digits of a file's bytes, or of the names and bytes of a folder's images.

    Raises `VideoError` if they cannot be read.
    """
    if not path.is_dir():
        return _hash_of_bytes(path)
    lines = []
    for image in image_files(path):
        with naming(path, image):
            lines.append(f"{image.name}\t{_hash_of_bytes(image)}\n")
    return _digest("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _hash_of_bytes(path: Path) -> str:
    digest = _digest()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()


@functools.cache
def decord_module() -> ModuleType | None:
    """Decord, quiet; None where it is not installed: it has wheels for few platforms."""
    try:
        import decord
    except (ImportError, OSError, RuntimeError):
        return None
    decord.logging.set_level(decord.logging.QUIET)
    return decord
