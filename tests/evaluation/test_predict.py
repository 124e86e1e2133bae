"""Evaluation and prediction decide alike: the same clip gets the same point and the same cost on both paths."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

import small_runs as runs
import videoadapt as va
from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, dump_config
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import CheckpointError, UserError
from videoadapt.evaluation.evaluate import _further, evaluate
from videoadapt.evaluation.predict import load_predictor, predict, predict_files
from videoadapt.model.checkpoint import load_model, train_checkpoints, weights_digest
from videoadapt.routing.assigner import Assigner, assigner_checkpoints, assigner_macs
from videoadapt.routing.decide import decide
from videoadapt.routing.label_rules import Choice
from videoadapt.routing.policy import NO_STEP, Evidence, OnePointPolicy, Policy, Step
from videoadapt.runtime.files import write_json
from videoadapt.training.state import State

POINTS = ("4", "3", "2")
CLASSES, CLIPS, CROPS = 2, 16, 2
NAN = np.nan


def table() -> np.ndarray:
    """Logits of each clip at each point, `(CLIPS, POINTS, CLASSES)`. Some clips have NaN at some or all points."""
    logits = np.random.default_rng(0).normal(0, 2, (CLIPS, len(POINTS), CLASSES)).astype(np.float32)
    logits[0] = NAN
    logits[1, 2] = NAN  # at the cheapest point
    logits[2, :2] = NAN
    logits[3, 1:] = NAN
    logits[4, 2, 1] = NAN  # of one class alone
    logits[5, 2, 1] = np.inf  # softmax of it is NaN
    return logits


def level(clip: int) -> int:
    """The grey level of the image that stands for a clip."""
    return 5 + 10 * clip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with an untrained model and an untrained assigner; its val split has an image of one grey level a clip."""
    folder = tmp_path_factory.mktemp("both")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
    for clip in range(CLIPS):
        image = Image.new("RGB", (20, 18), (level(clip),) * 3)
        image.save(folder / "val" / "ab"[clip % 2] / f"{clip}.png")
        image.save(folder / "train" / "ab"[clip % 2] / f"{clip}.png")
    config = runs.config(
        folder,
        folder / "run",
        data={"root": None, "classes": None, "holdout": 0.0, "short_side": None}
        | {split: {"annotations": str(folder / split)} for split in ("train", "val")},
        model={"width": 16, "heads": 2, "depth": 1, "patch": 4, "size": 16, "num_classes": CLASSES, "points": POINTS}
        | {"num_frames": 1, "stride_frames": 1, "temporal": False, "time_init_std": 0.0},
        label={"source": "train"},
        assign={"frames": 1, "stages": 1},
        evaluate={"spatial_crops": CROPS, "speed_clips": 0, "batch": 5, "cascade": ["2,4:0.5", "2,3,4:0.4,0.6:margin"]},
    )
    save_model(config)
    save_assigner(config)
    return config


def save_model(config: Config) -> None:
    state = State.start(config, load_or_index(config))
    train_checkpoints(config.run.dir).save(0, *state.saved())


def save_assigner(config: Config, *, points: tuple[str, ...] = POINTS) -> None:
    """An assigner whose choices differ from clip to clip."""
    torch.manual_seed(0)
    assigner = Assigner(config.assign, len(points))
    size = config.assign.size
    shades = torch.tensor([level(clip) for clip in range(CLIPS)], dtype=torch.uint8)
    thumbnails = shades[:, None, None, None, None].expand(-1, 3, 1, size, size)
    assigner.train()(thumbnails)  # statistics of its batch norms
    assigner.eval()
    with torch.no_grad():
        assigner.head.weight.mul_(3 / assigner(thumbnails).std(0)[:, None])
        assigner.head.bias.sub_(assigner(thumbnails).mean(0))
    meta = {
        "assign": config.assign.model_dump(mode="json"),
        "points": list(points),
        "threshold": 0.6,
        "model": weights_digest(load_model(config.run.dir)),
    }
    tensors = {f"model/{name}": tensor for name, tensor in assigner.state_dict().items()}
    assigner_checkpoints(config.run.dir).save(1, tensors, meta)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Makes every model answer from `table`: the grey level of a view says which clip it is."""
    logits = torch.from_numpy(table())

    def forward(model: va.TimeSformer, views: Tensor, point: str) -> Tensor:
        grey = (views.mean((1, 2, 3, 4)) * sum(model.config.std) / 3 + sum(model.config.mean) / 3) * 255
        clips = ((grey - level(0)) / (level(1) - level(0))).round().long()
        return logits[clips, POINTS.index(point)]

    monkeypatch.setattr(va.TimeSformer, "forward", forward)
    return logits.numpy()


@dataclass(frozen=True)
class SecondOpinion(Policy):
    """A policy that the package does not know: the cheapest point, and the costliest for doubtful answers."""

    doubt: float
    name = "second_opinion"
    needs = frozenset({"confidence"})

    def next(self, evidence: Evidence, last: Choice) -> Choice:
        cheapest = len(evidence.points) - 1
        margin = evidence.confidence["margin"]
        again = np.where((last == cheapest) & ~(margin > self.doubt), 0, NO_STEP)
        return np.where(last == NO_STEP, cheapest, again)

    def record(self) -> dict[str, object]:
        return {"doubt": self.doubt}


def test_both_paths_give_the_same_point_and_cost(run: Config, answers: np.ndarray) -> None:
    assert np.isnan(answers).any(-1).sum() > 5
    assigned = va.Assigned.load(run.run.dir)
    new = SecondOpinion(0.3)
    summary = evaluate(run, [new])
    assert summary.to_json()["policies"][new.name]["doubt"] == 0.3
    clips = pd.read_parquet(run.run.dir / "evaluate" / "clips.parquet").set_index(["policy", "video"])
    val = load_or_index(run).split("val")
    model = load_model(run.run.dir)
    policies: list[str | Policy] = [*(f"fixed:{p}" for p in POINTS), *(f"cascade:{t}" for t in run.evaluate.cascade)]
    policies += [assigned, new]
    for policy in policies:
        name = policy if isinstance(policy, str) else policy.name
        found = predict(model, val["path"].tolist(), policy, evaluate=run.evaluate, data=run.data)
        ends = [prediction.points[0] for prediction in found]
        assert ends == clips.loc[name].loc[val["video"], "point"].tolist(), name
        assert [p.macs for p in found] == clips.loc[name].loc[val["video"], "macs"].tolist(), name
        assert len(set(ends)) > 1 or name.startswith("fixed:"), f"{name} gives all clips the same point"


def test_the_verb_predict_decides_as_the_function(run: Config, answers: np.ndarray) -> None:
    paths = load_or_index(run).split("val")["path"].tolist()
    model = load_model(run.run.dir)
    for policy in (None, "cascade:2,4:0.5"):
        written = predict_files(run, paths, policy)
        assert written.policy == (policy or "assigned")
        given = policy or va.Assigned.load(run.run.dir)
        expected = predict(model, paths, given, evaluate=run.evaluate, data=run.data)
        usable = [p for p in expected if not np.isnan(p.probabilities).any()]
        assert 0 < len(usable) < len(expected)
        assert [(p.path, p.points, p.macs) for p in written] == [(p.path, p.points, p.macs) for p in usable]
        unusable = [p.path for p in expected if np.isnan(p.probabilities).any()]
        assert [row["path"] for row in written.failed] == unusable  # JSON has no NaN
        assert written.failed[0]["cause"].endswith("probabilities are NaN")


def test_a_predictor_answers_as_its_run_and_a_model_alone_says_that_it_has_no_settings(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictor = load_predictor(run, "fixed:2", top=1)
    assert list(predict(predictor, image(run))) == list(predict(run, image(run), "fixed:2", top=1))
    with pytest.raises(UserError, match="give them to load_predictor"):
        predict(predictor, image(run), "fixed:4")
    capsys.readouterr()
    (tmp_path / "config.yaml").write_text(dump_config(run))  # as `new` writes it: the run is elsewhere
    predict(load_model(tmp_path), image(run))
    assert "3 views of each video, as by default" in capsys.readouterr().err


def test_predictions_have_the_names_of_data_classes(run: Config, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("1 sit down\n2 stand up\n")
    named = run.model_copy(update={"data": run.data.model_copy(update={"classes": names})})
    [prediction] = predict_files(named, image(run), None)
    assert set(prediction.classes) == {"sit down", "stand up"}
    assert predict(load_model(run.run.dir), image(run), data=named.data)[0].classes[0] in {"sit down", "stand up"}
    for text, message in {
        "a\n": "has 1 class, but the model has 2",
        "b\na\n": "class 0 .* is 'b', but .* 'a'",
    }.items():
        names.write_text(text)
        with pytest.raises(UserError, match=rf"data\.classes: .*{message}"):
            predict_files(named, image(run), None)


def test_a_folder_of_videos_stands_for_its_videos_and_other_inputs_get_advice(run: Config, tmp_path: Path) -> None:
    for name in ("b.mp4", "deep/a.mkv", "b.jpg", ".hidden.mp4", "@eaDir/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no video")
    (tmp_path / "val.txt").write_text("b.mp4 0\n")
    found = predict_files(run, [str(tmp_path)], None)
    assert [row["path"] for row in found.failed] == [str(tmp_path / "b.mp4"), str(tmp_path / "deep" / "a.mkv")]
    assert found.left_out == [str(tmp_path / name) for name in ("b.jpg", "val.txt", "@eaDir")]
    inputs = ["https://example.org/a.mp4", "rtsp://cam/1", str(tmp_path / "val.txt")]
    causes = [row["cause"] for row in predict_files(run, inputs, None).failed]
    assert all(cause.endswith("download it, or record the camera to a file") for cause in causes[:2])
    assert causes[2].endswith("; expected video files, not a list of them")


def test_a_folder_that_cannot_be_listed_is_named(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    Image.new("RGB", (20, 18)).save(tmp_path / "a.png")
    scan = os.scandir

    def refusing(path: str) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = predict_files(run, [str(tmp_path)], None)
    assert len(found) == 1 and found.left_out == [f"{tmp_path / 'locked'} (Permission denied)"]


def test_a_generator_may_write_every_frame_into_the_same_memory(run: Config) -> None:
    levels = [level(clip) for clip in (6, 9, 12)]

    def camera(videos: bool) -> Iterator[np.ndarray]:
        memory = np.zeros((1, 18, 20, 3) if videos else (18, 20, 3), np.uint8)
        for grey in levels:
            memory[:] = grey
            yield memory

    def answers(videos: Any) -> list[tuple[float, ...]]:
        return [found.probabilities for found in predict(run, videos, "fixed:4", fps=1.0)]

    kept = [np.full((1, 18, 20, 3), grey, np.uint8) for grey in levels]
    assert answers(camera(videos=True)) == answers(kept) and len(set(answers(kept))) == len(levels)
    assert answers(camera(videos=False)) == answers(np.concatenate(kept))


def test_a_clip_without_a_usable_answer_runs_the_whole_cascade(run: Config, answers: np.ndarray) -> None:
    path = run.data.val.annotations
    macs = point_macs(run.model)
    [lost] = predict(
        load_model(run.run.dir), [Path(str(path)) / "a" / "0.png"], va.Cascade(("2", "3", "4"), (0.0, 0.0))
    )
    assert lost.points == ("4",)
    assert lost.macs == 3 * sum(macs.values())  # three crops is the default


@pytest.mark.parametrize(("average", "points"), [("probabilities", ("4",)), ("logits", ("2",))])
def test_the_average_of_views_decides_confidence_and_probabilities(
    run: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, average: Any, points: tuple[str, ...]
) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 255  # two crops: one black, one white
    Image.fromarray(pixels).save(tmp_path / "a.png")
    logits = np.array([[4.0, 0.0], [-1.5, 0.0]])  # of the black and the white crop

    def forward(model: va.TimeSformer, views: Tensor, point: str) -> Tensor:  # noqa: ARG001 - as TimeSformer.forward
        return torch.from_numpy(logits[(views.flatten(1).mean(1) > 0).int().numpy()])

    monkeypatch.setattr(va.TimeSformer, "forward", forward)
    evaluate = run.evaluate.model_copy(update={"average": average})
    [found] = predict(load_model(run.run.dir), [tmp_path / "a.png"], "cascade:2,4:0.7", evaluate=evaluate)
    odds = np.exp(logits - logits.max(1, keepdims=True))
    mean_of_probabilities = (odds / odds.sum(1, keepdims=True)).mean(0)  # 0.58 of the first class
    of_mean_logits = np.exp(logits.mean(0)) / np.exp(logits.mean(0)).sum()  # 0.78: the cascade ends at its first point
    expected = of_mean_logits if average == "logits" else mean_of_probabilities
    assert found.points == points
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)


def test_clips_pay_for_their_assigner_once_and_for_every_crop(run: Config, answers: np.ndarray) -> None:
    path = load_or_index(run).split("val")["path"].tolist()[7]
    [prediction] = predict(load_model(run.run.dir), [path], va.Assigned.load(run.run.dir), evaluate=run.evaluate)
    expected = CROPS * point_macs(run.model)[prediction.points[0]] + assigner_macs(run.assign, len(POINTS))
    assert prediction.macs == expected


Path_ = Callable[[Config], object]
PATHS: dict[str, Path_] = {
    "evaluate": evaluate,
    "predict": lambda config: predict_files(config, image(config), None),
    "va.predict": lambda config: predict(
        load_model(config.run.dir), image(config), va.Assigned.load(config.run.dir), evaluate=config.evaluate
    ),
}


def image(config: Config) -> list[str]:
    return load_or_index(config).split("val")["path"].tolist()[:1]


@pytest.fixture
def copy(run: Config, tmp_path: Path) -> Config:
    """A run of its own, which the test may change."""
    config = run.model_copy(update={"run": run.run.model_copy(update={"dir": tmp_path / "run", "seed": 2})})
    save_model(config)
    save_assigner(config)
    return config


@pytest.mark.parametrize("path", PATHS)
def test_an_assigner_of_other_weights_is_warned_of(copy: Config, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    PATHS[path](copy)
    assert "other weights" not in capsys.readouterr().err
    other = copy.model_copy(update={"run": copy.run.model_copy(update={"seed": 3})})
    save_model(other)  # as if the model was trained again after `assign`
    PATHS[path](other)
    assert "its assigner was fitted to the labels of other weights" in capsys.readouterr().err


@pytest.mark.parametrize("path", PATHS)
def test_an_assigner_of_other_points_is_refused(copy: Config, path: str) -> None:
    save_assigner(copy, points=("4", "2"))
    with pytest.raises(CheckpointError, match="was fitted for the points 4, 2, the model has 4, 3, 2"):
        PATHS[path](copy)


def test_an_assigner_with_other_settings_is_refused_by_evaluate_alone(copy: Config) -> None:
    """`predict` reads thumbnails with the assigner's own settings, so that the config's do not matter."""
    other = copy.model_copy(update={"assign": copy.assign.model_copy(update={"size": 48})})
    with pytest.raises(CheckpointError, match=r"assign\.size is 32 in the checkpoint, 48 in the config"):
        evaluate(other)
    assert len(predict_files(other, image(other), "assigned")) == 1


def test_a_prediction_says_which_policy_its_evaluation_favours(
    copy: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assigned = {
        **{"mixture": {"fixed:2": 1.0}, "difference_to_mixture": [0.0, 0.0, 0.0], "macs_per_video": 2.0},
        **{"cheaper_fixed": "fixed:2", "difference_to_cheaper_fixed": [0.0, -0.01, 0.01]},
        **{"macs_saved": -1.0, "difference_to_costliest": [0.0, -0.01, 0.01]},
    }
    policies = {"fixed:2": {"macs_per_video": 1.0}, "assigned": assigned}

    def said(model: str, policy: str | None = None) -> str:
        write_json(copy.run.dir / "evaluate" / "evaluate.json", {"model": model, "policies": policies})
        predict(copy, image(copy), policy)
        return capsys.readouterr().err

    own = weights_digest(load_model(copy.run.dir))
    assert "favours fixed:2, by --policy fixed:2: it costs 50.0 % less" in said(own)
    assert "favours" not in said(own, "assigned") + said("another model")
    leap = assigned | {"macs_saved": 0.4, "difference_to_mixture": [0.03, 0.01, 0.05], "cheaper_fixed": None}
    policies["leap:2:cost=0.5"] = leap
    assert "favours leap:2:cost=0.5, by --policy leap:2:cost=0.5: it saves 40.0 %" in said(own)


class Other(va.Assigned):
    """An assigned policy under another name."""

    name = "other"


def test_further_policies_are_checked_before_any_clip_is_scored(copy: Config) -> None:
    with pytest.raises(UserError, match="policy fixed:7: the model has no point 7"):
        evaluate(copy, [va.Fixed("7")])
    with pytest.raises(UserError, match="its assigner is not of this run"):
        evaluate(copy, [Other(Assigner(copy.assign, 3).eval(), POINTS)])
    with pytest.raises(UserError, match="two policies are named fixed:3"):
        evaluate(copy, [va.Fixed("3")])
    assert not (copy.run.dir / "scores").exists()


def test_a_text_that_names_a_policy_again_adds_none(copy: Config) -> None:
    texts = ["cascade:2,3:0.9", "fixed:2", "cascade:2,3:0.9", "cascade:2,3:0.8"]
    found, _ = _further(texts, [], None, load_model(copy.run.dir), copy)
    assert [policy.name for policy in found] == ["cascade:2,3:0.9", "cascade:2,3:0.8"]


def test_a_policy_that_needs_the_truth_exists_in_evaluations_alone(run: Config) -> None:
    with pytest.raises(UserError, match="oracle: needs the true classes, which only `videoadapt evaluate` knows"):
        predict(load_model(run.run.dir), image(run), va.Oracle())


class Broken(Policy):
    """A policy whose `next` comes from the test."""

    name = "broken"

    def __init__(self, following: Callable[[Choice], Choice]) -> None:
        self.following = following

    def next(self, evidence: Evidence, last: Choice) -> Choice:
        return self.following(last)

    def steps(self, points: tuple[str, ...], views: int) -> tuple[Step, ...]:
        return Step(0, 0, 1), Step(0, 1, 2), Step(1, 0, 1), Step(0, 1, 2)  # the last one is not of the mean before


@pytest.mark.parametrize(
    ("following", "message"),
    [
        (lambda last: np.full_like(last, NO_STEP), "ends a unit before its first step"),
        (lambda last: np.zeros_like(last), "runs a step twice on a unit"),
        (lambda last: np.where(last < 3, last + 1, NO_STEP), "step 3 continues after view 1, which has not run"),
    ],
)
def test_a_policy_that_breaks_its_own_rules_is_found_out(following: Callable[[Choice], Choice], message: str) -> None:
    with pytest.raises(ValueError, match=f"policy broken: {message}"):
        decide(Broken(following), Evidence(3, POINTS), lambda _rows, _step: {})


def test_nan_probabilities_of_an_assigner_give_the_costliest_point() -> None:
    probabilities = np.array([[0.1, 0.1, 0.8], [NAN, NAN, NAN], [0.1, NAN, 0.8]])
    policy: OnePointPolicy = va.Assigned(Assigner(va.Config().assign, 3), POINTS, 0.9)
    assert policy.choose(Evidence(3, POINTS, probabilities)).tolist() == [1, 0, 0]
