"""Decodes with PyAV only the packets that the requested frames need, and checks whether damage affects them.

A decoder can start only at a keyframe. After it, a frame needs only the packets that it refers to. Packets are stored
in decoding order, which differs from display order if there are B-frames.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from videoadapt.data.video.frame_times import usable_times
from videoadapt.data.video.limits import DEFAULT_LIMITS, Limits
from videoadapt.data.video.probe import CUT_ANYWHERE, PacketTimes, open_container, shows_display_times
from videoadapt.errors import VideoError, plural

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

DecodeMode = Literal["skipping", "selective", "sequential"]  # from fast to safe, see `frames_by_time`
DECODE_MODES: tuple[DecodeMode, ...] = ("skipping", "selective", "sequential")

_MAX_CACHED_BYTES = 64 << 20  # packets of larger files are not kept in memory, but read again for each pass

# A hole in a file (a failed copy) reads as zeros, and decoders may turn zeros into a picture. H.264 and HEVC never
# write eight zero bytes in a row, except as padding in streams without length prefixes.
_HOLE = bytes(8)


class Source(NamedTuple):
    """An open video: its decoder, and its packets in decoding order. `packets` can be iterated several times."""

    path: Path
    container: str
    codec: VideoCodecContext
    packets: Iterable[Packet[VideoStream]]


class Decoded(NamedTuple):
    """One result of a decoder; `frame` is None for a packet that it could not decode."""

    pts: int | None
    frame: VideoFrame | None

    @property
    def damaged(self) -> bool:
        """Whether FFmpeg found an error. Frames that refer to this one may be wrong too, but are not marked."""
        return self.frame is None or self.frame.is_corrupt


class PacketRange(NamedTuple):
    """Packet numbers to decode in one pass, both ends included: from a keyframe to a requested frame."""

    first: int
    last: int


@dataclass(frozen=True)
class Timeline:
    """The P packets of a video, numbered in decoding order, and its F frames in display order."""

    pts: np.ndarray  # (P,) int64, presentation timestamps, all different
    keyframes: np.ndarray  # (K,) packet numbers, ascending
    shown: np.ndarray  # (F,) packet number of each frame; hidden packets have none (`PacketTimes.shown`)

    def decode_start(self, packet: int) -> int:
        """Returns the packet where decoding must start for the frame of `packet`: a keyframe, or 0.

        It is the last keyframe that is displayed at or before the time of `packet`. A frame that is decoded after a
        keyframe but displayed before it may refer to frames before the keyframe (open GOP).
        """
        before = self.keyframes[self.keyframes <= packet]
        before = before[self.pts[before] <= self.pts[packet]]
        return int(before[-1]) if len(before) else 0

    def ranges(self, packets: Iterable[int]) -> list[PacketRange]:
        """Returns the ranges to decode for the frames of these packets: ascending, without overlap."""
        ranges: list[PacketRange] = []
        for first, last in sorted((self.decode_start(packet), packet) for packet in packets):
            if ranges and first <= ranges[-1].last:
                ranges[-1] = PacketRange(ranges[-1].first, max(last, ranges[-1].last))
            else:
                ranges.append(PacketRange(first, last))
        return ranges

    def affected(self, packet: int, damaged_pts: Iterable[int | None]) -> bool:
        """Returns whether damage at one of these times may be visible in the frame of `packet`.

        Damage at an unknown time (None) affects every frame. Frames displayed before a keyframe do not affect frames
        after it.
        """
        start_pts = self.pts[self.decode_start(packet)]
        up_to_packet = set(self.pts[: packet + 1].tolist())
        return any(pts is None or (pts >= start_pts and pts in up_to_packet) for pts in damaged_pts)


@contextmanager
def open_source(path: Path, limits: Limits = DEFAULT_LIMITS) -> Iterator[Source]:
    """Opens a video for decoding in one thread.

    Raises:
        VideoError: The file cannot be read as a video.
    """
    with open_container(path, limits) as (container, stream):
        small = container.size <= _MAX_CACHED_BYTES
        packets = [packet for packet in container.demux(stream) if packet.size] if small else _PacketsOf(path, limits)
        yield Source(path, container.format.name, stream.codec_context, packets)


class _PacketsOf:
    """The packets of a large file. They are not kept in memory: each iteration reads the file again."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self.limits = path, limits

    def __iter__(self) -> Iterator[Packet[VideoStream]]:
        with open_container(self.path, self.limits) as (container, stream):
            yield from (packet for packet in container.demux(stream) if packet.size)


def read_timeline(source: Source) -> Timeline | None:
    """Reads the times of all packets. Returns None if they do not show when each frame is displayed."""
    read = PacketTimes(source.container)
    for packet in source.packets:
        read.add(packet)
    if None in read.times or len(set(read.times)) < len(read.times):
        return None
    if not shows_display_times(source.container, source.codec, read.decoding_order):
        return None
    pts, numbers = np.array(read.times, np.int64), np.array(read.shown(), np.int64)
    return Timeline(pts, np.array(read.keyframes, np.int64), numbers[np.argsort(pts[numbers])])


def display_times(path: Path, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Reads when each frame of a video is displayed, in seconds after the first frame: (F,) float64, ascending.

    Raises:
        VideoError: The file cannot be read as a video, or its timestamps are not usable any more.
    """
    with open_container(path, limits) as (container, stream):
        read = PacketTimes(container.format.name)
        for packet in container.demux(stream):
            if packet.size:
                read.add(packet)
        times = usable_times([read.times[number] for number in read.shown()], stream.time_base)
        if times is None or stream.time_base is None:
            raise VideoError(f"{path}: its timestamps are missing or broken, but were not when it was indexed")
        return times * float(stream.time_base)


def frames_by_time(
    source: Source, timeline: Timeline, wanted: Collection[int], mode: DecodeMode
) -> Iterator[tuple[int, VideoFrame]]:
    """Decodes the wanted frames, recognised by their timestamps.

    Args:
        source: The video.
        timeline: Its packets.
        wanted: Frame numbers.
        mode: `selective` decodes from keyframes. `skipping` also leaves out frames that no other frame refers to.
            `sequential` decodes from the start of the file.

    Yields:
        Frame number and frame, in display order.

    Raises:
        VideoError: A wanted frame is damaged or missing. Raised after the last frame.
    """
    packet_of = {number: int(timeline.shown[number]) for number in wanted}
    number_at: dict[int | None, int] = {int(timeline.pts[packet]): number for number, packet in packet_of.items()}
    last = max(packet_of.values())
    ranges = [PacketRange(0, last)] if mode == "sequential" else timeline.ranges(packet_of.values())
    needed = set(packet_of.values()) if mode == "skipping" else None
    damaged_pts: list[int | None] = []
    missing, latest_pts = set(wanted), None
    for decoded in decode(source.codec, _packets_in(source, ranges, needed)):
        if decoded.damaged:
            damaged_pts.append(decoded.pts)
        elif latest_pts is not None and decoded.pts is not None and decoded.pts < latest_pts:
            # Frames come in display order, so one of the two times is wrong. It is unknown which one.
            damaged_pts.append(None)
        else:
            latest_pts = decoded.pts
        number = number_at.get(decoded.pts)
        if decoded.frame is not None and number is not None:
            missing.discard(number)
            yield number, decoded.frame
    # Only now, because a frame may refer to a damaged frame that is displayed after it.
    for number, packet in packet_of.items():
        if damaged_pts and timeline.affected(packet, damaged_pts):
            raise VideoError(f"{source.path}: frame {number} is damaged")
        if number in missing:
            raise VideoError(f"{source.path}: the decoder returns no frame {number}")


def frames_by_count(source: Source, wanted: Collection[int]) -> Iterator[tuple[int, VideoFrame]]:
    """Decodes the wanted frames of a video without reliable times: from the start, counting frames.

    Args:
        source: The video.
        wanted: Frame numbers.

    Yields:
        Frame number and frame, in display order.

    Raises:
        VideoError: A wanted frame is damaged, or cannot be counted because an earlier frame is lost.
    """
    damaged = False
    number, last = 0, max(wanted)
    keyframes = (number for number, packet in enumerate(source.packets) if packet.is_keyframe)
    first = next(keyframes, 0) if source.container in CUT_ANYWHERE else 0
    for decoded in decode(source.codec, chain(islice(source.packets, first, None), [None])):
        if decoded.frame is None:
            raise VideoError(f"{source.path}: frame {number} cannot be decoded")
        damaged = decoded.damaged or (damaged and not decoded.frame.key_frame)  # a keyframe ends the damage
        if number in wanted:
            if damaged:
                raise VideoError(f"{source.path}: frame {number} is damaged")
            yield number, decoded.frame
        if number == last:
            return
        number += 1
    raise VideoError(f"{source.path}: ended after {plural(number, 'frame')}, before frame {last}")


def decode(codec: VideoCodecContext, packets: Iterable[Packet[VideoStream] | None]) -> Iterator[Decoded]:
    """Decodes packets.

    Args:
        codec: The decoder.
        packets: Packets in decoding order. None makes the decoder return the frames that it still holds.

    Yields:
        Frames in display order, and an entry without a frame for each packet that cannot be decoded.
    """
    import av

    holes_detectable = codec.name in {"h264", "hevc"} and _is_length_prefixed(codec)
    for packet in packets:
        if holes_detectable and packet is not None and _HOLE in bytes(packet):
            yield Decoded(packet.pts, None)
            continue
        try:
            frames = codec.decode(packet)
        except (av.FFmpegError, EOFError, ValueError):
            yield Decoded(packet.pts if packet is not None else None, None)
        else:
            yield from (Decoded(frame.pts, frame) for frame in frames)


def _packets_in(
    source: Source, ranges: Iterable[PacketRange], needed: Collection[int] | None
) -> Iterator[Packet[VideoStream] | None]:
    """Yields the packets of each range, then None, and resets the decoder between ranges.

    With `needed`, the decoder skips all other packets that no frame refers to.
    """
    codec = source.codec
    skips = needed is not None and _marks_unreferenced(codec)
    # The reader may have used this decoder for an earlier mode.
    codec.flush_buffers()
    codec.skip_frame = "DEFAULT"
    remaining = iter(ranges)
    current = next(remaining)
    for number, packet in enumerate(source.packets):
        if number < current.first:
            continue
        if needed is not None and skips:
            codec.skip_frame = "DEFAULT" if number in needed else "NONREF"
        yield packet
        if number == current.last:
            yield None
            codec.flush_buffers()
            if (following := next(remaining, None)) is None:
                return
            current = following


def _marks_unreferenced(codec: VideoCodecContext) -> bool:
    """Returns whether the decoder can recognise frames that no other frame refers to."""
    if codec.name == "hevc" and codec.extradata and _is_length_prefixed(codec):
        # With several temporal layers the mark is valid only inside a layer. Bits 3 to 5 of byte 21 of the HEVC
        # configuration record (ISO/IEC 14496-15) hold the number of layers.
        return codec.extradata[21] >> 3 & 7 == 1
    return codec.name == "h264"


def _is_length_prefixed(codec: VideoCodecContext) -> bool:
    """Returns whether each unit of an H.264 or HEVC stream follows its length, as in mp4 and mkv.

    The stream then has a configuration record, whose first byte is its version, 1.
    """
    return (codec.extradata or b"")[:1] == b"\x01"
