"""`export`: writes a run's model for other programs, and compares what was written with the model on real clips.

Each format is written to a temporary folder and compared there. Only when all are right are they put in their places:
an export that fails leaves the earlier one, or nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config
from videoadapt.config.sections import Format
from videoadapt.data.clips.datasets import EvalVideos, VideoViews
from videoadapt.data.clips.views import normalise
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import RunError, UserError, plural
from videoadapt.exporting import graphs
from videoadapt.exporting.adaptive import AdaptiveModel
from videoadapt.exporting.card import cut_card
from videoadapt.exporting.hugging_face import cut_logits, require_plain, write_cut
from videoadapt.model.checkpoint import weights_digest
from videoadapt.routing.assigner import assigner_macs
from videoadapt.routing.decide import clip_macs, views_run
from videoadapt.routing.policy import Leap, Policy
from videoadapt.routing.router import Router
from videoadapt.runtime.console import say
from videoadapt.runtime.files import replacing_folder, write_json
from videoadapt.runtime.results import Result, Table

FOLDER = "export"  # in the run folder
_BATCH = 8  # inputs of a forward pass of the comparison
_ROUTER = Path(__file__).with_name("onnx_router.py")
_Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Checked:
    """One exported graph, compared with the model. The names are keys of `export.json`.

    Attributes:
        format: `onnx`, `torch`, `router`, `pretrained`, or the package that ran a point that was cut out.
        graph: The point, `assigner`, or the policy of the router.
        inputs: Clips or views on which both ran, in batches of several sizes.
        difference: The largest difference of a logit, or of a probability of the assigner.
        same: The fraction of the inputs with the same best class; of the router, with the same point.
    """

    format: str
    graph: str
    inputs: int
    difference: float
    same: float


@dataclass(frozen=True, repr=False)
class ExportSummary(Result):
    """What `export` has written. The names are keys of `export.json`.

    Attributes:
        folder: The folder of the exports.
        written: The folders in it that were written.
        policy: The policy of the exported model; None for a point that was cut out.
        clips: The clips of the comparison in words.
        tolerance: `export.tolerance`.
        weights: `weights_digest` of the model in float32.
        checked: One entry for each graph.
    """

    folder: str
    written: tuple[str, ...]
    policy: str | None
    clips: str
    tolerance: float
    weights: str
    checked: tuple[Checked, ...]

    def table(self) -> Table:
        """Returns the comparison of each graph with the model."""
        rows = [(c.format, c.graph, c.inputs, f"{c.difference:.1e}", f"{100 * c.same:.0f} %") for c in self.checked]
        title = f"{', '.join(self.written)} in {self.folder}; compared with the model on {self.clips}"
        return Table(title, ("format", "graph", "inputs", "largest difference", "same answer"), rows)


class _Sample(NamedTuple):
    """Clips of the comparison, and where they come from."""

    views: Tensor  # (clips, crops, C, T, S, S) uint8
    thumbnails: Tensor  # (clips, C, A, s, s) uint8
    source: str


def export(config: Config) -> ExportSummary:
    """Writes the model of a run in the formats of `export.formats`, or one point (`export.point`).

    Args:
        config: The run's config.

    Returns:
        What was written, and how far it differs from the model. `export/export.json` has the same.

    Raises:
        UserError: A package is missing, the policy cannot be exported, the point is no plain TimeSformer, or there are
            no clips to compare on.
        CheckpointError: There is no model.
        RunError: A graph differs from the model by more than `export.tolerance`.
    """
    wanted, folder = config.export, config.run.dir / FOLDER
    if "onnx" in wanted.formats and wanted.point is None:
        graphs.require_onnx()  # before the model is loaded
    adaptive = AdaptiveModel.from_run(config, wanted.policy)
    point = require_plain(adaptive.model, wanted.point) if wanted.point is not None else None
    if "onnx" in wanted.formats and point is None:
        _require_routable(adaptive)
    sample = _sample(config, adaptive)
    written: tuple[str, ...] = wanted.formats
    if point is not None:
        written, checked = (f"timesformer-{point}",), _export_point(folder, adaptive, point, sample, config)
    else:
        checked = list(_export_all(folder, adaptive, sample, config))
    summary = ExportSummary(
        folder=str(folder),
        written=written,
        policy=adaptive.policy.name if point is None else None,
        clips=sample.source,
        tolerance=wanted.tolerance,
        weights=weights_digest(adaptive.model),
        checked=tuple(checked),
    )
    name = "export.json" if point is None else f"{written[0]}.json"
    write_json(folder / name, summary.to_json())
    for earlier in get_args(Format):
        if earlier not in written and (folder / earlier).exists():
            say(f"{folder / earlier}: unchanged, of an earlier export")
    return summary


def _sample(config: Config, adaptive: AdaptiveModel) -> _Sample:
    """Reads the clips of the comparison: the first readable videos of val, or of train without one."""
    count = config.export.clips
    if adaptive.assigner is not None:  # thumbnails are cut as in the assigner's fit
        config = config.model_copy(update={"assign": adaptive.assigner.config})
    if count == 0:
        return _random_sample(config)
    manifest = load_or_index(config)
    split = "val" if "val" in manifest["split"] else "train"
    crops, temporal = config.evaluate.spatial_crops, config.evaluate.temporal_views
    videos = EvalVideos(manifest, config, temporal_views=temporal, spatial_crops=crops)
    found: list[VideoViews] = []
    for row in np.flatnonzero(manifest["split"] == split).tolist():
        if len(found) * temporal >= count:
            break
        video = videos[row]
        if isinstance(video, VideoViews):
            found.append(video)
    if not found:
        raise UserError("export: no video could be read to compare on; export.clips=0 compares on random pixels")
    views = torch.cat([video.views for video in found])
    source = f"{plural(len(views), 'clip')} of {plural(len(found), 'video')} of split {split}"
    return _Sample(views, torch.cat([video.thumbnails for video in found]), source)


def _require_routable(adaptive: AdaptiveModel) -> None:
    """Raises `UserError` if the router for onnxruntime cannot run the policy."""
    from videoadapt.exporting.onnx_router import parse_policy  # imports onnxruntime, of the extra `export`

    try:
        parse_policy(adaptive.policy.written(), routing_settings(adaptive))
    except ValueError as error:
        raise UserError(
            f"export: the router for onnxruntime cannot run it: {error}; set export.policy, or leave onnx out of "
            "export.formats"
        ) from None


def _random_sample(config: Config) -> _Sample:
    model, assign = config.model, config.assign
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 1, 3, model.num_frames, model.size, model.size), (4, 3, assign.frames, assign.size, assign.size))
    views, thumbnails = (torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in shapes)
    return _Sample(views, thumbnails, "4 clips of random pixels")


def _export_all(folder: Path, adaptive: AdaptiveModel, sample: _Sample, config: Config) -> Iterator[Checked]:
    wanted = config.export
    modules = graphs.graphs_of(adaptive.model, adaptive.assigner)
    programs = {}
    if {"onnx", "torch"} & set(wanted.formats):
        for name, (module, example) in modules.items():
            say(f"export: tracing {_label(name)}")
            programs[name] = graphs.traced(module, example)
    flat = sample.views.flatten(0, 1)  # (clips * crops, C, T, S, S)
    inputs = {name: sample.thumbnails if name == "assigner" else flat for name in modules}
    expected = {name: _in_batches(module, inputs[name], (_BATCH,) * len(flat)) for name, (module, _) in modules.items()}

    def compare(kind: str, functions: Mapping[str, _Run]) -> Iterator[Checked]:
        for name, function in functions.items():
            # One batch of several, then one by one: the batch size is free.
            outputs = _in_batches(function, inputs[name], (max(len(inputs[name]) - 2, 1), 1, 1))
            yield _compared(kind, name, outputs, expected[name], wanted.tolerance)

    with ExitStack() as folders:
        names = dict.fromkeys(wanted.formats)  # each once
        temporary = {name: folders.enter_context(replacing_folder(folder / name)) for name in names}
        if "onnx" in temporary:
            _write_onnx(temporary["onnx"], programs, adaptive, config)
            files = {name: graphs.onnx_function(temporary["onnx"] / _file(name, "onnx")) for name in modules}
            yield from compare("onnx", files)
            yield _compare_router(temporary["onnx"], adaptive, sample, wanted.tolerance)
        if "torch" in temporary:
            for name, program in programs.items():
                graphs.save_program(program, temporary["torch"] / _file(name, "pt2"))
            loaded = {name: graphs.load_program(temporary["torch"] / _file(name, "pt2")) for name in programs}
            yield from compare("torch", loaded)
        if "pretrained" in temporary:
            adaptive.save_pretrained(temporary["pretrained"])
            read = AdaptiveModel.from_pretrained(temporary["pretrained"])
            again = graphs.graphs_of(read.model, read.assigner)
            yield from compare("pretrained", {name: module for name, (module, _) in again.items()})


def _export_point(folder: Path, adaptive: AdaptiveModel, point: str, sample: _Sample, config: Config) -> list[Checked]:
    model = adaptive.model
    clips = normalise(sample.views.flatten(0, 1), model.config.mean, model.config.std, torch.float32)
    with replacing_folder(folder / f"timesformer-{point}") as temporary, torch.inference_mode():
        write_cut(temporary, model, point, adaptive.evaluate, adaptive.data)
        cut_card(model, point, adaptive.facts).save(temporary / "README.md")
        outputs, package = cut_logits(temporary, model, point, clips)
        expected = model(clips, point)
        assert isinstance(expected, Tensor), "without `heads`, logits are returned"
        return [_compared(package, point, outputs, expected, config.export.tolerance)]


def _write_onnx(
    folder: Path, programs: Mapping[str, torch.export.ExportedProgram], adaptive: AdaptiveModel, config: Config
) -> None:
    """Writes the ONNX files with their weights, the router, and the settings that it reads."""
    models = {}
    for name, program in programs.items():
        say(f"export: translating {_label(name)} to ONNX")
        models[_file(name, "onnx")] = graphs.to_onnx(program, name, config.export.opset)
    graphs.save_onnx(folder, models)
    write_json(folder / "routing.json", routing_settings(adaptive))
    shutil.copyfile(_ROUTER, folder / _ROUTER.name)


def routing_settings(adaptive: AdaptiveModel) -> dict[str, Any]:
    """Returns the contents of `routing.json`: all that `onnx_router.py` must know of a model."""
    config, evaluate, data = adaptive.model.config, adaptive.evaluate, adaptive.data
    assigner, points = adaptive.assigner, config.points
    assigned = None
    if assigner is not None and adaptive.assigned is not None:
        assigned = {
            "threshold": adaptive.assigned.threshold,
            "frames": assigner.config.frames,
            "size": assigner.config.size,
            "macs": assigner_macs(assigner.config, len(points)),
        }
    return {
        "version": 1,
        "weights": weights_digest(adaptive.model),
        "files": {name: _file(name, "onnx") for name in (*points, *(["assigner"] if assigned else []))},
        "points": list(points),
        "macs": dict(point_macs(config)),
        "assigner": assigned,
        "policy": adaptive.policy.written(),
        "leap": adaptive.policy.to_json() if isinstance(adaptive.policy, Leap) else None,
        "classes": list(adaptive.model.class_names) or list(map(str, range(config.num_classes))),
        "num_frames": config.num_frames,
        "stride_frames": config.stride_frames,
        "fps": config.fps,
        "size": config.size,
        "short_side": int(config.size / evaluate.crop_pct),
        "interpolation": data.interpolation,
        "antialias": data.antialias,
        "sampling": data.sampling,
        "temporal_views": evaluate.temporal_views,
        "single_clip": evaluate.single_clip,
        "spatial_crops": evaluate.spatial_crops,
        "crop_offset": evaluate.crop_offset,
        "average": evaluate.average,
    }


def _compare_router(folder: Path, adaptive: AdaptiveModel, sample: _Sample, tolerance: float) -> Checked:
    """Routes the clips with onnxruntime and with the model, and compares points, costs and logits.

    A number that the policy compares may lie so near to a threshold that the rounding of the graphs decides. Such a
    clip is compared with the model under thresholds that differ by the tolerance, where it must end at the same point.

    Raises:
        RunError: A clip ends at another point, costs something else, or its logits differ by more than the tolerance.
    """
    from videoadapt.exporting.onnx_router import OnnxRouter

    router = OnnxRouter(folder)
    routed = router.run(sample.views.numpy(), sample.thumbnails.numpy())
    points, crops = adaptive.model.config.points, sample.views.shape[1]
    found = np.array([points.index(point) for point in routed.points])
    clips = np.arange(len(found))

    def by_model(policy: Policy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ours = Router(adaptive.model, policy, batch=_BATCH, average=adaptive.evaluate.average).run(
            sample.views, thumbnails=sample.thumbnails
        )
        ran = views_run(policy, ours.decision, len(points), clips=1, crops=crops)
        return ours.choice, ours.logits, clip_macs(policy, ran, adaptive.model.config)[0]

    chosen, _, macs = exact = by_model(adaptive.policy)
    ways, same = [exact], chosen == found
    if not same.all():
        ways += [by_model(adaptive.policy.shifted(by)) for by in (-tolerance, tolerance)]
    agree = np.stack([(choice == found) & (cost == routed.macs) for choice, _, cost in ways])  # (ways, clips)
    if not agree.any(0).all():
        clip = int((~agree.any(0)).argmax())
        raise RunError(
            f"export: by {router.policy}, the router for onnxruntime ends clip {clip} at point {routed.points[clip]} "
            f"with {routed.macs[clip]} MACs, the model at {points[chosen[clip]]} with {macs[clip]}; thresholds that "
            f"differ by export.tolerance {tolerance:g} do not explain it. Nothing was written. A higher "
            "export.tolerance, or export.formats=pretrained without the router, ends this"
        )
    expected = np.stack([logits for _, logits, _ in ways])[agree.argmax(0), clips]  # (clips, crops, classes)
    if not same.all():
        say(f"export: on {plural(int((~same).sum()), 'clip')}, rounding decides between two points of {router.policy}")
    logits, wanted = (torch.from_numpy(each).flatten(0, 1) for each in (routed.logits, expected))
    checked = _compared("router", router.policy, logits, wanted, tolerance)
    return Checked("router", router.policy, len(same), checked.difference, float(same.mean()))


def _in_batches(function: _Run | nn.Module, inputs: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the outputs of a function on inputs that are split into batches of at most these sizes."""
    outputs, start = [], 0
    with torch.inference_mode():
        for size in sizes:
            batch = inputs[start : start + size]
            if len(batch):
                outputs.append(function(batch))
            start += size
    return torch.cat(outputs)


def _compared(kind: str, graph: str, outputs: Tensor, expected: Tensor, tolerance: float) -> Checked:
    """Compares outputs `(inputs, classes)`.

    Raises:
        RunError: They differ by more than the tolerance, or one of them is NaN.
    """
    difference = float((outputs - expected).abs().max()) if len(outputs) else 0.0
    if not difference <= tolerance:  # `>` is False for NaN
        row = int((outputs - expected).abs().amax(-1).nan_to_num(torch.inf).argmax())
        raise RunError(
            f"export: the {kind} graph of {_label(graph)} differs from the model by {difference:.1e} on input {row}, "
            f"more than export.tolerance {tolerance:g}; nothing was written. Where tokens are dropped, two positions "
            "of nearly equal attention may change places; a higher export.tolerance accepts this"
        )
    same = (outputs.argmax(-1) == expected.argmax(-1)).float().mean()
    return Checked(kind, graph, len(outputs), difference, float(same) if len(outputs) else 1.0)


def _file(name: str, suffix: str) -> str:
    return f"{name}.{suffix}" if name == "assigner" else f"point-{name}.{suffix}"


def _label(name: str) -> str:
    return "the assigner" if name == "assigner" else f"point {name}"
