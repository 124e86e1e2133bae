"""`tools/evaluate_released.py` and `tools/make_submission.py`."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import small_runs as runs
from conftest import need
from videoadapt.config.load import dump_config, make_config
from videoadapt.data.clips.views import normalise
from videoadapt.data.index.manifest import load_or_index
from videoadapt.data.synthetic import CLASSES
from videoadapt.model.timesformer import TimeSformer

TOOLS = Path(__file__).parents[2] / "tools"
MEAN, STD = [0.45] * 3, [0.225] * 3  # the released weights were trained with these
CONVERTED = {"image_mean": [0.5] * 3, "image_std": [0.225] * 3}  # in converted folders


def tool(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(TOOLS / f"{name}.py"), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=400)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A Hugging Face folder with a small TimeSformer for the classes of the generated videos, and the model."""
    transformers: Any = need("transformers", "the independent TimeSformer")
    torch.manual_seed(0)
    settings = transformers.TimesformerConfig(
        image_size=64,
        patch_size=8,
        num_frames=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        initializer_range=0.2,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
    )
    model = transformers.TimesformerForVideoClassification(settings).eval()
    folder = tmp_path_factory.mktemp("released") / "timesformer-tiny"
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(CONVERTED))
    return folder, model


@pytest.fixture(scope="module")
def evaluated(released: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run folder of its evaluation by the tool, and the config file."""
    folder = tmp_path_factory.mktemp("k400")
    config = folder / "tiny.yaml"
    config.write_text(dump_config(runs.config(runs.make_data(folder / "data"), folder / "run")))
    settings = [f"run.dir={folder / 'run'}", "evaluate.speed_clips=0"]
    done = tool("evaluate_released", released[0], config, *settings)
    assert done.returncode == 0, done.stderr
    assert "has image_mean [0.5, 0.5, 0.5]; the evaluation uses model.mean [0.45, 0.45, 0.45]" in done.stderr
    assert "fixed:8" in done.stdout and "1 clip x 3 crops" in done.stdout
    return folder / "run", config


def test_predictions_are_those_of_the_released_model(released: tuple[Path, Any], evaluated: tuple[Path, Path]) -> None:
    """Compared with Hugging Face's forward pass over the paper's three crops."""
    from videoadapt.config.load import load_config
    from videoadapt.data.clips.datasets import EvalVideos, VideoViews

    run, path = evaluated
    config = load_config(path, [f"run.dir={run}"])
    manifest = load_or_index(config)
    videos = EvalVideos(manifest, config, temporal_views=1, spatial_crops=3, thumbnails=False)
    views = pd.read_parquet(run / "evaluate" / "views.parquet").set_index(["video", "crop"])
    assert set(views["point"]) == {"8"}
    val = np.flatnonzero(manifest["split"] == "val")[:4]
    probabilities: list[float] = []
    for row in val:
        video = videos[int(row)]
        assert isinstance(video, VideoViews)
        clips = normalise(video.views[0], MEAN, STD, torch.float32).transpose(1, 2)  # X C T H W -> X T C H W
        with torch.no_grad():
            expected = released[1](clips).logits.softmax(-1)[:, video.label]
        probabilities.append(float(expected[0]))
        found = views.loc[manifest["video"][row]]["p_true"].to_numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.std(probabilities) > 1e-3  # otherwise a constant model would pass


def test_a_second_call_reads_no_video_and_other_weights_are_an_error(
    released: tuple[Path, Any], evaluated: tuple[Path, Path], tmp_path: Path
) -> None:
    run, path = evaluated
    words = [path, f"run.dir={run}", "evaluate.speed_clips=0"]
    again = tool("evaluate_released", released[0], *words)
    assert again.returncode == 0 and "evaluate: 12/12 videos in 0:00" in again.stderr, again.stderr
    state = {name: tensor + 0.01 for name, tensor in released[1].state_dict().items()}
    torch.save({"model_state": state}, tmp_path / "other.pyth")
    other = tool("evaluate_released", tmp_path / "other.pyth", *words)
    assert other.returncode == 1
    assert "holds other weights" in other.stderr.splitlines()[-1]


def test_weights_of_another_shape_or_other_classes_are_an_error(
    released: tuple[Path, Any], evaluated: tuple[Path, Path], tmp_path: Path
) -> None:
    _, path = evaluated
    wider = tool("evaluate_released", released[0], path, f"run.dir={tmp_path / 'a'}", "model.width=64")
    assert wider.returncode == 1 and "error: " in wider.stderr.splitlines()[-1], wider.stderr
    state = {name: t for name, t in released[1].state_dict().items() if not name.startswith("classifier")}
    torch.save(state, tmp_path / "headless.pyth")
    headless = tool("evaluate_released", tmp_path / "headless.pyth", path, f"run.dir={tmp_path / 'b'}")
    assert headless.returncode == 1 and "does not fill head.weight" in headless.stderr.splitlines()[-1]
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for file in released[0].iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    config = json.loads((renamed / "config.json").read_text())
    config["id2label"]["0"], config["id2label"]["1"] = config["id2label"]["1"], config["id2label"]["0"]
    (renamed / "config.json").write_text(json.dumps(config))
    swapped = tool("evaluate_released", renamed, path, f"run.dir={tmp_path / 'c'}")
    assert swapped.returncode == 1 and "its class 0 is" in swapped.stderr.splitlines()[-1], swapped.stderr


def test_an_image_model_has_the_points_and_crops_of_its_config(tmp_path: Path) -> None:
    rng, images = np.random.default_rng(0), {"num_frames": 1, "stride_frames": 1, "temporal": False, "num_classes": 2}
    for split, name in itertools.product(("train", "val"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(2):
            pixels = rng.integers(0, 256, (64, 72, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    nested = runs.values(tmp_path, tmp_path / "run")
    nested["data"] |= {"root": None, "classes": None}
    nested["data"] |= {split: {"annotations": str(tmp_path / split)} for split in ("train", "val")}
    nested["model"] |= images | {"points": ["8", "8@0.5", "4"], "drop_blocks": [1], "time_init_std": 0.0}
    nested["assign"]["frames"], nested["evaluate"]["speed_clips"] = 1, 0
    config = make_config(nested)
    (tmp_path / "images.yaml").write_text(dump_config(config))
    torch.save(TimeSformer(config.model).state_dict(), tmp_path / "weights.pth")
    done = tool("evaluate_released", tmp_path / "weights.pth", tmp_path / "images.yaml", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "1 clip x 1 crop" in done.stdout
    assert all(f"fixed:{point} " in done.stdout for point in config.model.points)


def test_a_submission_has_the_best_classes_of_every_video(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = evaluated
    done = tool("make_submission", run, tmp_path / "out.csv", "--policy", "oracle", "--top", 3)
    assert done.returncode == 0 and "12 videos, 0 of them without" in done.stdout, done.stderr
    table = pd.read_csv(tmp_path / "out.csv").set_index("video")
    videos = pd.read_parquet(run / "evaluate" / "videos.parquet")
    videos = videos[videos["policy"] == "oracle"].set_index("video")
    assert list(table.columns) == ["label_1", "score_1", "label_2", "score_2", "label_3", "score_3"]
    assert [CLASSES[p] for p in videos["prediction"]] == table["label_1"].tolist()
    assert (table["score_1"] >= table["score_2"]).all() and (table["score_2"] >= table["score_3"]).all()
    again = tool("make_submission", run, tmp_path / "out.csv")
    assert again.returncode == 1 and "not overwritten" in again.stderr
    for words, message in ((["--policy", "best"], "this evaluation has"), (["--top", 9], "expected 1 to 5")):
        refused = tool("make_submission", run, tmp_path / "new.csv", *words)
        assert refused.returncode == 1 and message in refused.stderr
    nothing = tool("make_submission", tmp_path, tmp_path / "new.csv")
    assert nothing.returncode == 1 and "run `videoadapt evaluate` first" in nothing.stderr


def test_kinetics_names_are_split_into_columns(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "evaluate").mkdir(parents=True)
    (run / "manifest.parquet").symlink_to(evaluated[0] / "manifest.parquet")
    videos = pd.read_parquet(evaluated[0] / "evaluate" / "videos.parquet").head(2)
    failed: list[Any] = [[], videos["best"].iloc[1]]
    videos = videos.assign(video=["-0WZKTu0x_k_000024_000034", "3caPS4FHFF8_000036_000046"], best=failed)
    videos.to_parquet(run / "evaluate" / "videos.parquet")
    done = tool("make_submission", run, tmp_path / "out.csv")
    assert "2 videos, 1 of them without" in done.stdout, done.stderr
    first = pd.read_csv(tmp_path / "out.csv").iloc[0]
    assert (first["youtube_id"], first["time_start"], first["time_end"]) == ("-0WZKTu0x_k", 24, 34)
    assert pd.isna(first["label_1"])
