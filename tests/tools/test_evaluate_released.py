"""`tools/evaluate_released.py` and `tools/make_submission.py`."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import small_runs as runs
from conftest import need
from timesformer_views import first_clip, three_crops
from videoadapt.config.load import dump_config, make_config
from videoadapt.data.index.manifest import load_or_index
from videoadapt.data.synthetic import CLASSES
from videoadapt.data.video.readers import open_video
from videoadapt.model.checkpoint import load_checkpoint
from videoadapt.model.timesformer import TimeSformer

TOOLS = Path(__file__).parents[2] / "tools"
CONVERTED = {"image_mean": [0.5] * 3, "image_std": [0.225] * 3}  # in converted folders


def tool_module(name: str = "evaluate_released") -> Any:
    """Imports a tool, whose functions take a config."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_process(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs a tool in this process, which saves the import of torch."""
    out, errors = io.StringIO(), io.StringIO()
    line, code = [name, *map(str, words)], 0
    with redirect_stdout(out), redirect_stderr(errors), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", line)
        try:
            tool_module(name).main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
            if code != ended.code:  # a message, as `sys.exit` prints it
                print(ended.code, file=sys.stderr)
    return subprocess.CompletedProcess(line, code, out.getvalue(), errors.getvalue())


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
    trained_with = runs.config(runs.make_data(folder / "data"), folder / "run", run={"precision": "bf16"})
    config.write_text(dump_config(trained_with))
    settings = [f"run.dir={folder / 'run'}", "evaluate.speed_clips=0"]
    done = in_process("evaluate_released", released[0], config, *settings)
    assert done.returncode == 0, done.stderr
    assert "has image_mean [0.5, 0.5, 0.5]; the evaluation uses model.mean [0.45, 0.45, 0.45]" in done.stderr
    assert "fixed:8" in done.stdout
    assert "1 clip x 3 crops, from frame 0, crops rounded up, not antialiased, logits averaged" in done.stdout
    return folder / "run", config


def test_predictions_are_those_of_the_released_model_and_code(
    released: tuple[Path, Any], evaluated: tuple[Path, Path]
) -> None:
    """Compared with Hugging Face's forward pass in float32 over the views of TimeSformer's code, and its mean."""
    from videoadapt.config.load import load_config

    run, path = evaluated
    manifest = load_or_index(load_config(path, [f"run.dir={run}"]))
    views = pd.read_parquet(run / "evaluate" / "views.parquet").set_index(["video", "crop"])
    videos = pd.read_parquet(run / "evaluate" / "videos.parquet").set_index(["policy", "video"])
    assert set(views["point"]) == {"8"}
    probabilities: list[float] = []
    for row in map(manifest.row, np.flatnonzero(manifest["split"] == "val")[:4].tolist()):
        reader = open_video(row.path)
        frames = reader.frames(first_clip(reader.num_frames, 4 * 2, 4))  # 4 frames of stride 2
        crops = np.stack([three_crops(frame, 64) for frame in frames], axis=1)  # (X, T, S, S, C)
        pixels = torch.from_numpy(crops.round()).float().permute(0, 1, 4, 2, 3) / 255  # X T C S S
        with torch.no_grad():
            logits = released[1]((pixels - 0.45) / 0.225).logits.double()  # (X, classes)
        expected = logits.softmax(-1)[:, row.label].numpy()
        np.testing.assert_allclose(views.loc[row.video]["p_true"].to_numpy(), expected, atol=1e-4)
        video = videos.loc["fixed:8", row.video]
        best = logits.mean(0).softmax(-1).sort(descending=True, stable=True)
        np.testing.assert_allclose(video[[f"p_{k}" for k in range(1, 6)]].astype(float), best.values[:5], atol=1e-4)
        assert video["prediction"] == manifest.classes[int(best.indices[0])]
        probabilities.append(float(expected[0]))
    assert np.std(probabilities) > 1e-3  # otherwise a constant model would pass


def test_the_last_weights_of_a_file_are_evaluated_on_request(
    released: tuple[Path, Any], evaluated: tuple[Path, Path], tmp_path: Path
) -> None:
    last = released[1].state_dict()
    ema = {name: tensor * 1.1 for name, tensor in last.items()}
    torch.save({"model": last, "model_ema": ema, "args": Namespace(lr=0.1)}, tmp_path / "a.pth")
    config = tool_module().released_config(tmp_path / "a.pth", evaluated[1], ["train.weights=last"])
    digests = []
    for which in ("last", "ema"):
        folder = {"dir": tmp_path / which, "checkpoint": tmp_path / which / "released.safetensors"}
        chosen = config.model_copy(
            update={
                "run": config.run.model_copy(update=folder),
                "train": config.train.model_copy(update={"weights": which}),
            }
        )
        (tmp_path / which).mkdir()
        (tmp_path / which / "manifest.parquet").symlink_to(evaluated[0] / "manifest.parquet")
        tool_module().convert(tmp_path / "a.pth", chosen)
        digests.append(load_checkpoint(folder["checkpoint"], "train").meta["digest"])
    assert digests[0] == load_checkpoint(evaluated[0] / "released.safetensors", "train").meta["digest"]
    assert digests[1] != digests[0]


def test_a_second_call_reads_no_video_and_other_weights_are_an_error(
    released: tuple[Path, Any], evaluated: tuple[Path, Path], tmp_path: Path
) -> None:
    run, path = evaluated
    words = [path, f"run.dir={run}", "evaluate.speed_clips=0"]
    second = in_process("evaluate_released", released[0], *words)
    assert second.returncode == 0 and "evaluate: 12/12 videos in 0:00" in second.stderr, second.stderr
    state = {name: tensor + 0.01 for name, tensor in released[1].state_dict().items()}
    torch.save({"model_state": state}, tmp_path / "other.pyth")
    other = in_process("evaluate_released", tmp_path / "other.pyth", *words)
    assert other.returncode == 2
    assert "holds other weights" in other.stderr.splitlines()[-1]


def test_weights_of_another_shape_or_other_classes_are_an_error(
    released: tuple[Path, Any], evaluated: tuple[Path, Path], tmp_path: Path
) -> None:
    _, path = evaluated
    wider = in_process("evaluate_released", released[0], path, f"run.dir={tmp_path / 'a'}", "model.width=64")
    assert wider.returncode == 2 and "error: " in wider.stderr.splitlines()[-1], wider.stderr
    state = {name: t for name, t in released[1].state_dict().items() if not name.startswith("classifier")}
    torch.save(state, tmp_path / "headless.pyth")
    headless = in_process("evaluate_released", tmp_path / "headless.pyth", path, f"run.dir={tmp_path / 'b'}")
    assert headless.returncode == 2 and "does not fill head.weight" in headless.stderr.splitlines()[-1]
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for file in released[0].iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    config = json.loads((renamed / "config.json").read_text())
    config["id2label"]["0"], config["id2label"]["1"] = config["id2label"]["1"], config["id2label"]["0"]
    (renamed / "config.json").write_text(json.dumps(config))
    swapped = in_process("evaluate_released", renamed, path, f"run.dir={tmp_path / 'c'}")
    assert swapped.returncode == 2 and "its class 0 is" in swapped.stderr.splitlines()[-1], swapped.stderr


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
    done = in_process(
        "evaluate_released", tmp_path / "weights.pth", tmp_path / "images.yaml", f"run.dir={tmp_path / 'run'}"
    )
    assert done.returncode == 0, done.stderr
    assert "1 clip x 1 crop" in done.stdout
    assert all(f"fixed:{point} " in done.stdout for point in config.model.points)


def test_a_submission_has_the_best_classes_of_every_video(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    run, _ = evaluated
    done = in_process("make_submission", run, tmp_path / "out.csv", "--policy", "oracle", "--top", 3)
    assert done.returncode == 0 and "12 videos, 0 of them without" in done.stdout, done.stderr
    table = pd.read_csv(tmp_path / "out.csv").set_index("video")
    videos = pd.read_parquet(run / "evaluate" / "videos.parquet")
    videos = videos[videos["policy"] == "oracle"].set_index("video")
    assert list(table.columns) == ["label_1", "score_1", "label_2", "score_2", "label_3", "score_3"]
    assert videos["prediction"].tolist() == table["label_1"].tolist()
    assert (table["score_1"] >= table["score_2"]).all() and (table["score_2"] >= table["score_3"]).all()
    again = in_process("make_submission", run, tmp_path / "out.csv")
    assert again.returncode == 1 and "not overwritten" in again.stderr
    for words, message in ((["--policy", "best"], "this evaluation has"), (["--top", 9], "expected 1 to 5")):
        refused = in_process("make_submission", run, tmp_path / "new.csv", *words)
        assert refused.returncode == 1 and message in refused.stderr
    nothing = in_process("make_submission", tmp_path, tmp_path / "new.csv")
    assert nothing.returncode == 1 and "run `videoadapt evaluate` first" in nothing.stderr


def test_kinetics_names_are_split_into_columns(evaluated: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "evaluate").mkdir(parents=True)
    (run / "manifest.parquet").symlink_to(evaluated[0] / "manifest.parquet")
    videos = pd.read_parquet(evaluated[0] / "evaluate" / "videos.parquet").head(2)
    failed = {f"best_{k}": [None, videos[f"best_{k}"].iloc[1]] for k in range(1, 6)}
    videos = videos.assign(video=["-0WZKTu0x_k_000024_000034", "3caPS4FHFF8_000036_000046"], **failed)
    videos.to_parquet(run / "evaluate" / "videos.parquet")
    done = in_process("make_submission", run, tmp_path / "out.csv")
    assert "2 videos, 1 of them without" in done.stdout, done.stderr
    first = pd.read_csv(tmp_path / "out.csv").iloc[0]
    assert (first["youtube_id"], first["time_start"], first["time_end"]) == ("-0WZKTu0x_k", 24, 34)
    assert pd.isna(first["label_1"])
