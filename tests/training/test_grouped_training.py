"""Training on several ranks equals training on one rank: the same gradients, the same parameters on every rank."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grouped_steps
import pandas as pd
import pytest
import torch

import small_runs as runs
from forked_ranks import ForkedRanks
from processes import finished, torchrun
from videoadapt.config.load import Config, dump_config
from videoadapt.data.index.manifest import load_or_index
from videoadapt.model.checkpoint import Checkpoint, train_checkpoints
from videoadapt.training.state import State
from videoadapt.training.train import train

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
SEVERAL_STEPS = (3, "torch.float64")


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedRanks]:
    started = ForkedRanks(Path(grouped_steps.__file__))
    yield started
    started.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("grouped") / "data")


@pytest.fixture(scope="module")
def indexed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with the manifest of the data."""
    config = runs.config(data, tmp_path_factory.mktemp("indexed") / "run")
    load_or_index(config)
    return config.run.dir


# Small: convolutions in float64 are slow.
STEM: dict[str, dict] = {"model": {"embed": "stem", "num_frames": 2}, "train": {"batch": 8}}
LVVIT: dict[str, dict] = {
    "model": STEM["model"] | {"dense_head": 0.25, "residual_scale": 0.5, "qkv_bias": False},
    "data": {"mixup": 0.0, "cutmix": 0.0, "mix_token": 1.0},
    "train": STEM["train"],
}


def tiny(data: Path, folder: Path, groups: object, /, **sections: dict) -> Config:
    """Everything by which points and clips influence one another; no drop path, which depends on the plan."""
    defaults: dict[str, dict] = {
        "loss": {},
        "model": {"drop_path": 0.0, "distill_token": True},
        "data": {"mixup": 0.4, "cutmix": 1.0},
        "train": {"batch": 16, "accumulate": 2, "clip_grad": None, "optimizer": "sgd", "lr": 0.1, "ema": None},
        "parallel": {"groups": groups},
    }
    return runs.config(data, folder / "run", **{name: v | sections.get(name, {}) for name, v in defaults.items()})


class Trainer:
    """Trains on forked ranks, in folders below one folder."""

    def __init__(self, forked: ForkedRanks, data: Path, indexed: Path, folder: Path) -> None:
        self._forked, self._data, self._indexed, self._folder = forked, data, indexed, folder

    def __call__(
        self, ranks: int, groups: object, unreadable: Sequence[int] = (5,), /, **sections: dict
    ) -> list[dict[Any, Any]]:
        """Returns the results of each rank, by number of steps and precision."""
        folder = self._folder / f"{len(list(self._folder.iterdir()))}"
        folder.mkdir()
        config = tiny(self._data, folder, groups, **sections)
        shutil.copytree(self._indexed, config.run.dir)  # each run would index the videos again
        (folder / "config.yaml").write_text(dump_config(config))
        self._forked.run(grouped_steps.save_trainings, ranks, folder, *unreadable)
        return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.fixture(scope="module")
def trained(forked: ForkedRanks, data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(forked, data, indexed, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def sequential(trained: Trainer) -> dict[Any, Any]:
    return trained(1, None)[0]


@pytest.mark.slow
def test_ranks_that_leave_a_process_group_never_hang(forked: ForkedRanks, tmp_path: Path) -> None:
    """Without the reference that `runtime.ranks` keeps, a rank hangs within some ten times."""
    forked.run(grouped_steps.leave_often, 2, tmp_path)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_on_several_ranks_equal_those_of_one(trained: Trainer, sequential: dict[Any, Any], layout: str) -> None:
    """With mixing, accumulation, a distillation token, and a clip that no rank can read."""
    held = trained(*LAYOUTS[layout])
    for key in ONE_STEP:
        expected = sequential[key]
        for found in (rank[key] for rank in held):
            assert found["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in expected["gradients"].items():
                assert difference(found["gradients"][name], gradient) < TOLERANCE[key[1]], name
            assert found["values"] == pytest.approx(expected["values"], rel=1e-5)
            assert found["skipped"] == expected["skipped"] == 1
    first, *others = (rank[SEVERAL_STEPS]["parameters"] for rank in held)
    for name, parameter in first.items():
        assert all(torch.equal(other[name], parameter) for other in others), name  # the same bits on all ranks
        assert difference(parameter, sequential[SEVERAL_STEPS]["parameters"][name]) < 1e-9, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "kind"),
    [(None, {}), ({"8": 1, "6+4": 1}, {}), (None, LVVIT)],
    ids=["no groups", "groups", "LV-ViT"],
)
def test_the_order_of_backward_passes_changes_only_rounding(
    trained: Trainer, groups: object, kind: dict[str, dict]
) -> None:
    """Also with drop path: the order of forward passes, which draw its random numbers, is the same."""
    kind = kind | {"model": kind.get("model", {}) | {"drop_path": 0.3}}
    usual, costliest_last = (trained(2, groups, **kind, parallel={"overlap": order})[0] for order in ("off", "auto"))
    for key in (ONE_STEP[0], SEVERAL_STEPS):
        for name, gradient in usual[key]["gradients"].items():
            assert difference(costliest_last[key]["gradients"][name], gradient) < TOLERANCE["torch.float64"], name
        torch.testing.assert_close(costliest_last[key]["buffers"], usual[key]["buffers"], rtol=1e-9, atol=1e-12)
        assert costliest_last[key]["values"] == pytest.approx(usual[key]["values"], rel=1e-9)


@pytest.mark.slow
def test_sums_in_bf16_are_near_and_the_same_on_all_ranks(trained: Trainer, sequential: dict[Any, Any]) -> None:
    held = trained(2, {"8": 1, "6+4": 1}, parallel={"sums": "bf16"})
    for name, gradient in sequential[1, "torch.float32"]["gradients"].items():
        first, second = (rank[1, "torch.float32"]["gradients"][name] for rank in held)
        assert first.dtype == torch.float32 and torch.equal(first, second)
        assert torch.equal(first, first.bfloat16().float()), name
        assert difference(first, gradient) < 0.01, name


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_refused(data: Path, tmp_path: Path) -> None:
    config = tiny(data, tmp_path, None)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    program = tmp_path / "impatient.py"  # the command, with 1 s instead of 45 s for a file of another rank
    program.write_text(
        "import videoadapt.runtime.ranks as ranks\n"
        "from videoadapt.commands.cli import main\n"
        "ranks._FILE_VISIBLE_S = 1.0\n"
        "main()\n"
    )
    done = finished(torchrun(2, program, "train", tmp_path / "config.yaml", f"run.dir={tmp_path}/of${{RANK}}"))
    assert done.returncode != 0
    assert "another rank wrote this file, but rank 1 on" in done.stderr
    assert not list(tmp_path.glob("of*/checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, LVVIT], ids=["plain", "LV-ViT"])
def test_groups_of_which_some_are_not_drawn_equal_one_rank(trained: Trainer, kind: dict[str, dict]) -> None:
    """Lengths and keeps, four of six points a step: a group without work adds zeros; undrawn parameters stay.

    Also after passes at all points were timed, which choose the order of backward passes.
    """
    grid = {"points": ["8", "8@0.5", "6", "6@0.5", "4", "4@0.5"], "drop_blocks": [1]}
    changes: dict[str, dict] = {"model": grid, "train": {"draw": "sampled"}}
    drawn: dict[str, dict] = {**kind, **{name: kind.get(name, {}) | keys for name, keys in changes.items()}}
    [alone] = trained(1, None, **drawn)
    held = trained(4, {"8": 2, "6": 1, "4": 1}, **drawn, parallel={"overlap": "auto"})
    for key, expected in alone.items():
        tolerance = 1e-9 if key == SEVERAL_STEPS else TOLERANCE[key[1]]
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
@pytest.mark.parametrize(
    ("stem", "layout", "unreadable"),
    [
        (STEM, (3, {"8": 2, "6+4": 1}), [5]),
        (LVVIT, (3, {"8": 2, "6+4": 1}), [5]),
        (STEM, (2, None), [2, 3, 6, 7]),
    ],
    ids=["stem", "LV-ViT", "a rank without a clip"],
)
def test_the_batchnorms_of_a_stem_see_all_clips_of_their_length(
    trained: Trainer, stem: dict[str, dict], layout: tuple[int, Any], unreadable: list[int]
) -> None:
    """Gradients pass through the statistics too, and every rank knows the statistics when they are saved."""
    [alone] = trained(1, None, unreadable, **stem)
    for held in trained(*layout, unreadable, **stem):
        for key in (ONE_STEP[0], SEVERAL_STEPS):
            expected, found = alone[key], held[key]
            assert any("running_var" in name for name in expected["buffers"])
            for name, buffer in expected["buffers"].items():
                torch.testing.assert_close(found["buffers"][name], buffer, rtol=1e-9, atol=1e-12)
            for name, gradient in expected["gradients"].items():
                assert difference(found["gradients"][name], gradient) < 1e-8, name


def test_every_rank_names_the_clips_of_a_loss_that_is_not_finite(
    forked: ForkedRanks, data: Path, indexed: Path, tmp_path: Path
) -> None:
    """Whichever rank is the first to fail: the others print nothing."""
    config = tiny(data, tmp_path, None)
    shutil.copytree(indexed, config.run.dir)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    forked.run(grouped_steps.save_message_of_a_bad_loss, 2, tmp_path)
    video = load_or_index(config).row(3).video
    expected = f"step 3, point 6: the loss is not finite on the clips of manifest rows [3] ({video}); nothing"
    for rank in range(2):
        assert (tmp_path / f"rank{rank}.txt").read_text().startswith(expected)


REAL: dict[str, dict] = {
    "data": {"workers": 1},
    "train": {"epochs": 2, "save_steps": 2, "keep_checkpoints": 9},
}


def newest(config: Config) -> Checkpoint:
    checkpoint = train_checkpoints(config.run.dir).latest()
    assert checkpoint is not None
    return checkpoint


@pytest.fixture(scope="module")
def whole(data: Path, indexed: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The end of a real training from files, on one rank, that was never interrupted."""
    config = tiny(data, tmp_path_factory.mktemp("whole"), None, **REAL)
    shutil.copytree(indexed, config.run.dir)
    train(config)
    return newest(config)


@pytest.mark.slow
@pytest.mark.parametrize("plans", [[(1, None), (3, {"8": 1, "6": 1, "4": 1})], [(2, None), (1, None)]])
def test_a_run_continues_with_another_plan(
    forked: ForkedRanks, data: Path, tmp_path: Path, whole: Checkpoint, plans: list[tuple[int, Any]]
) -> None:
    """All but the first checkpoint is lost, and its steps are trained again on other ranks."""
    for number, (ranks, groups) in enumerate(plans):
        config = tiny(data, tmp_path, groups, **REAL)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        if ranks == 1:
            train(config)
        else:
            forked.run(grouped_steps.train_run, ranks, tmp_path)
            assert "waits for gradients" in (tmp_path / "stderr").read_text()
            points = json.loads((config.run.dir / "train.json").read_text())["points"]
            assert all(0 < values["mfu"] < 1 for values in points.values())  # those of other ranks, too
        if number == 0:
            for path in sorted((config.run.dir / "checkpoints").glob("step-*"))[1:]:
                path.unlink()
            (config.run.dir / "checkpoints" / "last").unlink()
            (config.run.dir / "train.json").unlink()
    end = newest(config)
    assert end.meta["step"] == whole.meta["step"] > 2
    for name, tensor in whole.tensors_under("model").items():
        torch.testing.assert_close(end.tensors_under("model")[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ranks_validate_each_video_once(forked: ForkedRanks, data: Path, indexed: Path, tmp_path: Path) -> None:
    """11 videos on 3 ranks: the same on every rank, and as on one rank up to the order of sums."""
    found = []
    for count in (1, 3):
        folder = tmp_path / str(count)
        config = runs.config(
            data, folder / "run", data={"validate": 0.9}, evaluate={"batch": 3}, train={"validate_every": 1}
        )
        shutil.copytree(indexed, config.run.dir)
        (folder / "config.yaml").write_text(dump_config(config))
        forked.run(grouped_steps.save_validation, count, folder)
        found += [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]
    one, *others = found
    assert one["read"] == 11
    for other in others:
        assert other["values"] == pytest.approx(one["values"], rel=1e-5)
        assert {**other, "values": None} == {**one, "values": None}
    assert others[0] == others[1] == others[2]


@pytest.mark.slow
def test_ranks_stop_early_at_the_same_step(forked: ForkedRanks, data: Path, indexed: Path, tmp_path: Path) -> None:
    recipe = {"epochs": 4, "patience": 1, "validate_every": 1, "best_metric": "loss/6"}
    config = tiny(data, tmp_path, None, train=recipe)
    shutil.copytree(indexed, config.run.dir)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    forked.run(grouped_steps.train_until_it_gets_worse, 2, tmp_path)
    summary = json.loads((config.run.dir / "train.json").read_text())
    assert (summary["stopped_early"], summary["epochs"], summary["best"]["epoch"]) == (True, 2, 1)
    best = train_checkpoints(config.run.dir).best().meta["step"]
    assert best == summary["best"]["step"] < newest(config).meta["step"] == summary["steps"]


@pytest.mark.slow
def test_ranks_give_each_clip_the_label_that_one_rank_gives_it(
    forked: ForkedRanks, data: Path, indexed: Path, tmp_path: Path
) -> None:
    tables = []
    for count in (1, 3):
        folder = tmp_path / str(count)
        config = runs.config(data, folder / "run")
        shutil.copytree(indexed, config.run.dir)
        train_checkpoints(config.run.dir).save(0, *State.start(config, load_or_index(config)).saved())
        (folder / "config.yaml").write_text(dump_config(config))
        forked.run(grouped_steps.label_run, count, folder)
        tables.append(pd.read_parquet(config.run.dir / "labels" / "labels.parquet"))
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert len(tables[0]) > 2 * 2  # a file for each rank


@pytest.mark.slow
def test_groups_with_class_weights_and_frozen_blocks_equal_one_rank(trained: Trainer) -> None:
    """Also with a learning rate of its own for each layer."""
    sections: dict[str, dict] = {
        "loss": {"class_weights": "balanced"},
        "train": {"freeze": 1, "init": "unused", "layer_decay": 0.7},
    }
    (one,) = trained(1, None, **sections)
    for rank in trained(3, {"8": 2, "6+4": 1}, **sections):
        for name, parameter in rank[SEVERAL_STEPS]["parameters"].items():
            assert difference(parameter, one[SEVERAL_STEPS]["parameters"][name]) < 1e-9, name
