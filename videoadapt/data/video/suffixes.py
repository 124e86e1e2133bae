"""What the suffix of a file's name says about its content."""

from __future__ import annotations

import os
from typing import Literal

MediaKind = Literal["video", "image"]

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".mkv", ".webm", ".flv", ".f4v", ".avi", ".divx", ".wmv", ".asf", ".dv", ".mxf"}
    | {".ts", ".mts", ".m2ts", ".m2t", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".mpv", ".vob", ".wtv", ".dvr-ms"}
    | {
        ".3gp",
        ".3g2",
        ".ogv",
        ".ogm",
        ".rm",
        ".rmvb",
        ".nut",
        ".ivf",
        ".y4m",
        ".h264",
        ".264",
        ".h265",
        ".hevc",
        ".265",
    }
    | {".265", ".mjpg", ".mjpeg", ".mj2", ".amv", ".gif", ".insv", ".lrv", ".tod"}
)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})

# Files with these suffixes are not opened to find out whether they are videos: there may be one beside each video.
_OTHER_SUFFIXES = frozenset(
    {".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".md", ".rst", ".html", ".htm", ".pdf", ".log"}
    | {".srt", ".vtt", ".ass", ".sub", ".nfo", ".lst", ".list", ".ini", ".cfg", ".db", ".lnk", ".url", ".py", ".sh"}
    | {".wav", ".mp3", ".m4a", ".aac", ".flac", ".opus", ".wma", ".npy", ".npz", ".pt", ".pth", ".pkl", ".h5", ".hdf5"}
    | {".parquet", ".feather", ".mat", ".bin", ".md5", ".sha256", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z"}
    | {".rar", ".part", ".tmp", ".bak", ".crdownload", ".ytdl", ".aria2", ".torrent", ".psd", ".svg", ".ico", ".thm"}
)


def suffix_of(name: str) -> str:
    """Returns the suffix of a file name in lower case, with its dot; empty if it has none."""
    return os.path.splitext(name)[1].lower()


def is_video(name: str) -> bool:
    """Returns whether a file name has the suffix of a video."""
    return suffix_of(name) in VIDEO_SUFFIXES


def is_image(name: str) -> bool:
    """Returns whether a file name has the suffix of an image that is read as one frame."""
    return suffix_of(name) in IMAGE_SUFFIXES


def media_kind(name: str) -> MediaKind | None:
    """Returns what the suffix of a file name says; None if it is of neither kind."""
    if is_video(name):
        return "video"
    return "image" if is_image(name) else None


def is_media(name: str) -> bool:
    """Returns whether a file name has the suffix of a video or of an image."""
    return is_video(name) or is_image(name)


def is_known(name: str) -> bool:
    """Returns whether the suffix says what a file is. The content of any other file has to be tried."""
    return is_media(name) or suffix_of(name) in _OTHER_SUFFIXES
