"""Readers return exactly the requested frames, or raise an error that names the file."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageOps, features
from test_frame_accuracy import real_clips

from video_files import cut_by_copy, numbered, numbers_of, write_tiled_heic, write_video, write_without_times
from videoadapt.data.video.images import IMAGE_FOLDER_FPS
from videoadapt.data.video.probe import probe
from videoadapt.data.video.readers import DecordReader, PyAVReader, decord_module, open_video
from videoadapt.errors import VideoError

needs_decord = pytest.mark.skipif(decord_module() is None, reason="decord has no wheel for this platform")
SCATTERED = [37, 0, 12, 13, 12, 39, 5]


@pytest.mark.parametrize("reader", [pytest.param("decord", marks=needs_decord), "pyav"])
def test_a_known_file_is_looked_up_once(tmp_path: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system, each question by name goes to a server that all ranks ask."""
    path = write_video(tmp_path / "a.mp4", 40)
    info, questions, stat = probe(path), [], os.stat

    def noted(name: Any, *words: Any, **options: Any) -> os.stat_result:
        questions.extend([name] if str(name) == str(path) else [])
        return stat(name, *words, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", noted)
        open_video(path, reader, info).frames([3, 9])  # type: ignore[arg-type]
    assert len(questions) == 1


@needs_decord
@pytest.mark.parametrize("gop", [12, 250])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_decord_and_pyav_return_the_same_frames(tmp_path: Path, gop: int, b_frames: int) -> None:
    path = write_video(tmp_path / "a.mp4", 40, gop=gop, b_frames=b_frames)
    decord, pyav = open_video(path, "decord"), open_video(path, "pyav")
    assert (type(decord), type(pyav)) == (DecordReader, PyAVReader)
    for indices in (SCATTERED, range(40)):
        assert np.array_equal(decord.frames(indices), pyav.frames(indices))


@pytest.mark.parametrize(
    ("name", "codec", "trusted"),
    [
        ("a.mp4", "libx264", "decord"),
        ("a.mkv", "libx264", "decord"),
        ("a.flv", "libx264", "decord"),
        ("a.mov", "libx264", "decord"),
        ("a.webm", "libvpx-vp9", "decord"),
        ("a.ts", "libx264", "pyav"),  # decord reads MPEG-TS wrong
        ("a.avi", "mpeg4", "pyav"),  # with B-frames decord has these out of order
        ("a.mp4", "mpeg4", "pyav"),
    ],
)
def test_auto_returns_exactly_the_requested_frames(tmp_path: Path, name: str, codec: str, trusted: str) -> None:
    path = write_video(tmp_path / name, 40, codec=codec)
    info = probe(path)
    assert info.reader == trusted
    assert (info.frames, info.fps, info.width, info.height, info.rotation) == (40, 30.0, 96, 64, 0)
    assert info.duration_s == pytest.approx(40 / 30)
    video = open_video(path)
    assert (len(video), video.num_frames, video.fps) == (40, 40, 30.0)
    frames = video.frames(SCATTERED)
    assert frames.shape == (len(SCATTERED), 64, 96, 3)
    assert frames.dtype == np.uint8
    assert numbers_of(frames) == SCATTERED


@pytest.mark.parametrize("reader", ["auto", "pyav"])
def test_rotation_is_applied(tmp_path: Path, reader: str) -> None:
    upright = numbered(6, height=96, width=64)
    # As a phone stores it: the picture lies on its side, and the metadata ask for 90 degrees anticlockwise.
    path = write_video(tmp_path / "phone.mp4", np.rot90(upright, -1, axes=(1, 2)), rotation=90)
    video = open_video(path, "pyav" if reader == "pyav" else "auto")
    assert (video.height, video.width, probe(path).rotation) == (96, 64, 90)
    assert numbers_of(video.frames(range(6))) == list(range(6))


def test_a_photograph_in_tiles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"a\.heic: a photograph in tiles.* convert it to JPEG"):
        probe(write_tiled_heic(tmp_path / "a.heic"))


@pytest.mark.skipif(not features.check("avif"), reason="Pillow cannot write AVIF")
def test_a_whole_photograph_in_avif_is_read(tmp_path: Path) -> None:
    Image.fromarray(numbered(1)[0]).save(tmp_path / "a.avif")
    assert numbers_of(open_video(tmp_path / "a.avif").frames([0])) == [0]


@pytest.mark.parametrize("name", ["one.mp4", "one.mkv", "one.avi"])
def test_a_video_of_one_frame(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, 1, codec="mpeg4" if name.endswith("avi") else "libx264")
    video = open_video(path)
    assert len(video) == 1
    assert numbers_of(video.frames([0, 0])) == [0, 0]


@pytest.mark.parametrize(("height", "width"), [(63, 65), (64, 48), (64, 16), (33, 129)])
def test_odd_and_narrow_sizes(tmp_path: Path, height: int, width: int) -> None:
    path = write_video(tmp_path / "odd.mp4", numbered(20, height, width), pixels="yuv444p")
    frames = open_video(path).frames(range(20))
    assert frames.shape == (20, height, width, 3)
    assert numbers_of(frames) == list(range(20))


def test_a_stream_copy_cut_starts_at_its_first_displayed_frame(tmp_path: Path) -> None:
    path = cut_by_copy(write_video(tmp_path / "a.mp4", 40), tmp_path / "cut.mp4", first_frame=5)
    video = open_video(path)
    assert probe(path).reader == "pyav"
    assert numbers_of(video.frames(range(len(video)))) == list(range(5, 40))


def test_metadata_need_not_be_utf_8(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 6, metadata={"title": "ZZZZZZZZ"})
    content = path.read_bytes()
    assert content.count(b"ZZZZZZZZ") == 1
    path.write_bytes(content.replace(b"ZZZZZZZZ", b"caf\xe9\xff\xfe:)"))  # Latin-1
    assert numbers_of(open_video(path, "pyav").frames(range(6))) == list(range(6))


def test_packets_without_times_are_read_in_order_at_the_declared_rate(tmp_path: Path) -> None:
    path = write_without_times(write_video(tmp_path / "a.mp4", 40, b_frames=0), tmp_path / "b.mp4")
    video = open_video(path)
    assert probe(path).reader == "pyav"
    assert 1 <= video.fps <= 60  # from the times, the average would be in the thousands
    assert numbers_of(video.frames(SCATTERED)) == SCATTERED


@pytest.mark.parametrize("reader", ["decord", "pyav"])
def test_frames_outside_the_video_are_refused(tmp_path: Path, reader: str) -> None:
    video = open_video(write_video(tmp_path / "a.mp4", 10), "pyav" if reader == "pyav" else "auto")
    for outside in ([-1], [0, 10]):
        with pytest.raises(VideoError, match="has frames 0 to 9"):
            video.frames(outside)
    assert video.frames([]).shape == (0, 64, 96, 3)


def test_an_image_is_a_video_of_one_frame_with_its_exif_rotation(tmp_path: Path) -> None:
    picture = numbered(1, start=421)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned 90 degrees clockwise
    Image.fromarray(np.rot90(picture)).save(tmp_path / "phone.jpg", exif=exif)
    Image.fromarray(picture).convert("P").save(tmp_path / "palette.png")
    for name in ("phone.jpg", "palette.png"):
        image = open_video(tmp_path / name)
        assert (len(image), image.fps, image.height, image.width) == (1, 1.0, 64, 96)
        assert numbers_of(image.frames([0, 0])) == [421, 421]
        assert probe(tmp_path / name).reader == "image"


def test_a_damaged_exif_tag_does_not_hide_the_orientation(tmp_path: Path) -> None:
    entry = struct.Struct("<HHI4s")  # tag, type, count, value
    make = entry.pack(0x010F, 12, 1, (38).to_bytes(4, "little"))  # the maker: a number, where a text belongs
    orientation = entry.pack(0x0112, 3, 1, (6).to_bytes(4, "little"))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + make + orientation + bytes(4) + struct.pack("<d", 1.5)
    Image.fromarray(np.rot90(numbered(1, start=421)[0])).save(tmp_path / "phone.jpg", exif=exif)
    assert numbers_of(open_video(tmp_path / "phone.jpg").frames([0])) == [421]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_exif_orientation_is_that_of_pillow(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(numbered(1, start=77)[0]).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        turned = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(open_video(tmp_path / "a.png").frames([0])[0], turned)


def test_postscript_under_the_name_of_a_photograph_runs_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(VideoError, match="cannot identify image file"):
        open_video(tmp_path / "a.jpg")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["long", "null"])
def test_a_name_that_no_file_can_have_is_a_video_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(VideoError):
        open_video(tmp_path / name)


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "libx264"), ("a.ts", "libx265"), ("a.ts", "mpeg2video")])
def test_a_stream_that_begins_inside_a_gop_has_the_frames_that_players_show(
    tmp_path: Path, name: str, codec: str
) -> None:
    whole = write_video(tmp_path / name, 60, codec=codec, gop=20)
    with av.open(str(whole)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    cut = tmp_path / f"cut{whole.suffix}"
    cut.write_bytes(whole.read_bytes()[positions[5] :])
    with av.open(str(cut)) as container:
        played = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0) if not frame.is_corrupt]
    video = open_video(cut)
    read = numbers_of(video.frames(range(len(video))))
    assert 39 <= len(read) < 55 and read == numbers_of(np.stack(played))[-len(read) :]


def test_a_grey_image_of_16_bits_keeps_its_greys(tmp_path: Path) -> None:
    greys = np.arange(0, 256 * 64, 4, dtype=np.uint16).reshape(64, 64) * 4
    Image.fromarray(greys).save(tmp_path / "a.png")
    frame = open_video(tmp_path / "a.png").frames([0])[0]  # (64, 64, 3)
    assert np.array_equal(frame, np.repeat(greys[..., None] >> 8, 3, axis=2))


def write_images(folder: Path, names: Sequence[str]) -> Path:
    """A folder of images. Each image carries its index in `names`."""
    folder.mkdir(parents=True)
    for name, picture in zip(names, numbered(len(names)), strict=True):
        Image.fromarray(picture).save(folder / name)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [f"img_{number:05}.jpg" for number in range(12)],
        [f"{number}.png" for number in range(12)],  # 10 must come after 9
        ["a2b1.jpg", "a2b10.jpg", "a10b2.jpg"],
    ],
)
def test_a_folder_of_images_is_a_video(tmp_path: Path, names: list[str]) -> None:
    folder = write_images(tmp_path / "clip", names)
    (folder / "notes.txt").write_text("no image")
    (folder / "._img.jpg").write_bytes(b"written by a file manager")
    info = probe(folder)
    assert (info.frames, info.fps, info.container, info.reader) == (len(names), IMAGE_FOLDER_FPS, "folder", "image")
    assert (info.height, info.width, info.codec) == (64, 96, names[0][-3:])
    assert info.bytes == sum((folder / name).stat().st_size for name in names)
    wanted = [len(names) - 1, 0, 1, 1]
    assert numbers_of(open_video(folder, info=info).frames(wanted)) == wanted


FLOW = [f"flow_{axis}_{number:05}.jpg" for axis in "xy" for number in range(4)]
FRAMES = [f"img_{number:05}.jpg" for number in range(4)]


@pytest.mark.parametrize("beside", [FLOW, [name.removeprefix("flow_") for name in FLOW], ["cover.jpg"]])
def test_optical_flow_and_other_images_are_not_frames(tmp_path: Path, beside: list[str]) -> None:
    folder = write_images(tmp_path / "clip", [*FRAMES, *beside])
    assert probe(folder).frames == 4
    assert numbers_of(open_video(folder).frames(range(4))) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "names", [["left_1.jpg", "right_1.jpg"], ["img_1.jpg", "img_1.png"], ["a.jpg", "b.jpg"], FLOW], ids=len
)
def test_a_folder_with_ambiguous_frames_is_refused(tmp_path: Path, names: list[str]) -> None:
    folder = write_images(tmp_path / "clip", names)
    with pytest.raises(VideoError, match=r"clip: holds images named .*; expected the frames of one video"):
        open_video(folder)


def test_the_content_hash_of_a_folder_covers_only_its_frames(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clip", [*FRAMES, *FLOW])
    content = probe(folder).content
    (folder / FLOW[0]).write_bytes(b"another")
    assert probe(folder).content == content
    image = folder / FRAMES[2]
    image.write_bytes(image.read_bytes()[:-1] + b"x")  # as long as before
    assert probe(folder).content != content


def test_opening_a_file_does_not_hash_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 6)

    def refuse(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr("videoadapt.data.video.probe.content_hash", refuse)
    assert len(open_video(path)) == 6


def test_only_the_requested_images_of_a_folder_are_opened(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clip", ["0.png", "1.png", "2.png"])
    (folder / "1.png").write_bytes(b"torn")
    Image.fromarray(numbered(1, 32, 48)[0]).save(folder / "2.png")
    video = open_video(folder)
    assert numbers_of(video.frames([0])) == [0]
    with pytest.raises(VideoError, match=rf"^{folder}: 1.png: cannot be read as an image"):
        video.frames([0, 1])
    with pytest.raises(VideoError, match=rf"^{folder}: 2.png: is 48x32, but the first image of its video is 96x64"):
        video.frames([2])


def test_a_folder_that_changed_or_has_no_images_is_refused(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clip", ["0.png", "1.png"])
    info = probe(folder)
    (folder / "1.png").unlink()
    with pytest.raises(VideoError, match="has 1 frames, but had 2 when it was indexed"):
        open_video(folder, info=info)
    assert probe(folder).content != info.content
    (folder / "0.png").unlink()
    with pytest.raises(VideoError, match="a folder without images"):
        open_video(folder)


@needs_decord
def test_decord_is_refused_for_files_that_it_is_not_trusted_with(tmp_path: Path) -> None:
    stream = write_video(tmp_path / "a.ts", 10)
    with pytest.raises(VideoError, match=r"h264 in mpegts.*use reader auto or pyav"):
        open_video(stream, "decord")
    sound = write_video(tmp_path / "a.mp4", 10)
    damaged = replace(probe(sound), reader="pyav", damage="3 of 10 frames damaged")
    with pytest.raises(VideoError, match=r"damaged, 3 of 10.*use reader auto or pyav"):
        open_video(sound, "decord", damaged)
    assert isinstance(open_video(sound, info=damaged), PyAVReader)


def bad_files(folder: Path) -> dict[Path, str]:
    """One file of each kind that is not a video, or only a part of one, and what is wrong with it."""
    whole = write_video(folder / "good" / "a.mp4", numbered(60, 128, 160)).read_bytes()
    contents = {
        "empty.mp4": b"",
        "zeros.mp4": bytes(5000),
        "text.mp4": b"not a video\n" * 50,
        "notes.txt": b"not a video\n" * 50,
        "half.mp4": whole[: len(whole) // 2],
        "playlist.mp4": b"ffconcat version 1.0\nfile good/a.mp4\n",
        "half.png": (b"\x89PNG\r\n\x1a\n" + bytes(50)),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.fromarray(numbered(1)[0]).save(folder / "image.png")
    (folder / "image.png").rename(folder / "png_called.mp4")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    messages = {
        "empty.mp4": "the file is empty",
        **dict.fromkeys(("zeros.mp4", "text.mp4", "half.mp4"), "cannot be read as a video: "),
        "notes.txt": "not a video file (FFmpeg reads it as tty)",
        "playlist.mp4": "not a video file (FFmpeg reads it as concat)",
        "half.png": "cannot be read as an image: ",
        "png_called.mp4": "not a video file (FFmpeg reads it as png_pipe)",
        "folder.mp4": "a folder without images, not a video",
        "pipe.mp4": "not a regular file",
        "no": "No such file or directory",
    }
    return {folder / name: message for name, message in messages.items()}


def test_a_file_that_is_not_a_video_gives_a_one_line_error_with_its_path(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path, cause in bad_files(tmp_path).items():
        with pytest.raises(VideoError) as caught:
            open_video(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: {cause}")
        assert "\n" not in message
        assert message.count(str(path)) == 1
    capfd_text = capfd.readouterr()
    assert "moov" not in capfd_text.err  # FFmpeg must not print its own messages


def test_a_torn_mp4_with_its_index_in_front_is_refused(tmp_path: Path) -> None:
    import av

    source, fast = write_video(tmp_path / "a.mp4", numbered(60, 128, 160)), tmp_path / "fast.mp4"
    with av.open(str(source)) as old, av.open(str(fast), "w", options={"movflags": "faststart"}) as new:
        copied = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = copied
                new.mux(packet)
    assert len(open_video(fast)) == 60
    fast.write_bytes(fast.read_bytes()[:-2000])
    with pytest.raises(VideoError, match=r"torn: \d+ of 60 frames"):
        open_video(fast)


def test_pyav_refuses_a_file_that_ends_early(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", numbered(40, 128, 160))
    info = probe(path)
    longer = replace(info, frames=50)
    with pytest.raises(VideoError, match="has 40 frames, but had 50"):
        PyAVReader(path, longer).frames([45])
    path.write_bytes(path.read_bytes()[: info.bytes // 2])  # mkv, unlike mp4, can be read up to the cut
    with pytest.raises(VideoError, match=r"has \d+ frames, but had 40"):
        PyAVReader(path, info).frames(range(40))


def test_a_file_that_changed_after_probing_is_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    info = probe(path)
    write_video(path, 30)
    with pytest.raises(VideoError, match="when it was indexed"):
        open_video(path, info=info)


def test_the_error_of_a_moved_file_tells_what_to_do(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    info = probe(path)
    path.rename(tmp_path / "b.mp4")
    with pytest.raises(VideoError, match=r"a.mp4: not found; it was moved or deleted.*run `videoadapt index`"):
        open_video(path, info=info)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_the_duration_of_uneven_frames_comes_from_their_times(tmp_path: Path, name: str) -> None:
    times_ms = [*range(0, 1000, 100), *range(5000, 6000, 20)]
    info = probe(write_video(tmp_path / name, len(times_ms), times_ms=times_ms))
    assert info.duration_s == pytest.approx(6.0, abs=0.2)


def test_without_decord_pyav_reads_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 20)
    found = probe(path)
    monkeypatch.setattr("videoadapt.data.video.readers.decord_module", lambda: None)
    assert isinstance(open_video(path), PyAVReader)
    assert isinstance(open_video(path, info=found), PyAVReader)
    with pytest.raises(ValueError, match="not installed"):
        open_video(path, "decord")


def test_real_clips_are_read_to_their_last_frame(shared: Path) -> None:
    clips = real_clips(shared)
    assert clips
    for path in clips:
        info = probe(path)
        video = open_video(path, info=info)
        wanted = [info.frames - 1, 0, info.frames // 2]
        frames = video.frames(wanted)
        assert frames.shape == (3, info.height, info.width, 3), path
        if info.reader == "decord" and info.height < 300:
            assert np.array_equal(frames, open_video(path, "pyav").frames(wanted)), path
