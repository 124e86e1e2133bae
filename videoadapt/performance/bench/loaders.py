"""The loaders that `bench data` measures, ours and others'. Each reads the same clips in its own process."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from videoadapt.config.load import Config
from videoadapt.data.clips.datasets import Clip, Failure, TrainClips
from videoadapt.data.index.manifest import Manifest, Row
from videoadapt.data.video.decoding import display_times
from videoadapt.data.video.frame_sampling import clip_seconds, clip_starts, frame_indices
from videoadapt.data.video.readers import DecordReader, ImageReader, PyAVReader, open_video
from videoadapt.errors import UserError, VideoError
from videoadapt.performance.bench.peak import peak_bytes, reset_peak_bytes
from videoadapt.runtime.seeds import seed_of


@dataclass(frozen=True)
class Work:
    """The clips of one turn."""

    manifest: Manifest
    config: Config
    keys: list[tuple[int, int]]  # of `TrainClips`: (epoch, row of the manifest); readable videos only

    def clips(self) -> list[tuple[Row, float]]:
        """Returns for each clip its video, and the second at which `TrainClips` starts the clip."""
        rows = [(epoch, self.manifest.row(number)) for epoch, number in self.keys]
        return [(row, self._start_s(row, epoch)) for epoch, row in rows]

    def _start_s(self, row: Row, epoch: int) -> float:
        clip_s = clip_seconds(self.config.model, row.fps)
        seed = seed_of("start", self.config.run.seed, epoch, row.video)  # as in TrainClips
        return clip_starts("random", duration_s=row.frames / row.fps, clip_s=clip_s, clips=1, seed=seed)[0]


@dataclass(frozen=True)
class Turn:
    """The speed of a loader in one turn, and the peak memory of its process."""

    clips_per_cpu_s: float
    peak_bytes: int


# Yields the clips of some work one by one: (C, T, S, S), or None from a loader that only decodes.
Read = Callable[[Work], Iterator[Tensor | None]]


def start(name: str, work: Work) -> int:
    """Prepares this process for a loader: imports, one thread on one core, and a turn as warm-up.

    Returns:
        The memory of the process after the imports, in bytes.

    Raises:
        Exception: Whatever the loader raises, for example `ImportError` if its library is missing.
    """
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # some libraries start a thread for each core that they may use
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    read = LOADERS[name]()
    imported_bytes = reset_peak_bytes()
    for _ in read(work):  # the first touch of a page is slow, above all in virtual machines
        pass
    return imported_bytes


def measure(name: str, work: Work) -> Turn:
    """Reads the work with a loader that `start` has prepared."""
    clips = LOADERS[name]()(work)
    before = _cpu_s()
    for _ in clips:
        pass
    return Turn(len(work.keys) / (_cpu_s() - before), peak_bytes())


def _cpu_s() -> float:
    """Returns the CPU seconds of this process and of its finished children, the ffmpeg processes."""
    # Not psutil, which counts in clock ticks of 10 ms.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def reading_with(config: Config, reader: Literal["auto", "pyav"]) -> Config:
    """Returns the config with another `data.reader`."""
    return config.model_copy(update={"data": config.data.model_copy(update={"reader": reader})})


def unfit_files(work: Work) -> dict[str, str]:
    """Finds the files that our readers cannot read, or of which they give different frames.

    Returns:
        The cause by path.
    """
    auto, pyav = (TrainClips(work.manifest, reading_with(work.config, reader)) for reader in ("auto", "pyav"))
    causes = {}
    for key in work.keys:
        clips = auto[key], pyav[key]
        path = work.manifest.row(key[1]).path
        failed = [clip.cause for clip in clips if isinstance(clip, Failure)]
        if failed:
            causes[path] = failed[0]
        elif not torch.equal(*(clip.frames for clip in clips if isinstance(clip, Clip))):
            # Loaders that return other frames do other work, and their speeds cannot be compared.
            causes[path] = "the readers auto and pyav give different frames"
    return causes


def readers_of_auto(work: Work) -> list[str]:
    """Returns the readers that `auto` chooses for the work's videos: some of `decord`, `pyav` and `image`."""
    names = {DecordReader: "decord", PyAVReader: "pyav", ImageReader: "image"}
    return sorted({names[type(open_video(row.path, "auto", row.info))] for row, _ in work.clips()})


def _ours(reader: Literal["auto", "pyav"]) -> Read:
    import av  # noqa: F401 - here, so that its memory counts as imported

    from videoadapt.data.video.readers import decord_module

    decord_module()  # imports decord, for the same reason

    def read(work: Work) -> Iterator[Tensor]:
        dataset = TrainClips(work.manifest, reading_with(work.config, reader))
        for key in work.keys:
            clip = dataset[key]
            if isinstance(clip, Failure):
                raise VideoError(f"{clip.path}: {clip.cause}")
            yield clip.frames

    return read


def _pytorchvideo(decoder: Literal["decord", "pyav"]) -> Read:
    import av  # noqa: F401 - pytorchvideo imports it only when it reads
    from pytorchvideo.data import LabeledVideoDataset
    from pytorchvideo.data.clip_sampling import ClipInfo, ClipSampler
    from torch.utils.data import SequentialSampler

    if decoder == "decord":
        import decord  # noqa: F401

    class GivenClip(ClipSampler):
        """Takes the clip that the label of the video names."""

        def __call__(self, last_end_s: Any, duration_s: Any, label: dict[str, float]) -> ClipInfo:  # noqa: ARG002
            return ClipInfo(label["start_s"], label["end_s"], 0, 0, True)

    def read(work: Work) -> Iterator[Tensor]:
        model = work.config.model
        videos = [
            (row.path, {"start_s": start_s, "end_s": start_s + clip_seconds(model, row.fps)})
            for row, start_s in work.clips()
        ]
        clips = LabeledVideoDataset(
            videos, GivenClip(0.0), video_sampler=SequentialSampler, decode_audio=False, decoder=decoder
        )
        for clip in clips:
            frames = clip["video"]  # (C, all frames of the clip's span, H, W), float32
            wanted = torch.linspace(0, frames.shape[1] - 1, model.num_frames).long()
            yield _augment(frames[:, wanted].transpose(0, 1), work.config)  # C T H W -> T C H W

    return read


def _torchcodec() -> Read:
    from torchcodec.decoders import VideoDecoder

    def read(work: Work) -> Iterator[Tensor]:
        for row, start_s in work.clips():
            video = VideoDecoder(row.path, num_ffmpeg_threads=1, seek_mode="exact")
            frames = video.get_frames_at(_indices(row, start_s, work.config).tolist()).data  # T C H W, uint8
            yield _augment(frames, work.config)

    return read


def _ffmpeg() -> Read:
    program = shutil.which("ffmpeg")
    if program is None:
        raise UserError("ffmpeg is not on the path")

    def read(work: Work) -> Iterator[None]:
        for row, _ in work.clips():
            # Decodes the whole file and drops the frames: the least work of a loader without seeking.
            command = [program, "-v", "error", "-threads", "1", "-i", row.path, "-map", "0:v:0", "-f", "null", "-"]
            subprocess.run(command, stdin=subprocess.DEVNULL, check=True)
            yield None

    return read


def ffmpeg_version() -> dict[str, str]:
    """Returns the version of the ffmpeg on the path under its name; empty without one."""
    program = shutil.which("ffmpeg")
    if program is None:
        return {}
    words = subprocess.run([program, "-version"], capture_output=True, text=True, check=True).stdout.split()
    return {"ffmpeg": words[2]}  # "ffmpeg version 5.1.6 ..."


def _indices(row: Row, start_s: float, config: Config) -> np.ndarray:
    model = config.model
    return frame_indices(
        start_s,
        total_frames=row.frames,
        file_fps=row.fps,
        num_frames=model.num_frames,
        stride_frames=model.stride_frames,
        fps=model.fps,
        times_s=display_times(Path(row.path)) if row.variable_rate else None,
    )


def _augment(images: Tensor, config: Config) -> Tensor:
    """Resizes and crops frames as `TrainClips` does: (T, C, H, W) -> (C, T, S, S) of the same dtype."""
    size, short_side = config.model.size, config.data.short_side or (config.model.size,) * 2
    images = F.resize(images, [short_side[0]], antialias=True)
    top, left = (int(torch.randint(side - size + 1, ())) for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size].transpose(0, 1).contiguous()  # T C S S -> C T S S


OURS_AUTO, OURS_PYAV = "videoadapt, auto", "videoadapt, PyAV"
OURS: dict[str, Literal["auto", "pyav"]] = {OURS_AUTO: "auto", OURS_PYAV: "pyav"}  # the value of `data.reader`
PEER_DECORD, PEER_PYAV = "pytorchvideo, decord", "pytorchvideo, PyAV"
FFMPEG = "ffmpeg, whole file"

# For each loader's name, a function that imports the loader's library and returns the function that reads.
LOADERS: dict[str, Callable[[], Read]] = {
    **{name: partial(_ours, reader) for name, reader in OURS.items()},
    PEER_DECORD: partial(_pytorchvideo, "decord"),
    PEER_PYAV: partial(_pytorchvideo, "pyav"),
    "torchcodec, exact": _torchcodec,
    FFMPEG: _ffmpeg,
}
