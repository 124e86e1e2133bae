"""Decoding with PyAV no more of a video than the wanted frames need, and knowing whether damage has reached them.

A decoder can start only at a keyframe, and of what follows a frame needs only those that others refer to. Packets come
in decoding order, which is not the order in which their frames are shown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from videoadapt.data.video.probe import open_container
from videoadapt.errors import VideoError

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

Way = Literal["skipping", "selective", "sequential"]

_KEPT_BYTES = 64 << 20  # the packets of larger files are read again for each pass over them

# A hole in a file reads as zeros, which decoders may take for a picture. H.264 and HEVC never write as many in a row,
# but to pad a stream without lengths.
_HOLE = bytes(8)


class Source(NamedTuple):
    """An open video: its decoder, and its packets in decoding order, which can be gone through again and again."""

    path: Path
    container: str
    codec: VideoCodecContext
    packets: Iterable[Packet[VideoStream]]


class Decoded(NamedTuple):
    """What came out of a decoder; `frame` is none for a packet that it could not decode."""

    pts: int | None
    frame: VideoFrame | None

    @property
    def damaged(self) -> bool:
        """Whether FFmpeg found fault with it. Frames that refer to it are not marked, and may be as wrong."""
        return self.frame is None or self.frame.is_corrupt


class PacketRange(NamedTuple):
    """Packets to be decoded in one go, by number: from a keyframe to a wanted frame, both included."""

    first: int
    last: int


@dataclass(frozen=True)
class Timeline:
    """The P packets of a video, numbered in decoding order, and its F frames in the order in which they are shown."""

    pts: np.ndarray  # (P,) int64, all different
    keyframes: np.ndarray  # (K,) packet numbers, ascending
    shown: np.ndarray  # (F,) packet numbers

    def start(self, packet: int) -> int:
        """The packet from which to decode for the frame of `packet`: the last keyframe that is shown no later.

        A frame that is decoded after a keyframe but shown before it may refer to frames before the keyframe.
        """
        before = self.keyframes[self.keyframes <= packet]
        before = before[self.pts[before] <= self.pts[packet]]
        return int(before[-1]) if len(before) else 0

    def stretches(self, packets: Iterable[int]) -> list[PacketRange]:
        """What to decode for the frames of these packets: ascending, none overlapping another."""
        stretches: list[PacketRange] = []
        for first, last in sorted((self.start(packet), packet) for packet in packets):
            if stretches and first <= stretches[-1].last:
                stretches[-1] = PacketRange(stretches[-1].first, max(last, stretches[-1].last))
            else:
                stretches.append(PacketRange(first, last))
        return stretches

    def reached(self, packet: int, damaged_pts: Iterable[int | None]) -> bool:
        """Whether damage at one of these times is in the frame of `packet` or in what it may refer to.

        Damage of unknown time is everywhere. What is shown before the keyframe is not referred to after it.
        """
        start_pts = self.pts[self.start(packet)]
        up_to_packet = set(self.pts[: packet + 1].tolist())
        return any(pts is None or (pts >= start_pts and pts in up_to_packet) for pts in damaged_pts)


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a video for decoding by one thread. Raises `VideoError`."""
    with open_container(path) as (container, stream):
        small = container.size <= _KEPT_BYTES
        packets = [packet for packet in container.demux(stream) if packet.size] if small else _PacketsOf(path)
        yield Source(path, container.format.name, stream.codec_context, packets)


class _PacketsOf:
    """The packets of a file that is too large to keep them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Packet[VideoStream]]:
        with open_container(self.path) as (container, stream):
            yield from (packet for packet in container.demux(stream) if packet.size)


def read_timeline(source: Source) -> Timeline | None:
    """The timeline of all packets of a video; none if their times do not tell which frame is shown when."""
    times: list[int | None] = []
    keyframes, shown = [], []
    as_decoded = True
    for number, packet in enumerate(source.packets):
        times.append(packet.pts)
        as_decoded &= packet.pts == packet.dts
        if packet.is_keyframe:
            keyframes.append(number)
        if not packet.is_discard:
            shown.append(number)
    if None in times or len(set(times)) < len(times):
        return None
    # Avi holds no times of showing, and some writers copy those of decoding: wrong as soon as frames change places.
    if source.codec.has_b_frames and (as_decoded or source.container == "avi"):
        return None
    pts, numbers = np.array(times, np.int64), np.array(shown, np.int64)
    return Timeline(pts, np.array(keyframes, np.int64), numbers[np.argsort(pts[numbers])])


def frames_by_time(
    source: Source, timeline: Timeline, wanted: Collection[int], way: Way
) -> Iterator[tuple[int, VideoFrame]]:
    """The wanted frames with their numbers, as they come; raises `VideoError` after them if one is damaged or missing.

    `selective` decodes from keyframes, `skipping` does without the frames that no other refers to, `sequential` decodes
    from the start of the file.
    """
    packet_of = {number: int(timeline.shown[number]) for number in wanted}
    number_at: dict[int | None, int] = {int(timeline.pts[packet]): number for number, packet in packet_of.items()}
    last = max(packet_of.values())
    stretches = [PacketRange(0, last)] if way == "sequential" else timeline.stretches(packet_of.values())
    needed = set(packet_of.values()) if way == "skipping" else None
    damaged_pts: list[int | None] = []
    missing, latest_pts = set(wanted), None
    for decoded in decode(source.codec, _chosen(source, stretches, needed)):
        if decoded.damaged:
            damaged_pts.append(decoded.pts)
        elif latest_pts is not None and decoded.pts is not None and decoded.pts < latest_pts:
            damaged_pts.append(None)  # times that go back are wrong, no one knows where
        else:
            latest_pts = decoded.pts
        number = number_at.get(decoded.pts)
        if decoded.frame is not None and number is not None:
            missing.discard(number)
            yield number, decoded.frame
    for number, packet in packet_of.items():
        if damaged_pts and timeline.reached(packet, damaged_pts):
            raise VideoError(f"{source.path}: frame {number} is damaged")
        if number in missing:
            raise VideoError(f"{source.path}: frame {number} does not come out of the decoder")


def frames_by_count(source: Source, wanted: Collection[int]) -> Iterator[tuple[int, VideoFrame]]:
    """The wanted frames with their numbers, for a video without sound times: decoded from the start, and counted.

    Raises `VideoError` at one that is damaged, or cannot be counted because one before it is lost.
    """
    damaged = False
    number, last = 0, max(wanted)
    for decoded in decode(source.codec, chain(source.packets, [None])):
        if decoded.frame is None:
            raise VideoError(f"{source.path}: frame {number} cannot be decoded")
        damaged = decoded.damaged or (damaged and not decoded.frame.key_frame)
        if number in wanted:
            if damaged:
                raise VideoError(f"{source.path}: frame {number} is damaged")
            yield number, decoded.frame
        if number == last:
            return
        number += 1
    raise VideoError(f"{source.path}: ended after {number} frames, before frame {last}")


def decode(codec: VideoCodecContext, packets: Iterable[Packet[VideoStream] | None]) -> Iterator[Decoded]:
    """Frames in the order in which they are shown, and packets that cannot be decoded.

    None, as a packet, brings out what the decoder holds back.
    """
    import av

    holes_show = codec.name in {"h264", "hevc"} and _has_record(codec)
    for packet in packets:
        if holes_show and packet is not None and _HOLE in bytes(packet):
            yield Decoded(packet.pts, None)
            continue
        try:
            frames = codec.decode(packet)
        except (av.FFmpegError, EOFError, ValueError):
            yield Decoded(packet.pts if packet is not None else None, None)
        else:
            yield from (Decoded(frame.pts, frame) for frame in frames)


def _chosen(
    source: Source, stretches: Iterable[PacketRange], needed: Collection[int] | None
) -> Iterator[Packet[VideoStream] | None]:
    """The packets of the stretches, each decoded from a fresh start to its end.

    Given the `needed` ones, the decoder skips those of the others that no frame refers to.
    """
    codec = source.codec
    skips = needed is not None and _marks_unreferred(codec)
    codec.flush_buffers()
    codec.skip_frame = "DEFAULT"
    left = iter(stretches)
    stretch = next(left)
    for number, packet in enumerate(source.packets):
        if number < stretch.first:
            continue
        if needed is not None and skips:
            codec.skip_frame = "DEFAULT" if number in needed else "NONREF"
        yield packet
        if number == stretch.last:
            yield None
            codec.flush_buffers()
            if (following := next(left, None)) is None:
                return
            stretch = following


def _marks_unreferred(codec: VideoCodecContext) -> bool:
    """Whether the decoder can tell which frames no other refers to."""
    if codec.name == "hevc" and codec.extradata and _has_record(codec):
        # With several temporal layers the mark counts within a layer only. Byte 21 of the record tells how many.
        return codec.extradata[21] >> 3 & 7 == 1
    return codec.name == "h264"


def _has_record(codec: VideoCodecContext) -> bool:
    """Whether an H.264 or HEVC stream is as in mp4 and mkv: its units after their lengths, its settings in a record."""
    return (codec.extradata or b"")[:1] == b"\x01"
