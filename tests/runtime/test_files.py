"""Atomic writes: a file is complete or unchanged, after exceptions and after a kill."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from videoadapt.runtime.files import replacing, write_csv, write_json, write_parquet


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # else the renaming would not be atomic
        temporary.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["a.txt"]


def test_other_users_can_read_a_new_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_the_old_file_and_no_temporary_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:
        temporary.write_text("half of the new")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_two_writers_have_different_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as one, replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last to finish
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_temporary_file_does_not_match_the_pattern_of_the_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "step-1.safetensors") as temporary:
        assert list(tmp_path.glob("step-*")) == []
        assert temporary.exists()


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = f"""
        import os, signal
        from pathlib import Path
        from videoadapt.runtime.files import replacing
        with replacing(Path({str(path)!r})) as temporary:
            temporary.write_text("half of the new")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=60)
    assert found.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_json_is_atomic_and_nan_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None, 0.1], "b": "ü"})
    assert json.loads(path.read_text()) == {"a": [1, None, 0.1], "b": "ü"}
    before = path.read_text()
    for value in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, value)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["a.json"]


def test_tables_are_read_back_equal(tmp_path: Path) -> None:
    frame = pd.DataFrame({"video": ["a", "b"], "macs": [1, 2]})
    write_parquet(tmp_path / "a.parquet", frame)
    write_csv(tmp_path / "a.csv", frame)
    assert pd.read_parquet(tmp_path / "a.parquet").equals(frame)
    assert pd.read_csv(tmp_path / "a.csv").equals(frame)
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.parquet"]
