"""Exports give the model's answers: ONNX graphs, the router without torch, torch.export, one folder, one point."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import small_runs as runs
import videoadapt as va
from conftest import need
from videoadapt.config.load import Config
from videoadapt.config.sections import AssignConfig, DataConfig, EvaluateConfig, ModelConfig
from videoadapt.data.clips.datasets import EvalVideos, _evaluation_indices
from videoadapt.data.index.manifest import load_or_index
from videoadapt.data.video.readers import open_video
from videoadapt.errors import CheckpointError, RunError, UserError
from videoadapt.exporting import graphs, hugging_face
from videoadapt.exporting.adaptive import AdaptiveModel
from videoadapt.exporting.card import Facts, _evaluation, cut_card, model_card
from videoadapt.exporting.export import _compare_router, _sample, export, routing_settings
from videoadapt.exporting.hugging_face import require_plain
from videoadapt.model.checkpoint import load_model, train_checkpoints, weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.load import load_weights
from videoadapt.routing.assigner import Assigner, assigner_checkpoints
from videoadapt.routing.leap_rules import Logistic
from videoadapt.routing.policy import Leap
from videoadapt.routing.policy_file import PolicyFile
from videoadapt.routing.router import assign_probabilities
from videoadapt.runtime.files import write_json
from videoadapt.runtime.inputs import Inputs
from videoadapt.training.state import State

need("onnxruntime", "runs exported graphs")

POINTS = ("8", "6@0.7")  # the second has a distillation token, and drops tokens
POLICIES = (
    *("assigned", "assigned:0.2", "fixed:8", "fixed:6@0.7", "mixture:8,6@0.7:0.5"),
    *("cascade:6@0.7,8:0.2", "cascade:6@0.7,8:0.03:margin"),
)
VIDEOS = 4

# Runs in a process that has neither torch nor videoadapt; the folder of the ONNX files is the first argument.
PROGRAM = """
import json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from onnx_router import OnnxRouter
videos = np.load(sys.argv[2])
answers = {}
for policy in sys.argv[3:]:
    router = OnnxRouter(policy=policy)
    found = [router.predict(videos[name], top=12) for name in videos.files]
    answers[policy] = [(a.classes, a.probabilities, a.points, a.macs) for a in found]
loaded = sorted({"torch", "videoadapt"} & {name.partition(".")[0] for name in sys.modules})
print(json.dumps({"answers": answers, "loaded": loaded}))
"""


def saved_run(folder: Path, **model: Any) -> Config:
    """A run with an untrained model and an untrained assigner, whose choices differ from clip to clip."""
    config = runs.config(
        runs.make_data(folder / "data"),
        folder / "run",
        data={"holdout": 0.0},
        label={"source": "train"},
        loss={"dropped": "ce"},
        model={"points": POINTS, "depth": 1, "drop_blocks": [1], "distill_token": True, "init_std": 0.3} | model,
        evaluate={"spatial_crops": 2, "temporal_views": 2, "speed_clips": 0},
        export={"clips": 2 * VIDEOS},
    )
    manifest = load_or_index(config)
    train_checkpoints(config.run.dir).save(0, *State.start(config, manifest).saved())
    torch.manual_seed(0)
    assigner = Assigner(config.assign, len(config.model.points)).eval()
    videos: Any = EvalVideos(manifest, config, temporal_views=2, spatial_crops=1, views=False)
    rows = np.flatnonzero(manifest["split"] == "val")[:VIDEOS].tolist()
    cheap = assign_probabilities(assigner, torch.cat([videos[row].thumbnails for row in rows]))[:, -1]
    meta = {"points": list(config.model.points), "threshold": float(np.median(cheap))}  # half of the clips at each
    meta["assign"] = config.assign.model_dump(mode="json")
    tensors = {f"model/{name}": tensor for name, tensor in assigner.state_dict().items()}
    meta["model"] = weights_digest(load_model(config.run.dir))
    assigner_checkpoints(config.run.dir).save(0, tensors, meta)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = saved_run(tmp_path_factory.mktemp("export"))
    va.evaluate(config, progress=False)
    return config


@pytest.fixture(scope="module")
def exported(run: Config) -> va.ExportSummary:
    return va.export(run)


def first_videos(config: Config) -> list[str]:
    manifest = load_or_index(config)
    return [manifest.row(row).path for row in np.flatnonzero(manifest["split"] == "val")[:VIDEOS].tolist()]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the graphs


def test_every_graph_is_compared_on_real_clips_and_the_figures_are_kept(
    run: Config, exported: va.ExportSummary
) -> None:
    views = 2 * VIDEOS * 2
    wanted = {(kind, graph) for kind in ("onnx", "torch", "pretrained") for graph in (*POINTS, "assigner")}
    assert {(c.format, c.graph) for c in exported.checked} == wanted | {("router", "assigned")}
    for checked in exported.checked:
        assert checked.difference <= 1e-4
        assert checked.inputs == (2 * VIDEOS if checked.graph in ("assigner", "assigned") else views)
        assert checked.same == 1.0
    assert exported.clips == f"{2 * VIDEOS} clips of {VIDEOS} videos of split val"
    folder = run.run.dir / "export"
    assert json.loads((folder / "export.json").read_text()) == exported.to_json()
    assert sorted(snapshot(folder)) == sorted(
        ["export.json"]
        + [f"onnx/{name}" for name in ("weights.bin", "routing.json", "onnx_router.py", "assigner.onnx")]
        + [f"onnx/point-{point}.onnx" for point in POINTS]
        + ["torch/assigner.pt2", *(f"torch/point-{point}.pt2" for point in POINTS)]
        + [f"pretrained/{name}" for name in ("README.md", "config.json", "model.safetensors")]
    )


def test_points_share_their_weights_on_the_disk(run: Config, exported: va.ExportSummary) -> None:  # noqa: ARG001
    sizes = {path.name: path.stat().st_size for path in (run.run.dir / "export" / "onnx").iterdir()}
    alone = sum(p.numel() * 4 for p in load_model(run.run.dir).blocks.parameters())
    assert sizes["weights.bin"] < 2 * alone + sizes["assigner.onnx"] + 500_000  # not once for each point
    assert all(sizes[f"point-{point}.onnx"] < alone for point in POINTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"points": ["6"], "embed": "kernel"},
        {"points": ["4"], "embed": "stem", "num_frames": 1, "temporal": False, "dense_head": 0.25, "share_patch": True},
    ],
)
def test_other_embeddings_give_the_models_logits_at_any_batch_size(changes: dict[str, Any], tmp_path: Path) -> None:
    base = {"width": 16, "depth": 1, "heads": 2, "patch": 8, "size": 64, "num_frames": 2, "num_classes": 5}
    model = TimeSformer(ModelConfig(**(base | {"init_std": 0.1} | changes))).eval()
    [(name, (graph, example))] = graphs.graphs_of(model, None).items()
    graphs.save_onnx(tmp_path, {"a.onnx": graphs.to_onnx(graphs.traced(graph, example), name, 18)})
    run_onnx = graphs.onnx_function(tmp_path / "a.onnx")
    clips = torch.randint(256, (3, *example.shape[1:]), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model(va.preprocess(model, clips), name)
    assert isinstance(expected, Tensor) and expected.std() > 0.01
    torch.testing.assert_close(run_onnx(clips), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(run_onnx(clips[2:]), expected[2:], atol=1e-4, rtol=0)


def test_an_assigner_of_convolutions_gives_its_probabilities(tmp_path: Path) -> None:
    model = TimeSformer(ModelConfig(width=16, depth=1, heads=2, patch=8, size=32, num_frames=2, points=("4", "2")))
    assigner = Assigner(AssignConfig(family="convolutions", frames=2, size=32, stages=2), 2).eval()
    graph, example = graphs.graphs_of(model, assigner)["assigner"]
    graphs.save_onnx(tmp_path, {"a.onnx": graphs.to_onnx(graphs.traced(graph, example), "assigner", 18)})
    thumbnails = torch.randint(256, (3, *example.shape[1:]), dtype=torch.uint8)
    expected = assigner.probabilities(thumbnails)
    torch.testing.assert_close(graphs.onnx_function(tmp_path / "a.onnx")(thumbnails), expected, atol=1e-5, rtol=0)


# ---- the router


def test_the_router_answers_as_predict_without_torch(
    run: Config,
    exported: va.ExportSummary,
    tmp_path: Path,  # noqa: ARG001
) -> None:
    folder = shutil.copytree(run.run.dir / "export" / "onnx", tmp_path / "moved")
    paths = first_videos(run)
    frames = {}
    for number, path in enumerate(paths):
        with open_video(path) as reader:
            _, indices = _evaluation_indices(reader, run, run.evaluate.temporal_views)
            frames[str(number)] = np.stack([reader.frames(clip) for clip in indices])
    np.savez(tmp_path / "frames.npz", **frames)  # type: ignore[arg-type]
    line = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "frames.npz"), *POLICIES]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loaded"] == []
    used: set[str] = set()
    for policy in POLICIES:
        expected = va.predict(run, paths, policy, top=12, progress=False)
        for ours, (classes, probabilities, points, macs) in zip(expected, found["answers"][policy], strict=True):
            assert (ours.points, ours.macs) == (tuple(points), macs)
            assert ours.classes[0] == classes[0]
            theirs = dict(zip(classes, probabilities, strict=True))
            assert [theirs[name] for name in ours.classes] == pytest.approx(ours.probabilities, abs=1e-5)
        used |= {f"{policy} {point}" for prediction in expected for point in prediction.points}
    assert {f"assigned {point}" for point in POINTS} <= used  # or the test would not tell the points apart


def test_the_router_leaps_as_the_model(run: Config, exported: va.ExportSummary, tmp_path: Path) -> None:  # noqa: ARG001
    """The regressions of the leap stand in `routing.json`, and in `config.json` of a saved model."""
    from videoadapt.exporting.onnx_router import OnnxRouter

    paths, (dear, cheap) = first_videos(run), POINTS
    sure = [prediction.probabilities[0] for prediction in va.predict(run, paths, f"fixed:{cheap}", progress=False)]
    # The chance of the cheap point follows its probability, and that of the dear one is even: half of the clips leap.
    chances = Logistic((float(np.median(sure)), 0.0, 0.0, 0.0), (1.0,) * 4, ((0.0,) * 5, (50.0, 0.0, 0.0, 0.0, 0.0)))
    leap = Leap(cheap, POINTS, (1.0, 0.5), chances, 0.01)
    adaptive = AdaptiveModel(load_model(run.run.dir), None, leap, evaluate=run.evaluate, data=run.data)
    folder = shutil.copytree(run.run.dir / "export" / "onnx", tmp_path / "onnx")
    write_json(folder / "routing.json", routing_settings(adaptive))
    adaptive.save_pretrained(tmp_path / "saved")
    loaded = AdaptiveModel.from_pretrained(tmp_path / "saved")
    assert loaded.policy == leap
    manifest, router = load_or_index(run), OnnxRouter(folder)
    rows = np.flatnonzero(manifest["split"] == "val")[:VIDEOS].tolist()
    videos: Any = EvalVideos(manifest, run, temporal_views=2, spatial_crops=2)
    views = torch.cat([videos[row].views for row in rows])
    for price in (0.0, 0.01, 0.6):
        routed = OnnxRouter(folder, f"leap:{cheap}:price={price}").run(views.numpy())
        ours = va.Router(adaptive.model, leap.at(price), batch=4, average=run.evaluate.average).run(views)
        assert routed.points == tuple(POINTS[number] for number in ours.choice)
        np.testing.assert_allclose(routed.logits, ours.logits, atol=1e-4)
    assert set(router.run(views.numpy()).points) == {dear, cheap}
    with pytest.raises(ValueError, match="a leap needs the regressions of a leap that was exported"):
        OnnxRouter(folder, f"leap:{dear}:price=0.1")


def test_the_router_as_a_program_and_its_errors(run: Config, exported: va.ExportSummary, tmp_path: Path) -> None:  # noqa: ARG001
    from videoadapt.exporting.onnx_router import OnnxRouter

    folder = shutil.copytree(run.run.dir / "export" / "onnx", tmp_path / "onnx")
    np.save(tmp_path / "a.npy", np.zeros((4, 70, 90, 3), np.uint8))
    line = [sys.executable, str(folder / "onnx_router.py"), str(tmp_path / "a.npy"), "--policy"]
    done = subprocess.run([*line, "fixed:8"], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["points"] == ["8"], done.stderr
    done = subprocess.run([*line, "fixed:7"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "policy 'fixed:7': expected assigned, fixed:POINT" in done.stderr and "8, 6@0.7" in done.stderr
    empty = tmp_path / "empty.npy"
    empty.touch()
    done = subprocess.run(
        [sys.executable, folder / "onnx_router.py", empty], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and f"{empty}: is no file of numpy.save" in done.stderr
    wrong = ("cascade:8:0.5", "cascade:8,8:0.5", "cascade:8,6@0.7:1.5", "assigned:x", "oracle", "mixture:8:0.5")
    for policy in (*wrong, "assigned:0.5,0.6", "mixture:8,6@0.7:0.1,0.2"):
        with pytest.raises(ValueError, match="expected assigned"):
            OnnxRouter(folder, policy)
    with pytest.raises(ValueError, match=r"frames: expected uint8 \(clips, 4, H, W, 3\), got uint8 \(3, 70, 90, 3\)"):
        OnnxRouter(folder).predict(np.zeros((3, 70, 90, 3), np.uint8))
    for name in ("weights.bin", "assigner.onnx"):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"{name}: is missing; copy the whole folder"):
            OnnxRouter(folder)
        shutil.copy(run.run.dir / "export" / "onnx" / name, folder)
    (folder / "routing.json").write_text("[]")
    with pytest.raises(ValueError, match=r"routing\.json: of another version"):
        OnnxRouter(folder)
    with pytest.raises(ValueError, match=r"routing\.json: cannot be read"):
        OnnxRouter(tmp_path)


def test_the_router_refuses_an_answer_that_is_nan(run: Config, exported: va.ExportSummary, tmp_path: Path) -> None:  # noqa: ARG001
    """Sorted, a NaN answer would be the class 0, and its JSON no JSON."""
    from videoadapt.exporting.onnx_router import OnnxRouter

    folder = shutil.copytree(run.run.dir / "export" / "onnx", tmp_path / "onnx")
    weights, head = folder / "weights.bin", load_model(run.run.dir).head.weight.detach()
    content = weights.read_bytes()
    assert content.count(head.numpy().tobytes()) == 1
    weights.write_bytes(content.replace(head.numpy().tobytes(), torch.full_like(head, torch.nan).numpy().tobytes()))
    with pytest.raises(ValueError, match="the model's probabilities are NaN at 8"):
        OnnxRouter(folder, "fixed:8").predict(np.zeros((4, 70, 90, 3), np.uint8))


def test_a_policy_that_the_router_cannot_run_is_refused_at_once(run: Config) -> None:
    over_views = run.export.model_copy(update={"policy": "cascade:8:views:0.9"})
    with pytest.raises(UserError, match=r"cannot run it: policy 'cascade:8:views:0\.9:prob.*set export"):
        export(run.model_copy(update={"export": over_views}))


def test_a_router_that_ends_elsewhere_is_refused_unless_rounding_decides(
    run: Config, exported: va.ExportSummary, tmp_path: Path
) -> None:
    folder = shutil.copytree(run.run.dir / "export" / "onnx", tmp_path / "onnx")
    sample = _sample(run, AdaptiveModel.from_run(run))
    assigned = AdaptiveModel.from_run(run).assigned
    assert assigned is not None
    sure = np.sort(assign_probabilities(assigned.assigner, sample.thumbnails)[:, -1])[VIDEOS]  # of one clip

    def with_threshold(threshold: float) -> AdaptiveModel:
        return AdaptiveModel.from_run(run, f"assigned:{threshold:.9f}")

    settings = routing_settings(with_threshold(sure - 1e-5))
    write_json(folder / "routing.json", settings)
    checked = _compare_router(folder, with_threshold(sure + 1e-5), sample, 1e-4)
    assert 0 < checked.same < 1 and checked.difference < 1e-4
    with pytest.raises(RunError, match=r"ends clip \d at point 6@0\.7 with \d+ MACs, the model at 8 with"):
        _compare_router(folder, with_threshold(1.0), sample, 1e-4)
    write_json(folder / "routing.json", settings | {"macs": {point: 1 for point in POINTS}})
    with pytest.raises(RunError, match="MACs"):
        _compare_router(folder, with_threshold(sure - 1e-5), sample, 1e-4)


# ---- nothing half


def test_an_export_that_differs_leaves_the_earlier_one(run: Config, exported: va.ExportSummary) -> None:  # noqa: ARG001
    folder = run.run.dir / "export"
    before = snapshot(folder)
    strict = run.export.model_copy(update={"tolerance": 1e-12, "formats": ("pretrained", "torch")})
    strict_point = strict.model_copy(update={"point": "8"})
    moved = run.model_copy(update={"export": strict_point})
    with pytest.raises(RunError, match=r"graph of point 8 differs from the model by .* more than export\.tolerance"):
        export(moved)
    assert snapshot(folder) == before


def test_a_format_that_fails_leaves_the_others_unchanged_too(
    run: Config,
    exported: va.ExportSummary,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = run.run.dir / "export"
    stamps = {path: path.stat().st_ino for path in folder.rglob("*")}

    def torn(_: Path) -> AdaptiveModel:
        raise CheckpointError("torn")

    monkeypatch.setattr(AdaptiveModel, "from_pretrained", torn)
    both = run.export.model_copy(update={"formats": ("torch", "pretrained")})
    with pytest.raises(CheckpointError, match="torn"):
        export(run.model_copy(update={"export": both}))
    assert {path: path.stat().st_ino for path in folder.rglob("*")} == stamps


def test_a_missing_package_is_named_with_the_line_to_install_it(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"needs no_such_package; run `pip install 'videoadapt\[export\]'`"):
        export(run)


# ---- one folder with model, assigner and policy


def test_a_saved_model_predicts_as_the_run(run: Config, exported: va.ExportSummary, tmp_path: Path) -> None:  # noqa: ARG001
    loaded = AdaptiveModel.from_pretrained(run.run.dir / "export" / "pretrained")
    paths = first_videos(run)
    assert loaded.predict(paths, progress=False) == va.predict(run, paths, progress=False)
    for policy in POLICIES:
        assert list(loaded.predict(paths, policy, progress=False)) == list(
            va.predict(run, paths, policy, progress=False)
        )
    loaded.save_pretrained(tmp_path / "again")
    again = snapshot(tmp_path / "again")
    assert again == snapshot(run.run.dir / "export" / "pretrained")


def test_the_card_has_figures_with_intervals_and_leaves_the_licence_to_the_user(
    run: Config,
    exported: va.ExportSummary,  # noqa: ARG001
) -> None:
    card = (run.run.dir / "export" / "pretrained" / "README.md").read_text()
    evaluated = json.loads((run.run.dir / "evaluate" / "evaluate.json").read_text())
    row = evaluated["policies"]["fixed:8"]
    assert (
        f"| `fixed:8` | {100 * row['top1']:.1f} ({100 * row['top1_low']:.1f} to {100 * row['top1_high']:.1f}) |" in card
    )
    assert "oracle" not in card
    assert f"manifest `{evaluated['manifest']}`" in card
    assert "mean [0.45, 0.45, 0.45]" in card
    assert "| 6@0.7 | " in card and "| assigner, per clip | " in card
    assert "license:" not in card and "Licence: not stated." in card
    assert "library_name: videoadapt" in card.partition("---\n\n")[0]
    guessing = f"{evaluated['largest_class']}: {100 * evaluated['largest_class_fraction']:.1f} %"
    assert f"Always answering with the most frequent class, {guessing}" in card


@pytest.mark.parametrize(("failed", "counted"), [("wrong", 10), ("exclude", 7)])
def test_the_card_counts_the_videos_of_its_accuracies(tmp_path: Path, failed: str, counted: int) -> None:
    found = {
        "manifest": "m",
        "split": "val",
        "views": "1 clip",
        "model": "w",
        "policies": {},
        "listed": 10,
        "scored": 7,
    }
    write_json(tmp_path / "evaluate" / "evaluate.json", found | {"failed_count_as": failed, "listed": 10})
    assert Facts(**_evaluation(tmp_path, "w")).scored == counted


def test_the_card_names_the_initial_weights_and_their_licence_as_far_as_they_are_known(run: Config) -> None:
    model = load_model(run.run.dir)
    for facts, words in (
        (Facts(), "Initial weights: not recorded."),
        (Facts(trained_on=9), "Initial weights: random."),
        (Facts(trained_on=9, initial="a.safetensors"), "Initial weights: `a.safetensors`. Their licence: not known."),
        (Facts(trained_on=9, initial="vit_x", initial_licence="MIT"), "`vit_x`. Their licence: MIT."),
    ):
        assert words in str(model_card(model, None, "fixed:8", facts))
        assert words in str(cut_card(model, "8", facts))


def test_the_cards_say_what_their_figures_are_not_of(run: Config) -> None:
    model = load_model(run.run.dir)
    row = {"top1": 0.5, "top1_low": 0.4, "top1_high": 0.6, "top5": 0.9, "macs_per_video": 1}
    facts = Facts(policies={"fixed:8": row}, seen=7, precision="bf16", scored=9)
    for card in (str(model_card(model, None, "fixed:8", facts)), str(cut_card(model, "8", facts))):
        assert (
            "7 of these videos, or others of their sources, were in the training, so that the figures may be too high."
            in card
        )
        assert "The figures are of the weights in bf16; the weights of this folder are float32." in card


def test_the_card_of_other_weights_is_written_anew_with_its_licence(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adaptive, card = AdaptiveModel.from_run(run, "fixed:8"), tmp_path / "README.md"
    adaptive.save_pretrained(tmp_path)
    edited = card.read_text().replace("library_name:", "license: mit\nlibrary_name:", 1) + "My words.\n"
    card.write_text(edited)
    adaptive.save_pretrained(tmp_path)
    assert card.read_text() == edited
    with torch.no_grad():
        adaptive.model.head.bias.add_(1.0)
    adaptive.save_pretrained(tmp_path)
    written = card.read_text()
    assert f"Weights: `{weights_digest(adaptive.model)}`" in written
    assert "license: mit\n" in written.partition("---\n\n")[0] and "Licence: mit." in written
    said = f"{card}: was the card of other weights, now README.old.md, and is written anew; its licence is kept"
    assert said in capsys.readouterr().err
    assert (tmp_path / "README.old.md").read_text() == edited
    card.write_text("A page of the user's own.")
    adaptive.save_pretrained(tmp_path)
    assert card.read_text() == "A page of the user's own."


def test_the_policy_of_a_saved_model_has_its_numbers(run: Config, tmp_path: Path) -> None:
    for policy in (
        "assigned:0.123456789",
        "mixture:8,6@0.7:0.123456789",
        "cascade:6@0.7,8:0.25:margin",
        "cascade:6@0.7,8:views:0.2,0.000001",
    ):
        adaptive = AdaptiveModel.from_run(run, policy)
        adaptive.save_pretrained(tmp_path)
        loaded = AdaptiveModel.from_pretrained(tmp_path)
        assert loaded.policy.written() == adaptive.policy.written()
        assert policy.removesuffix(":margin") in adaptive.policy.written()
    with pytest.raises(UserError, match="point"):
        AdaptiveModel.from_run(run, "fixed:7")


def test_a_calibrated_policy_is_exported_and_one_of_other_weights_is_refused(
    run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = run.model_copy(update={"run": run.run.model_copy(update={"dir": tmp_path / "run"})})
    shutil.copytree(run.run.dir, copied.run.dir)
    weights = weights_digest(load_model(run.run.dir))
    file = copied.run.dir / "calibrate" / "policy.json"
    one_crop = run.model_copy(update={"evaluate": run.evaluate.model_copy(update={"spatial_crops": 1})})
    inputs = Inputs.of(one_crop, None, None, "evaluate").to_json()
    calibrated = PolicyFile("fixed:6@0.7", "at most 1 point lost", weights, None, "m", 9, 2, inputs)
    calibrated.write(file)
    adaptive = AdaptiveModel.from_run(copied)
    assert adaptive.policy.name == "fixed:6@0.7"
    assert "may not hold here, other inputs: evaluate.spatial_crops: 1 then, 2 now" in capsys.readouterr().err
    paths = first_videos(run)
    assert adaptive.predict(paths, str(file), progress=False) == adaptive.predict(paths, progress=False)
    replace(calibrated, weights="other").write(file)
    for use in (
        lambda: AdaptiveModel.from_run(copied),
        lambda: AdaptiveModel(adaptive.model, None, str(file)),
        lambda: adaptive.predict(paths, str(file)),
    ):
        with pytest.raises(CheckpointError, match="was calibrated with another model"):
            use()
    assert AdaptiveModel.from_run(copied, "assigned").policy.name == "assigned"
    bf16 = copied.model_copy(update={"run": copied.run.model_copy(update={"precision": "bf16"})})
    replace(calibrated, weights=weights_digest(load_model(run.run.dir).bfloat16())).write(file)
    assert AdaptiveModel.from_run(bf16).facts.precision == "bf16"
    assert "was calibrated with weights in bf16. The weights of this model are float32" in capsys.readouterr().err


def test_a_folder_that_is_not_of_one_save_is_refused(run: Config, tmp_path: Path) -> None:
    first, other = tmp_path / "a", tmp_path / "b"
    adaptive = AdaptiveModel.from_run(run)
    adaptive.save_pretrained(first)
    with torch.no_grad():
        adaptive.model.head.bias.add_(1.0)
    adaptive.save_pretrained(other)
    shutil.copy(other / "model.safetensors", first)  # as if the second call had been killed after the weights
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its weights are not those of config\.json"):
        AdaptiveModel.from_pretrained(first)
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="torn"):
        AdaptiveModel.from_pretrained(other)
    for content in ("{", "[]", '{"videoadapt": []}', '{"videoadapt": {"format": 1}}'):
        (other / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json: .*save the model again"):
            AdaptiveModel.from_pretrained(other)
    settings = json.loads((first / "config.json").read_text())
    del settings["videoadapt"]["weights"]
    write_json(first / "config.json", settings)
    with pytest.raises(CheckpointError, match=r"describes no model \(without 'weights'\); save the model again"):
        AdaptiveModel.from_pretrained(first)
    (other / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: does not exist"):
        AdaptiveModel.from_pretrained(other)
    with pytest.raises(UserError, match="no such folder, and not to be had from the hub"):
        AdaptiveModel.from_pretrained("nobody/no-such-model", local_files_only=True)


def test_a_repository_in_hugging_faces_cache_loads_without_a_network(run: Config, tmp_path: Path) -> None:
    adaptive, folder = AdaptiveModel.from_run(run), tmp_path / "models--someone--mine"
    adaptive.save_pretrained(folder / "snapshots" / ("1" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # of `conftest.py`
    loaded = AdaptiveModel.from_pretrained("someone/mine", cache_dir=tmp_path)
    assert loaded.policy.name == adaptive.policy.name
    assert weights_digest(loaded.model) == weights_digest(adaptive.model)


# ---- one point for Hugging Face


@torch.no_grad()
def test_a_point_that_is_cut_out_is_a_plain_timesformer(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers: Any = need("transformers", "the independent TimeSformer")
    done = runs.command("export", run.run.dir, "export.point=8", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["written"] == ["timesformer-8"]
    [checked] = printed["checked"]
    assert (checked["format"], checked["graph"], checked["same"]) == ("transformers", "8", 1.0)
    folder = run.run.dir / "export" / "timesformer-8"
    theirs = transformers.TimesformerForVideoClassification.from_pretrained(folder).eval()
    ours = load_model(run.run.dir)
    clips = torch.randn(2, 3, 4, 64, 64)
    expected = ours(clips, "8")
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(theirs(clips.transpose(1, 2)).logits, expected, atol=1e-5, rtol=0)
    assert theirs.config.id2label == dict(enumerate(ours.class_names))
    processor = transformers.VideoMAEImageProcessor.from_pretrained(folder)
    pixels = processor([np.full((64, 64, 3), 255, np.uint8)] * 4, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, torch.full((1, 4, 3, 64, 64), (1 - 0.45) / 0.225), atol=1e-5, rtol=0)
    again = TimeSformer(ours.config.model_copy(update={"points": ("8",), "distill_token": False})).eval()
    load_weights(again, folder)
    assert torch.equal(again(clips, "8"), expected)
    monkeypatch.setattr(hugging_face.importlib.util, "find_spec", lambda _: None)  # as if transformers were missing
    logits, package = hugging_face.cut_logits(folder, ours, "8", clips)
    assert package == "videoadapt"
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_shorter_point_sees_frames_resized_to_its_length(tmp_path: Path) -> None:
    transformers: Any = need("transformers", "the independent TimeSformer")
    config = ModelConfig(
        width=16, depth=2, heads=2, patch=8, size=64, num_frames=2, num_classes=5, points=("8", "6"), init_std=0.3,
        time_init_std=0.5,
    )  # fmt: skip
    model = TimeSformer(config).eval()
    hugging_face.write_cut(tmp_path, model, require_plain(model, "6"), EvaluateConfig(), DataConfig())
    clips = torch.randn(2, 3, 2, 64, 64)
    logits, package = hugging_face.cut_logits(tmp_path, model, "6", clips)
    assert package == transformers.__name__
    expected = model(clips, "6")
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    cut = EvaluateConfig(crop_pct=0.875), DataConfig(interpolation="bicubic")
    hugging_face.write_cut(tmp_path, model, "6", *cut)
    processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path)
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (54, 48)  # 48 / 0.875
    assert processor.resample == PIL.Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    ("changes", "point", "reason"),
    [
        ({}, "5", "the model has no point 5; it has 8, 6"),
        ({"points": ["8", "8@0.7"], "drop_blocks": [1]}, "8@0.70", "it drops tokens"),
        ({"distill_token": True}, "6", "it has a distillation token"),
        ({"embed": "kernel"}, "6", "its patches are made by model.embed: kernel, not resize"),
        ({"share_norm": True}, "6", "its length shares weights with the others"),
        ({"num_frames": 1, "temporal": False}, "6", "it has no temporal attention"),
        ({"layer_scale": 1.0, "residual_scale": 0.5}, "6", "LayerScale .*; its residual branches are scaled"),
        ({"dense_head": 0.25}, "6", "it has a head on patches"),
    ],
)
def test_a_point_that_is_no_plain_timesformer_is_refused_with_the_reason(
    changes: dict[str, Any], point: str, reason: str
) -> None:
    base = {"width": 16, "depth": 1, "heads": 2, "patch": 8, "size": 64, "num_frames": 2, "points": ["8", "6"]}
    model = TimeSformer(ModelConfig(**(base | changes)))
    with pytest.raises(UserError, match=reason):
        require_plain(model, point)
