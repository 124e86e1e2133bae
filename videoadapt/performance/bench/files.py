"""Generates the videos that `bench data` reads: sizes, bit rates and contents as in copies of Kinetics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

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
FILES = 3  # files of each kind, with different contents

_PATCHES = 8
_NOISE = 3.0  # standard deviation in grey levels, as of a camera's sensor
_MARGIN = 64  # pixels by which the scene is larger than a frame, so that the camera can move over it


@dataclass(frozen=True)
class Size:
    """A frame size and the bit rate of its encoder."""

    width: int
    height: int
    bits_per_s: int


@dataclass(frozen=True)
class Encoding:
    """A codec and the distance of its keyframes."""

    codec: str
    gop: int  # frames between keyframes: 12 is usual in copies made for training, 250 the default of x264

    def __str__(self) -> str:
        return f"{self.codec}, GOP {self.gop}"

    @property
    def stem(self) -> str:
        """The encoding in the name of a file."""
        return f"{self.codec.lower().replace('.', '')}_gop{self.gop}"


_ENCODERS = {"H.264": "libx264", "HEVC": "libx265", "VP9": "libvpx-vp9"}
# Without scene cuts keyframes lie exactly `gop` frames apart; one thread makes files reproducible.
_OPTIONS: dict[str, dict[str, object]] = {
    "H.264": {"sc_threshold": "0", "threads": "1"},
    "HEVC": {"x265-params": "scenecut=0:open-gop=0:pools=none:frame-threads=1:log-level=none"},
    "VP9": {"threads": "1", "deadline": "realtime", "cpu-used": "8"},
}
ENCODINGS = (Encoding("H.264", 12), Encoding("H.264", 250), Encoding("HEVC", 12), Encoding("VP9", 12))
SIZES = (Size(340, 256, 1_000_000), Size(640, 360, 2_000_000))


def generate(folder: Path, *, sizes: tuple[Size, ...] = SIZES, frames: int = FRAMES) -> dict[str, list[Path]]:
    """Writes the videos that `folder` does not have yet.

    Returns:
        The paths of all videos by kind, for example `340x256 H.264, GOP 250`.
    """
    kinds: dict[str, list[Path]] = {}
    with Bar("generate", total=len(sizes) * FILES, unit="contents") as bar:
        for size in sizes:
            for number in range(FILES):
                names = {each: folder / f"{size.width}x{size.height}_{each.stem}_{number}.mp4" for each in ENCODINGS}
                if not all(path.exists() for path in names.values()):
                    write_videos(names, size, render(np.random.default_rng(number), size, frames))
                for encoding, path in names.items():
                    kinds.setdefault(f"{size.width}x{size.height} {encoding}", []).append(path)
                bar.step()
    return kinds


def render(rng: np.random.Generator, size: Size, frames: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yields frames (H, W, 3) of textured patches that move over a textured scene, with a moving camera and noise."""
    height, width = size.height, size.width
    scene = _texture(rng, height + _MARGIN, width + _MARGIN)
    patches = [_texture(rng, *rng.integers(height // 8, height // 3, 2)) for _ in range(_PATCHES)]
    # The patches and, in the last row, the camera: (patches + 1, 2), for the vertical and the horizontal motion.
    frequencies, phases = rng.uniform(0.5, 2.0, (_PATCHES + 1, 2)), rng.uniform(0, 2 * np.pi, (_PATCHES + 1, 2))
    for t in range(frames):
        # Lissajous curves: different frequencies in both directions. Positions are fractions of the free space.
        positions = (np.sin(frequencies * 2 * np.pi * t / FRAMES + phases) + 1) / 2  # in [0, 1]
        top, left = (positions[-1] * _MARGIN).astype(int)
        frame = scene[top : top + height, left : left + width].copy()
        for patch, position in zip(patches, positions[:-1], strict=True):
            patch_height, patch_width = patch.shape[:2]
            y, x = (position * (height - patch_height, width - patch_width)).astype(int)
            frame[y : y + patch_height, x : x + patch_width] = patch
        frame += rng.normal(0, _NOISE, (height, width, 1)).astype(np.float32)  # the same in all three colours
        yield frame.clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """Returns coloured noise (height, width, 3) around 128. Amplitudes fall with the scale, as in photographs."""
    picture = np.full((height, width, 3), 128, np.float32)
    for scale, amplitude in ((64, 0.5), (16, 0.25), (4, 0.15), (1, 0.05)):
        noise = rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8)
        smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        picture += (np.asarray(smooth, np.float32) - 128) * amplitude
    return picture


def write_videos(paths: dict[Encoding, Path], size: Size, frames: Iterator[npt.NDArray[np.uint8]]) -> None:
    """Encodes the same frames in mp4 once for each encoding.

    Args:
        paths: The files by encoding. An error leaves none of them behind.
        size: Frame size and bit rate.
        frames: Arrays (H, W, 3).
    """
    import av

    with ExitStack() as stack:
        outputs = []
        for encoding, path in paths.items():
            temporary = stack.enter_context(replacing(path))
            container = stack.enter_context(av.open(str(temporary), "w", format="mp4"))
            outputs.append((container, _add_stream(container, size, encoding)))
        for image in frames:
            for container, stream in outputs:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for container, stream in outputs:
            container.mux(stream.encode())  # the frames that the encoder still holds


def _add_stream(container: OutputContainer, size: Size, encoding: Encoding) -> VideoStream:
    stream = cast("VideoStream", container.add_stream(_ENCODERS[encoding.codec], rate=FPS))
    stream.width, stream.height, stream.pix_fmt = size.width, size.height, "yuv420p"
    stream.bit_rate = size.bits_per_s
    stream.codec_context.gop_size = encoding.gop
    stream.options = _OPTIONS[encoding.codec]
    return stream
