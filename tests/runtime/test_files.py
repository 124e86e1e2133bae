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

from videoadapt.errors import UserError
from videoadapt.runtime import files
from videoadapt.runtime.files import (
    read_json,
    read_parquet,
    remove_abandoned,
    replacing,
    replacing_folder,
    write_csv,
    write_json,
    write_parquet,
)


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
    (abandoned,) = set(tmp_path.iterdir()) - {path}
    with replacing(path) as written:  # of a process that runs: this one
        assert remove_abandoned(tmp_path) == [abandoned]
        written.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_only_temporary_files_are_removed(tmp_path: Path) -> None:
    old = [".last.abcd1234", ".step-00000010.safetensors.a_bcd123", ".train.json.abcd1234"]  # without `.tmp`
    others = [".notes", ".config.yaml.download", ".gitignore", "a.abcd1234.tmp", ".nfs000000abcd", "step-1.safetensors"]
    for name in [*old, *others]:
        (tmp_path / name).write_text("x")
    assert [path.name for path in remove_abandoned(tmp_path)] == old
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    assert remove_abandoned(tmp_path / "missing") == []


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(OSError, match="No space left on device: '.*a.json'"), replacing(path):
        raise OSError(28, "No space left on device")


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


def test_damaged_json_is_an_error_with_file_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "label.json"
    for content in (b"", b'{"model": "a', b"\xff\xfe", b"[1]", b"null", b"3", b"[" * 100_000, b'{"other": 1}'):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"label\.json: damaged.*; run `label` again$") as error:
            read_json(path, "run `label` again", ["model"])
        assert len(str(error.value)) < 1000
    path.unlink()
    with pytest.raises(UserError, match=r"label\.json: does not exist; run `label` again$"):
        read_json(path, "run `label` again")
    write_json(path, {"model": "a"})
    assert read_json(path, "", ["model"]) == {"model": "a"}


def test_every_flipped_bit_of_a_table_is_found_or_changes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "outcomes.parquet"
    frame = pd.DataFrame(
        {
            "video": [f"videos/{n}.mp4" for n in range(20)],
            "clip": range(20),
            "p": [n / 7 if n else float("nan") for n in range(20)],
            "right": [n % 3 == 0 for n in range(20)],
            "best": [[n, 1] for n in range(20)],
        }
    )
    write_parquet(path, frame)
    pd.testing.assert_frame_equal(read_parquet(path, ""), frame)
    content = path.read_bytes()
    found = 0
    for number in range(0, 8 * len(content), 83):
        changed = bytearray(content)
        changed[number // 8] ^= 1 << number % 8
        path.write_bytes(changed)
        try:
            table = read_parquet(path, "run `label` again", frame.columns)
        except UserError as error:
            assert str(error).startswith(f"{path}: damaged"), number
            assert str(error).endswith("; run `label` again"), number
            found += 1
        else:
            pd.testing.assert_frame_equal(table, frame)
    assert found > 150
    path.write_bytes(content[:-9])
    with pytest.raises(UserError, match=r"outcomes\.parquet: damaged"):
        read_parquet(path, "run `label` again")
    assert capfd.readouterr().err.count("without a checksum") <= 3  # the bit was in the key of the digest


def test_a_table_of_an_older_version_is_read_with_a_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame({"video": ["a", "b"], "clip": [1, 2]})
    frame.to_parquet(tmp_path / "old.parquet", index=False)
    assert read_parquet(tmp_path / "old.parquet", "").equals(frame)
    assert "old.parquet: was written without a checksum, by an older version" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"old\.parquet: damaged, or of another version \(without the column point\)"):
        read_parquet(tmp_path / "old.parquet", "run `label` again", ["video", "point"])


# Folders.


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_as_a_whole_at_the_end_of_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    path = tmp_path / "new" / "onnx"
    if not at_once:  # as on NFS
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    for name in ("first", "second"):
        with replacing_folder(path) as temporary:
            assert temporary.parent == path.parent
            (temporary / name).write_text(name)
    assert os.listdir(path.parent) == ["onnx"]
    assert os.listdir(path) == ["second"]  # no file of the old folder stays
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_two_folders_change_places_at_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / name).mkdir(parents=True)
    assert files._exchange(tmp_path / "a", tmp_path / "b")
    assert (os.listdir(tmp_path / "a"), os.listdir(tmp_path / "b")) == (["b"], ["a"])
    assert not files._exchange(tmp_path / "a", tmp_path / "missing")


@pytest.mark.parametrize("replaced", [True, False])
def test_the_old_folder_of_a_killed_replacement_is_found_again(tmp_path: Path, replaced: bool) -> None:
    """The process was killed after one of two renames, or after both."""
    path = tmp_path / "onnx"
    (tmp_path / ".onnx.old" / "old").mkdir(parents=True)
    if replaced:
        (path / "new").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), replacing_folder(path):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["onnx"]
    assert os.listdir(path) == ["new" if replaced else "old"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "onnx"
    with replacing_folder(path) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(error), replacing_folder(path) as temporary:
        (temporary / "new").write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["onnx"]
    assert os.listdir(path) == ["old"]


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_running_one_stays(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from videoadapt.runtime.files import replacing_folder
        with replacing_folder(Path(sys.argv[1])) as temporary:
            (temporary / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=False)
    assert killed.returncode == -signal.SIGKILL
    [abandoned] = tmp_path.iterdir()
    with replacing_folder(tmp_path / "b") as running:
        assert not abandoned.exists()
        assert remove_abandoned(tmp_path) == []
        assert running.exists()
    assert os.listdir(tmp_path) == ["b"]
