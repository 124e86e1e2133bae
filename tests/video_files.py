"""Writes small video files for tests. Each frame carries its number, so that a test can recognise it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream

from open_encoder import open_encoder

BITS = 10  # of a frame number, which is below 1024
_ROWS = 2  # of blocks in a frame; BITS / _ROWS columns


def numbered(count: int, height: int = 64, width: int = 96, start: int = 0) -> np.ndarray:
    """Makes frames (count, height, width, 3) uint8. A grid of 2 x 5 grey blocks shows the frame's number in binary."""
    rows = np.arange(height) * _ROWS // height
    columns = np.arange(width) * (BITS // _ROWS) // width
    block = rows[:, None] * (BITS // _ROWS) + columns  # H W
    numbers = np.arange(start, start + count)[:, None, None]
    grey = np.where(numbers >> block & 1, 210, 40).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def numbers_of(frames: np.ndarray) -> list[int]:
    """Reads the numbers that `numbered` wrote, from frames (T, H, W, 3) of any size, after lossy coding."""
    _, height, width, _ = frames.shape
    columns = BITS // _ROWS
    y = ((np.arange(BITS) // columns + 0.5) * height / _ROWS).astype(int)
    x = ((np.arange(BITS) % columns + 0.5) * width / columns).astype(int)
    return [int(number) for number in (frames[:, y, x, 1] > 125) @ (1 << np.arange(BITS))]


def write_video(
    path: Path,
    frames: np.ndarray | int = 40,
    *,
    codec: str = "libx264",
    fps: int = 30,
    gop: int = 12,
    b_frames: int = 2,
    rotation: float = 0.0,
    pixels: str = "yuv420p",
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Encodes a video.

    Args:
        path: The suffix names the container.
        frames: (T, H, W, 3) uint8, or the count of numbered frames.
        codec: Name of FFmpeg's encoder.
        fps: Frame rate.
        gop: Frames from one keyframe to the next, at most.
        b_frames: B-frames in a row, at most.
        rotation: Degrees, written to the display matrix, as phones do.
        pixels: Pixel format.
        times_ms: Display time of each frame, for an uneven rate.
        options: Options of the encoder.
        muxer: Options of the container.
        metadata: Texts of the container, such as a title.

    Returns:
        The path.
    """
    images = numbered(frames) if isinstance(frames, int) else frames
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=muxer or {}) as container:
        container.metadata.update(metadata or {})
        stream = cast("VideoStream", container.add_stream(codec, rate=fps, options=options or {}))
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], pixels
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
        stream.thread_type = "NONE"
        if rotation:
            stream.set_display_rotation(rotation)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        open_encoder(stream.codec_context)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut_by_copy(source: Path, path: Path, first_frame: int) -> Path:
    """Cuts without encoding again, as `ffmpeg -ss -c copy` does: an edit list hides the frames before `first_frame`."""
    with av.open(str(source)) as old, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as new:
        video = old.streams.video[0]
        copied = new.add_stream_from_template(video)
        shift = sorted(_times(source))[first_frame]
        for packet in old.demux(video):
            if packet.size:
                packet.stream = copied
                packet.pts, packet.dts = (packet.pts or 0) - shift, (packet.dts or 0) - shift
                new.mux(packet)
    return path


def _times(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [packet.pts for packet in container.demux(video=0) if packet.pts is not None]


def write_without_times(source: Path, path: Path) -> Path:
    """Copies the packets of a file and gives all of them the time 0, as some converters do."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        video = old.streams.video[0]
        copied = new.add_stream_from_template(video)
        for packet in old.demux(video):
            if packet.size:
                packet.stream = copied
                packet.pts = packet.dts = 0
                new.mux(packet)
    return path


def write_list(path: Path, rows: Sequence[tuple[str, int | str]], separator: str = " ") -> Path:
    """Writes an annotation list, one `path label` per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}{separator}{label}\n" for name, label in rows), encoding="utf-8")
    return path


def without_default_duration(path: Path) -> Path:
    """Replaces the frame rate in the header of an mkv or webm by padding, as browsers write it."""
    data = path.read_bytes()
    start = data.find(b"\x23\xe3\x83")  # id of DefaultDuration
    length = 4 + (data[start + 3] & 0x7F)
    padding = b"\xec" + bytes([0x80 | length - 2]) + bytes(length - 2)  # a Void element
    path.write_bytes(data[:start] + padding + data[start + length :])
    return path


def write_tiled_heic(path: Path) -> Path:
    """Writes a photograph of two tiles of 64x64 pixels side by side, as phones write it (ISO/IEC 23008-12)."""
    tile = write_video(path.with_suffix(".mp4"), numbered(1, 64, 64), codec="libx265").read_bytes()
    start = tile.find(b"hvcC") - 4
    decoder = tile[start : start + int.from_bytes(tile[start : start + 4], "big")]
    with av.open(str(path.with_suffix(".mp4"))) as container:
        frame = b"".join(bytes(packet) for packet in container.demux(video=0) if packet.size)
    path.with_suffix(".mp4").unlink()

    def box(kind: bytes, *parts: bytes) -> bytes:
        return struct.pack(">I", 8 + sum(map(len, parts))) + kind + b"".join(parts)

    def full(kind: bytes, *parts: bytes, version: int = 0) -> bytes:
        return box(kind, bytes([version, 0, 0, 0]), *parts)

    def size(width: int) -> bytes:
        return full(b"ispe", struct.pack(">II", width, 64))

    items = [(b"hvc1", frame), (b"hvc1", frame), (b"grid", struct.pack(">4B2H", 0, 0, 0, 1, 128, 64))]

    def meta(place: int) -> bytes:
        named = [
            full(b"infe", struct.pack(">HH", n, 0), kind, b"\0", version=2) for n, (kind, _) in enumerate(items, 1)
        ]
        placed = b""
        for number, (_, data) in enumerate(items, 1):
            placed += struct.pack(">3H2I", number, 0, 1, place, len(data))
            place += len(data)
        shown = struct.pack(">IHBBBHBBBHBB", 3, 1, 2, 0x81, 2, 2, 2, 0x81, 2, 3, 1, 3)  # properties of each item
        return full(
            b"meta",
            full(b"hdlr", bytes(4), b"pict", bytes(13)),
            full(b"pitm", struct.pack(">H", 3)),
            full(b"iinf", struct.pack(">H", 3), *named),
            full(b"iref", box(b"dimg", struct.pack(">4H", 3, 2, 1, 2))),
            box(b"iprp", box(b"ipco", decoder, size(64), size(128)), full(b"ipma", shown)),
            full(b"iloc", b"\x44\x00", struct.pack(">H", 3), placed),
        )

    head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    place = len(head) + len(meta(0)) + 8
    path.write_bytes(head + meta(place) + box(b"mdat", *(data for _, data in items)))
    return path
