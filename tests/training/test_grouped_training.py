"""Training on several ranks equals training on one: the same gradients, the same parameters on every rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs as runs
from processes import finished, torchrun
from videoadapt.config.load import Config, dump_config
from videoadapt.model.checkpoint import train_checkpoints

PROGRAM = Path(__file__).with_name("grouped_steps.py")
LAYOUTS = {
    "two ranks, no groups": (2, None),
    "1, 1": (2, {"8": 1, "6+4": 1}),
    "1, 1 with the students apart": (2, {"8+4": 1, "6": 1}),
    "2, 1": (3, {"8": 2, "6+4": 1}),
    "1, 1, 1": (3, {"8": 1, "6": 1, "4": 1}),
    "2, 1, 1": (4, {"8": 2, "6": 1, "4": 1}),
    "1, 3": (4, {"8": 1, "6+4": 3}),
}
TOLERANCE = {"torch.float64": 1e-10, "torch.float32": 1e-5}
ONE_STEP = [(1, dtype) for dtype in TOLERANCE]
FIVE_STEPS = (5, "torch.float64")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("grouped") / "data")


def tiny(data: Path, folder: Path, groups: object, /, **sections: dict) -> Config:
    """Every way in which points and clips could influence one another; drop path off, for it may differ."""
    defaults: dict[str, dict] = {
        "model": {"drop_path": 0.0, "distill_token": True},
        "data": {"mixup": 0.4, "cutmix": 1.0},
        "train": {"batch": 16, "accumulate": 2, "clip_grad": None, "optimizer": "sgd", "lr": 0.1, "ema": None},
        "parallel": {"groups": groups},
    }
    return runs.config(data, folder / "run", **{name: v | sections.get(name, {}) for name, v in defaults.items()})


def run(*line: object) -> None:
    done = finished([str(word) for word in line])
    assert done.returncode == 0, done.stderr[:6000]


def trained(data: Path, folder: Path, ranks: int, groups: object, /, **sections: dict) -> list[dict[Any, Any]]:
    """What each rank holds, by number of steps and precision."""
    folder.mkdir(parents=True)
    config = tiny(data, folder, groups, **sections)
    (folder / "config.yaml").write_text(dump_config(config))
    run(sys.executable, PROGRAM, ranks, folder / "config.yaml", folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def sequential(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return trained(data, tmp_path_factory.mktemp("sequential") / "alone", 1, None)[0]


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_on_several_ranks_equal_those_of_one(
    data: Path, tmp_path: Path, sequential: dict[Any, Any], layout: str
) -> None:
    """With mixing, accumulation, a distillation token, and a clip that nobody can read."""
    held = trained(data, tmp_path / "grouped", *LAYOUTS[layout])
    for key in ONE_STEP:
        expected = sequential[key]
        for found in (rank[key] for rank in held):
            assert found["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in expected["gradients"].items():
                assert difference(found["gradients"][name], gradient) < TOLERANCE[key[1]], name
            assert found["values"] == pytest.approx(expected["values"], rel=1e-5)
            assert found["skipped"] == expected["skipped"] == 1
    first, *others = (rank[FIVE_STEPS]["parameters"] for rank in held)
    for name, parameter in first.items():
        assert all(torch.equal(other[name], parameter) for other in others), name  # the same bits on all ranks
        assert difference(parameter, sequential[FIVE_STEPS]["parameters"][name]) < 1e-9, name


# Small: convolutions in float64 are slow.
STEM: dict[str, dict] = {"model": {"embed": "stem", "num_frames": 2}, "train": {"batch": 8}}
LVVIT: dict[str, dict] = {
    "model": STEM["model"] | {"dense_head": 0.25, "residual_scale": 0.5, "qkv_bias": False},
    "data": {"mixup": 0.0, "cutmix": 0.0, "mix_token": 1.0},
    "train": STEM["train"],
}


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_refused(data: Path, tmp_path: Path) -> None:
    config = tiny(data, tmp_path, None)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    words = [tmp_path / "config.yaml", f"run.dir={tmp_path}/of${{RANK}}"]
    done = finished(torchrun(2, "-m", "videoadapt", "train", *words))
    assert done.returncode != 0
    assert "another rank wrote it, and rank 1 on" in done.stderr
    assert not list(tmp_path.glob("of*/checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, LVVIT], ids=["plain", "LV-ViT"])
def test_groups_of_which_some_are_not_drawn_equal_one_rank(data: Path, tmp_path: Path, kind: dict[str, dict]) -> None:
    """Lengths and keeps, four of six points a step: a group without work adds zeros, and what is not drawn stays."""
    grid = {"points": ["8", "8@0.5", "6", "6@0.5", "4", "4@0.5"], "drop_blocks": [1]}
    changes: dict[str, dict] = {"model": grid, "train": {"draw": "sampled"}}
    drawn: dict[str, dict] = {**kind, **{name: kind.get(name, {}) | keys for name, keys in changes.items()}}
    [alone] = trained(data, tmp_path / "alone", 1, None, **drawn)
    held = trained(data, tmp_path / "grouped", 4, {"8": 2, "6": 1, "4": 1}, **drawn)
    for key, expected in alone.items():
        tolerance = 1e-9 if key == FIVE_STEPS else TOLERANCE[key[1]]
        for found in (rank[key] for rank in held):
            for name, gradient in expected["gradients"].items():
                assert (found["gradients"][name] is None) == (gradient is None), name
                if gradient is not None:
                    assert difference(found["gradients"][name], gradient) < tolerance, name
            for name, parameter in expected["parameters"].items():
                assert torch.equal(found["parameters"][name], held[0][key]["parameters"][name]), name
                assert difference(found["parameters"][name], parameter) < tolerance, name
            assert found["values"] == pytest.approx(expected["values"], rel=1e-5, abs=1e-6)
    untouched = [name for name, gradient in alone[ONE_STEP[0]]["gradients"].items() if gradient is None]
    assert untouched


@pytest.mark.slow
@pytest.mark.parametrize("stem", [STEM, LVVIT], ids=["stem", "LV-ViT"])
def test_the_batchnorms_of_a_stem_see_all_clips_of_their_length(
    data: Path, tmp_path: Path, stem: dict[str, dict]
) -> None:
    """Gradients through the statistics too, and statistics that every rank knows when they are saved."""
    [alone] = trained(data, tmp_path / "alone", 1, None, **stem)
    for held in trained(data, tmp_path / "grouped", 3, {"8": 2, "6+4": 1}, **stem):
        for key in (ONE_STEP[0], FIVE_STEPS):
            expected, found = alone[key], held[key]
            assert any("running_var" in name for name in expected["buffers"])
            for name, buffer in expected["buffers"].items():
                torch.testing.assert_close(found["buffers"][name], buffer, rtol=1e-9, atol=1e-12)
            for name, gradient in expected["gradients"].items():
                assert difference(found["gradients"][name], gradient) < 1e-8, name


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [((1, None), (3, {"8": 1, "6": 1, "4": 1})), ((2, None), (1, None))])
def test_a_run_goes_on_with_another_plan(
    data: Path, tmp_path: Path, first: tuple[int, Any], second: tuple[int, Any]
) -> None:
    """Real training from files; all after the first checkpoint is lost, and trained again on other ranks."""
    settings = {"data": {"workers": 1}, "train": {"epochs": 2, "save_steps": 2, "keep_checkpoints": 9}}
    whole = tiny(data, tmp_path / "whole", None, **settings)
    split = tiny(data, tmp_path / "split", None, **settings)
    for config in (whole, split):
        config.run.dir.mkdir(parents=True)
        (config.run.dir / "own.yaml").write_text(dump_config(config))
    verb = ["-m", "videoadapt", "train"]
    run(*torchrun(1, *verb, whole.run.dir / "own.yaml"))
    for number, (ranks, groups) in enumerate((first, second)):
        config = split.model_copy(update={"parallel": split.parallel.model_copy(update={"groups": groups})})
        (config.run.dir / "own.yaml").write_text(dump_config(config))
        run(*torchrun(ranks, *verb, config.run.dir / "own.yaml"))
        if number == 0:
            for path in sorted((config.run.dir / "checkpoints").glob("step-*"))[1:]:
                path.unlink()  # all but the first: the rest is trained again, on the other ranks
            (config.run.dir / "checkpoints" / "last").unlink()
            (config.run.dir / "train.json").unlink()
    ends = [train_checkpoints(config.run.dir).latest() for config in (whole, split)]
    assert ends[0] is not None and ends[1] is not None  # noqa: PT018
    assert ends[0].meta["step"] == ends[1].meta["step"] > 2
    for name, tensor in ends[0].tensors_under("model").items():
        torch.testing.assert_close(ends[1].tensors_under("model")[name], tensor, rtol=1e-4, atol=1e-5)
