"""Hostile lists, tables and class files: refused in one line within bounds, never a traceback, a hang or all memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from videoadapt.config.load import make_config
from videoadapt.data.index.annotations import list_videos
from videoadapt.errors import ConfigError, one_line

HEADER = "label,youtube_id,time_start,time_end,split\n"
KINETICS = '{{"{id}": {{"annotations": {{"label": {label}, "segment": {segment}}}, "subset": "train"}}}}'


def kinetics(youtube_id: str = "abcdefghijk", label: str = '"a"', segment: str = "[0, 10]") -> str:
    return KINETICS.format(id=youtube_id, label=label, segment=segment)


def refused(tmp_path: Path, name: str, text: str | bytes, classes: str = "") -> str:
    """Returns the message for a list or table that must be refused, as the command prints it."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    data: dict[str, object] = {"train": {"annotations": str(path)}}
    if classes:
        (tmp_path / "classes.txt").write_text(classes)
        data["classes"] = str(tmp_path / "classes.txt")
    begin = time.process_time()
    with pytest.raises(ConfigError) as error:
        list_videos(make_config({"data": data, "model": {"num_classes": 1}}))
    assert time.process_time() - begin < 5
    message = one_line(error.value)
    assert len(message) < 1000
    return message


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("a.txt", "a " * 1_000_000, "the line has 1999999 characters"),
        ("a.txt", "v.mp4 0\na\0b.mp4 0\n", "a.txt:2: line"),
        ("a.txt", b"a.mp4 \xff\xfe", "not a text file in UTF-8"),
        ("a.txt", "v.mp4 " + "9" * 5_000, "a.txt:1: expected `path label`"),
        (
            "a.csv",
            f"{HEADER}a,abcdefghijk,1e300,2,train",
            "a whole number of seconds",
        ),
        ("a.csv", ",".join("label" for _ in range(100_000)) + "\n", "a.csv:1: "),
        ("a.csv", f'{HEADER}"' + "x" * 200_000, "not a row of a CSV"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '{"a":' * 100_000, "nested too deeply"),
        ("a.json", "9" * 5_000, "digits"),
        ("a.json", '{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ("a.json", kinetics(segment="[" + "9" * 400 + ", 10]"), "a whole number of seconds"),
        ("a.json", kinetics(segment="[NaN, 10]"), "a whole number of seconds"),
        ("a.json", kinetics(label='"a\\u0000b"'), "none of them NUL"),
        ("a.json", kinetics(label='"\\ud800"'), "none of them NUL"),
        ("a.json", kinetics(label=f'"{"x" * 20_000}"'), "at most 10,000 characters"),
        ("a.json", kinetics(label="[[[]]]"), "expected a name"),
        ("a.json", kinetics(youtube_id="x" * 50_000), "at most 10,000 characters"),
        ("a.json", '[{"id": "a\\u0000", "template": "b"}]', "none of them NUL"),
        ("a.json", '[{"id": {"a": 1}, "template": ""}]', "has neither template nor label"),
    ],
    ids=lambda value: str(value[:24]),
)
def test_a_hostile_list_is_one_short_line_with_its_cause(
    tmp_path: Path, name: str, text: str | bytes, cause: str
) -> None:
    assert cause in refused(tmp_path, name, text)


def test_a_path_of_thousands_of_folders_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a/" * 2_000 + "v.mp4 0\n")
    config = make_config({"data": {"train": {"annotations": str(tmp_path / "a.txt")}}, "model": {"num_classes": 1}})
    assert len(list_videos(config).videos) == 1


@pytest.mark.parametrize(
    ("classes", "cause"),
    [
        ("a" + "\t" * 100_000 + "b", "a name a line"),
        ("a\0b", "none of them NUL"),
        ("x" * 501, "a name a line"),
    ],
)
def test_a_hostile_class_file_is_refused(tmp_path: Path, classes: str, cause: str) -> None:
    assert cause in refused(tmp_path, "a.txt", "v.mp4 0", classes)


@pytest.mark.parametrize("device", ["/dev/zero", "pipe"])
def test_a_pipe_or_a_device_is_no_list(tmp_path: Path, device: str) -> None:
    path = tmp_path / "pipe" if device == "pipe" else Path(device)
    if device == "pipe":
        os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"data\.train\.annotations: cannot read .*not a regular file"):
        list_videos(make_config({"data": {"train": {"annotations": str(path)}}}))
