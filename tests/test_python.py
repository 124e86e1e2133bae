"""The public names: functions for scripts and notebooks, data sets, inputs of `predict`, the notebook of the docs."""

from __future__ import annotations

import ast
import os
import pydoc
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import small_runs as runs
import videoadapt as va
from conftest import need
from videoadapt.config.load import Config, dump_config
from videoadapt.data.clips.clip_dataset import Sample
from videoadapt.data.clips.datasets import Failure, TrainClips
from videoadapt.data.index.manifest import load_or_index
from videoadapt.model.checkpoint import train_checkpoints
from videoadapt.training.state import State

ROOT = Path(__file__).parents[1]
SCREENS = 120  # lines: three screens


def test_type_checkers_see_the_names_that_python_finds() -> None:
    tree = ast.parse(Path(va.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: (node.module or "").removeprefix("videoadapt.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == va._HOME
    assert all(getattr(va, name).__name__ == name for name in va._HOME)


def test_help_fits_three_screens_and_names_all() -> None:
    text = pydoc.plain(pydoc.render_doc(va))
    assert len(text.splitlines()) <= SCREENS
    assert all(name in text for name in va._HOME)


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    section = page.partition("\n## Python\n")[2].partition("\n## ")[0]
    assert not va._HOME.keys() - set(re.findall(r"`(\w+)", section))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with an untrained model; one of its training videos is no video."""
    folder = tmp_path_factory.mktemp("python")
    data = runs.make_data(folder / "data")
    (data / "train" / "00000.mp4").write_bytes(b"no video")
    config = runs.config(data, folder / "run", data={"holdout": 0.0}, label={"source": "train"})
    state = State.start(config, load_or_index(config))
    train_checkpoints(config.run.dir).save(0, *state.saved())
    (config.run.dir / "config.yaml").write_text(dump_config(config))
    return config


def test_stages_are_silent_and_work_in_any_thread(run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(va.label(run, progress=False)))
    thread.start()
    thread.join()
    [labels] = found
    assert isinstance(labels, va.LabelSummary)
    assert labels.clips == runs.SIZES["train"] - 1
    assert capsys.readouterr() == ("", "")
    va.label(run)
    assert "label: 47/47 videos" in capsys.readouterr().err  # nothing stays silent
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    assert repr(labels) == "<LabelSummary: labels of 47 clips, source train>"
    assert labels._repr_html_().count("<tr>") == 1 + len(run.model.points)
    with pytest.raises(va.UserError, match=r"parallel\.shard: va\.label returns the result of all shards"):
        va.label(run.model_copy(update={"parallel": run.parallel.model_copy(update={"shard": "0/2"})}))


def test_a_video_is_predicted_alike_in_every_form(run: Config, tmp_path: Path) -> None:
    path = load_or_index(run).split("val").row(0).path
    with va.open_video(path) as video:
        frames, fps = video.frames(range(len(video))), video.fps
    model = va.load_model(run.run.dir)
    settings = {"evaluate": run.evaluate, "data": run.data}
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").symlink_to(path)
    (tmp_path / "videos" / "a.txt").write_text("no video")
    forms = [
        va.predict(run.run.dir, path),
        va.predict(run, [Path(path)]),
        va.predict(run.run.dir, tmp_path / "videos", policy="fixed:8"),
        va.predict(model, frames, fps=fps, **settings),  # type: ignore[arg-type]
        va.predict(model, torch.from_numpy(frames), "fixed:8", fps=fps, **settings),  # type: ignore[arg-type]
        va.predict(run, [frames], fps=fps),
        va.predict(run, iter(frames), fps=fps),
    ]
    answers = [(form[0].classes, form[0].probabilities, form[0].points, form[0].macs) for form in forms]
    assert answers == answers[:1] * len(forms)
    assert forms[2].left_out == [str(tmp_path / "videos" / "a.txt")]
    assert forms[3][0].path == "frames"
    assert set(forms[0][0].classes) <= set(model.class_names)
    assert not (run.run.dir / "predict").exists()  # only the command writes


@pytest.mark.parametrize(
    ("videos", "fps", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), None, "expected fps=, the frames per second, above 0"),
        (np.zeros((2, 8, 8, 3), np.float32), 8.0, r"expected uint8 RGB frames .* got float32 \(2, 8, 8, 3\)"),
        (iter([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 9, 3), np.uint8)]), 8.0, r"frame 1 is \(8, 9, 3\)"),
        ([], None, "no video given"),
    ],
)
def test_wrong_frames_are_refused(run: Config, videos: object, fps: float | None, message: str) -> None:
    with pytest.raises(va.UserError, match=message):
        va.predict(run, videos, fps=fps)  # type: ignore[arg-type]


def test_the_text_assigned_needs_a_run(run: Config) -> None:
    with pytest.raises(va.UserError, match="a model has no assigner; give its run"):
        va.predict(va.load_model(run.run.dir), "a.mp4", "assigned")


def test_a_data_set_gives_the_clips_of_the_training_to_living_workers(run: Config) -> None:
    dataset = va.ClipDataset(run.run.dir, run, split="train")
    assert len(dataset) == runs.SIZES["train"] - 1
    assert [Path(path).name for path, _ in dataset.unreadable] == ["00000.mp4"]
    loader = DataLoader(dataset, batch_size=16, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        batch = next(iter(loader))
        expected = [TrainClips(dataset.manifest, run)[epoch, row] for row in range(16)]
        assert torch.equal(batch.clip, torch.stack([item.frames for item in expected if not isinstance(item, Failure)]))
    assert batch.label.tolist() == dataset.manifest["label"][:16].tolist()
    assert list(batch.path) == dataset.manifest["path"][:16].tolist()
    model = va.load_model(run.run.dir)
    assert model(va.preprocess(model, batch.clip), "6").shape == (16, len(dataset.classes))


def test_the_folder_of_a_config_stands_for_its_run(run: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(run))  # as `new` writes it: the run is elsewhere
    assert va.ClipDataset(tmp_path, run, split="val").manifest.hash == load_or_index(run).split("val").hash
    other = run.model_copy(update={"run": run.run.model_copy(update={"dir": tmp_path / "run"})})
    (tmp_path / "config.yaml").write_text(dump_config(other))
    with pytest.raises(va.UserError, match="run `videoadapt index"):
        va.ClipDataset(tmp_path, run)


def test_a_folder_is_a_data_set_and_a_video_that_fails_is_never_replaced(run: Config, tmp_path: Path) -> None:
    rows = list(load_or_index(run).split("val"))[:3]
    for row in rows:
        copy = tmp_path / f"class {row.label}" / Path(row.path).name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(Path(row.path).read_bytes())
    model = run.model.model_copy(update={"num_classes": len({row.label for row in rows})})  # those of the folder
    unnamed = run.model_copy(update={"data": run.data.model_copy(update={"classes": None}), "model": model})
    before = sorted(tmp_path.rglob("*"))
    dataset = va.ClipDataset(tmp_path, unnamed, views="evaluation", on_error="return")
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written
    assert len(dataset) == 3
    item = dataset[0]
    assert isinstance(item, Sample)
    assert item.clip.shape == (1, 3, 4, 64, 64)
    Path(dataset.manifest.row(1).path).write_bytes(b"no video")
    batch = dataset.collate([dataset[number] for number in range(3)])
    assert len(batch.clip) == len(batch.label) == 2
    assert [failure.path for failure in batch.failures] == [dataset.manifest.row(1).path]
    dataset.on_error = "raise"
    with pytest.raises(va.VideoError, match="has 8 bytes, but had"):
        dataset[1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize("reader", ["auto", "pyav"])
def test_a_closed_video_holds_no_file(run: Config, reader: str) -> None:
    path = load_or_index(run).split("val").row(0).path

    def held() -> list[str]:
        links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return [link.name for link in links if link.exists() and os.path.samefile(link, path)]

    with va.open_video(path, reader) as video:  # type: ignore[arg-type]
        assert video.frames([0]).shape == (1, 64, 64, 3)
    assert held() == []
    video.close()  # a second time


GUARDLESS = """
import sys
from pathlib import Path
from videoadapt.data.index.probe_pool import probe_files
print("started", flush=True)
results = probe_files(sys.argv[1:], full=False, cache=Path("cache"), workers=1, timeout_s=60.0)
print(sorted(type(result).__name__ for result in results.values()))
"""


def test_a_script_needs_no_main_guard(run: Config, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(GUARDLESS)
    paths = load_or_index(run).split("val")["path"].tolist()[:2]
    line = [sys.executable, "script.py", *paths]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "started\n['VideoInfo', 'VideoInfo']\n"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = need("nbformat", "no nbformat"), need("nbclient", "no nbclient")
    need("ipykernel", "no kernel")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(ROOT / "docs" / "python.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # not stored: they would grow old
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {number: cell.outputs for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    shown = "\n".join(str(output) for cell in outputs.values() for output in cell)
    assert "<td>assigned</td>" in shown  # the table of the evaluation
    assert "for Jupyter support" not in shown  # rich says so if it draws bars without ipywidgets
    assert "epoch 0: losses of the last batch" in shown
