"""Videos to measure loaders on: of the sizes, rates and contents of Kinetics copies, at two keyframe distances."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from videoadapt.runtime.console import Bar
from videoadapt.runtime.files import replacing

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

FPS = 30
FRAMES = 300  # 10 s, as a clip of Kinetics
GOPS = (12, 250)  # 250 is what x264 does when nobody asks, 12 what copies made for training often have
FILES = 3  # of each kind, each with content of its own

_PATCHES = 8
_NOISE = 3.0  # grey levels, as a camera's
_MARGIN = 64  # pixels that the picture is larger than the view, so that the view can wander over it


@dataclass(frozen=True)
class Size:
    """A frame size, and the bit rate that x264 is to keep."""

    width: int
    height: int
    bits_per_s: int


SIZES = (Size(340, 256, 1_000_000), Size(640, 360, 2_000_000))


def generate(folder: Path, *, sizes: tuple[Size, ...] = SIZES, frames: int = FRAMES) -> dict[str, list[Path]]:
    """The files of every kind, such as `340x256 GOP 250`, made where they are not in `folder` yet."""
    kinds: dict[str, list[Path]] = {}
    with Bar("generate", total=len(sizes) * FILES, unit="contents") as bar:
        for size in sizes:
            for number in range(FILES):
                names = {gop: folder / f"{size.width}x{size.height}_gop{gop}_{number}.mp4" for gop in GOPS}
                if not all(path.exists() for path in names.values()):
                    write_videos(names, size, render(np.random.default_rng(number), size, frames))
                for gop, path in names.items():
                    kinds.setdefault(f"{size.width}x{size.height} GOP {gop}", []).append(path)
                bar.step()
    return kinds


def render(rng: np.random.Generator, size: Size, frames: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames (H, W, 3) uint8: textured patches that move over a texture that the camera wanders over, with noise."""
    height, width = size.height, size.width
    scene = _texture(rng, height + _MARGIN, width + _MARGIN)
    patches = [_texture(rng, *rng.integers(height // 8, height // 3, 2)) for _ in range(_PATCHES)]
    wander, phases = rng.uniform(0.5, 2.0, (_PATCHES + 1, 2)), rng.uniform(0, 2 * np.pi, (_PATCHES + 1, 2))
    for t in range(frames):
        # Each moves along a figure of Lissajous: shares of its way, (patches + 1, 2), in [0, 1].
        places = (np.sin(wander * 2 * np.pi * t / FRAMES + phases) + 1) / 2
        top, left = (places[-1] * _MARGIN).astype(int)
        frame = scene[top : top + height, left : left + width].copy()
        for patch, place in zip(patches, places[:-1], strict=True):
            high, wide = patch.shape[:2]
            y, x = (place * (height - high, width - wide)).astype(int)
            frame[y : y + high, x : x + wide] = patch
        frame += rng.normal(0, _NOISE, (height, width, 1)).astype(np.float32)
        yield frame.clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """(height, width, 3), around 128: coloured noise at four scales, the finer the fainter, as in photographs."""
    picture = np.full((height, width, 3), 128, np.float32)
    for scale, amplitude in ((64, 0.5), (16, 0.25), (4, 0.15), (1, 0.05)):
        noise = rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8)
        smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        picture += (np.asarray(smooth, np.float32) - 128) * amplitude
    return picture


def write_videos(names: dict[int, Path], size: Size, frames: Iterator[npt.NDArray[np.uint8]]) -> None:
    """The same frames as H.264 in mp4 once for each keyframe distance in `names`, all written whole or not at all."""
    import av

    with ExitStack() as stack:
        outputs = []
        for gop, path in names.items():
            temporary = stack.enter_context(replacing(path))
            container = stack.enter_context(av.open(str(temporary), "w", format="mp4"))
            outputs.append((container, _add_stream(container, size, gop)))
        for image in frames:
            for container, stream in outputs:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for container, stream in outputs:
            container.mux(stream.encode())


def _add_stream(container: OutputContainer, size: Size, gop: int) -> VideoStream:
    stream = container.add_stream("libx264", rate=FPS)
    stream.width, stream.height, stream.pix_fmt = size.width, size.height, "yuv420p"
    stream.bit_rate = size.bits_per_s
    stream.codec_context.gop_size = gop
    stream.options = {"sc_threshold": "0", "threads": "1"}  # no keyframes but those of the GOP
    return stream
