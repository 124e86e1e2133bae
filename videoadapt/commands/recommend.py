"""Chooses the settings of a fine-tuning run from what is known of the data, the weights and the machine.

All functions are pure. Each setting has its reason, which `videoadapt new` writes beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

from videoadapt.config.cost import point_macs
from videoadapt.config.sections import AssignConfig, CalibrateConfig, ModelConfig
from videoadapt.data.index.survey import Survey
from videoadapt.model.weights.facts import WeightsFacts
from videoadapt.routing.learn_then_test import videos_needed
from videoadapt.routing.threshold import FEWEST, choosing_clips

# A model for training without weights, far smaller than a ViT-S: a large one learns nothing from few clips.
_FROM_SCRATCH = {
    "width": 192,
    "depth": 6,
    "heads": 3,
    "mlp_ratio": 4.0,
    "patch": 16,
    "layer_scale": None,
    "qkv_bias": True,
}
_TIME_INIT_STD = 0.5  # from scratch: with zero the order of frames is hardly learnt (docs/log.md)
# Settings of a checkpoint of ours that other data need anew.
_CHOSEN = {"size", "num_frames", "stride_frames", "fps", "mean", "std", "points", "temporal"}

_LONGEST_CLIP_S = 8.5  # that of TimeSformer on Kinetics: 8 frames, 32 apart, at 30 a second
_LENGTHS = (14, 10, 7)  # largest lengths to consider, in patches per side
_HOLDOUTS = (0.2, 0.3)  # fractions of train to choose from
_FEW_CLIPS = 500  # below: fine-tuning all blocks forgets more than it learns
_IMBALANCED = 2.0  # largest class / smallest class
_TRAIN_MINUTES = {"cpu": 10.0, "cuda": 60.0}  # for training, without reading, unless the user gives another time
_BACKWARD = 2  # MACs of a backward pass / those of the forward pass
_VALIDATION = 0.15  # time of an epoch's validation / time of its training, at most
_NEARLY_ALL = 0.7  # of val: then all of it
SPEED_S = 60.0  # that `evaluate` takes for measuring speed, at most


class Setting(NamedTuple):
    """The value of a key, and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class MachineFacts:
    """The machine that will train."""

    device: Literal["cpu", "cuda"]
    name: str  # for people: `2 CPU cores`, `NVIDIA H100`
    cpus: int
    precision: Literal["fp32", "bf16"]
    macs_per_s: float  # of training, measured; of an otherwise idle machine
    slowdown: float = 1.0  # how many times as long as on an idle machine the same work takes at present


@dataclass(frozen=True)
class Alternative:
    """An input that the model could see, and the time that training with it takes on an idle machine."""

    frames: int
    pixels: int
    points: list[int]
    frozen: int  # blocks that keep the weights
    epochs: int  # that fit into the time; 0: not one
    minutes: float  # for `least_epochs`
    least_epochs: int  # that a run should have; the first alternative that allows them is chosen
    chosen: bool


@dataclass(frozen=True)
class Recommendation:
    """The settings of a run, and how long its stages take."""

    settings: dict[str, Setting]  # by key, such as `train.lr`
    seconds: dict[str, float]  # by stage, without reading the videos, on an idle machine
    minutes: float  # for training on an idle machine; the settings were chosen for it
    alternatives: list[Alternative]  # in the order of preference; each takes less time than those before it


class _Recipe(NamedTuple):
    """What the model sees of a video, at which points, and how often."""

    frames: int
    points: tuple[int, ...]  # the largest length first
    frozen: int  # blocks that keep the weights
    epochs: int  # that fit into the time; 0: not one
    epoch_s: float  # with its part of the validations
    validated: float  # fraction of val in a validation
    validate_every: int  # epochs


def recommend(
    data: Survey,
    weights: WeightsFacts | None,
    machine: MachineFacts,
    minutes: float | None = None,
    *,
    holdout: float | None = None,
    calibrate: float = 0.0,
) -> Recommendation:
    """Returns settings for a run whose training ends in a given time.

    Args:
        data: What the data are.
        weights: What the weights need; None without weights.
        machine: The machine that will train.
        minutes: The time for training on an idle machine, without reading. None: 10 on a CPU, 60 on a GPU.
        holdout: The fraction of train that is held out. None: as much as the assigner needs, or nothing.
        calibrate: The fraction of train that `calibrate` alone uses.
    """
    minutes = minutes or _TRAIN_MINUTES[machine.device]
    model = dict(weights.model if weights else _FROM_SCRATCH)
    few = data.clips("train") < _FEW_CLIPS
    holdout = _holdout(data.clips("train"), calibrate) if holdout is None else holdout
    stage1 = max(1, round(data.clips("train") * (1 - holdout - calibrate)))
    # Image weights lack the layers between frames. Frozen blocks would keep random ones.
    can_freeze = weights is not None and (data.kind == "images" or "num_frames" in model)
    recipes = _recipes(data, model, machine, stage1, minutes, few=few, can_freeze=can_freeze)
    number = next((n for n, recipe in enumerate(recipes) if recipe.epochs >= _least(few)), len(recipes) - 1)
    chosen = recipes[number]._replace(epochs=max(1, recipes[number].epochs))
    settings = {
        "run.precision": Setting(machine.precision, f"the faster one on {machine.name}"),
        **_data_settings(data, machine, chosen, holdout),
        **_model_settings(data, weights, model, chosen, minutes),
        **_train_settings(data, weights, machine, chosen, stage1),
        **_later_settings(data, machine, holdout),
    }
    views = settings["evaluate.temporal_views"].value * settings["evaluate.spatial_crops"].value
    pass_s = _macs(model, data, chosen.frames, chosen.points) * views / machine.macs_per_s
    seconds = {
        "train": chosen.epochs * chosen.epoch_s,
        "label": data.clips("train") * holdout * pass_s,
        "calibrate": data.clips("train") * calibrate * pass_s,
        "evaluate": data.clips("val") * pass_s + SPEED_S,
    }
    alternatives = [
        _alternative(recipe, model["patch"], _least(few), chosen=n == number) for n, recipe in enumerate(recipes)
    ]
    return Recommendation(settings, seconds, minutes, alternatives)


def points_of(length: int) -> list[int]:
    """Returns three lengths that cost about 1, 1/2 and 1/4: 14, 10 and 7, if the largest is 14."""
    return sorted({length, max(2, round(0.7 * length)), max(1, round(0.5 * length))}, reverse=True)


def _least(few: bool) -> int:
    """Returns the epochs that a run should have at least."""
    return 5 if few else 4


def _recipes(
    data: Survey,
    model: Mapping[str, Any],
    machine: MachineFacts,
    clips: int,
    minutes: float,
    *,
    few: bool,
    can_freeze: bool,
) -> list[_Recipe]:
    """Returns recipes with the epochs that the time allows, in the order of preference.

    What is cut first can be had back later, or is missed least: epochs down to the least number, every second
    validation, the point in the middle, the training of more blocks. Pixels and frames come last: what the model never
    sees, no longer training brings back. A recipe that takes no less time than a preferred one is left out.
    """
    depth, most = model["depth"], 20 if few else 15
    freezes = [depth // 2 if few else 0, depth * 3 // 4] if can_freeze else [0]
    recipes: list[_Recipe] = []
    for (frames, length), frozen, every_point in product(_inputs(data, model), freezes, (True, False)):
        points = tuple(points_of(length) if every_point else points_of(length)[::2])
        macs = _macs(model, data, frames, points)
        train_macs = macs * clips * (1 + _BACKWARD * (1 - frozen / depth))
        fraction = min(1.0, _VALIDATION * train_macs / (macs * data.clips("val")))
        for validate_every in (1, 2):
            epoch_s = (train_macs + fraction / validate_every * macs * data.clips("val")) / machine.macs_per_s
            epochs = min(int(60 * minutes / epoch_s), most)
            if epochs >= _least(few):
                break
        if not recipes or epoch_s < min(recipe.epoch_s for recipe in recipes):
            recipes.append(_Recipe(frames, points, frozen, epochs, epoch_s, fraction, validate_every))
    return recipes


def _alternative(recipe: _Recipe, patch: int, least: int, *, chosen: bool) -> Alternative:
    return Alternative(
        frames=recipe.frames,
        pixels=recipe.points[0] * patch,
        points=list(recipe.points),
        frozen=recipe.frozen,
        epochs=recipe.epochs,
        minutes=least * recipe.epoch_s / 60,
        least_epochs=least,
        chosen=chosen,
    )


def _inputs(data: Survey, model: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields frames and the largest length, the preferred ones first."""
    largest = max(2, int(data.short_side.middle) // model["patch"])
    lengths = list(dict.fromkeys(min(length, largest) for length in _LENGTHS))
    if data.kind == "images":
        yield from ((1, length) for length in lengths)
        return
    own = model.get("num_frames", 1)  # of a video model: its time embedding is trained for so many
    yield from ((frames, lengths[0]) for frames in ([own] if own > 1 else [8, 4]))
    yield from ((4, length) for length in lengths[1:])
    yield 2, lengths[-1]  # the least that shows motion


def _macs(model: Mapping[str, Any], data: Survey, frames: int, points: Sequence[int]) -> int:
    """Returns the MACs of a view at all points together."""
    sizes = {"size": points[0] * model["patch"], "num_frames": frames, "temporal": data.kind == "videos"}
    named = {"points": tuple(map(str, points)), "num_classes": len(data.classes)}
    return sum(point_macs(ModelConfig(**{**model, **sizes, **named})).values())


def _data_settings(data: Survey, machine: MachineFacts, chosen: _Recipe, holdout: float) -> dict[str, Setting]:
    clips = data.clips("train")
    settings = {
        "data.train.annotations": Setting(str(data.sources.train), f"{clips} {data.kind}, {_per_class(data)}"),
        "data.val.annotations": Setting(str(data.sources.val), f"{data.clips('val')} {data.kind}"),
        "data.root": Setting(
            _text(data.sources.root), "the paths of the lists start here" if data.sources.root else ""
        ),
        "data.classes": Setting(
            _text(data.sources.classes), "" if data.sources.classes else "the names of the folders"
        ),
        "data.holdout": Setting(holdout, _why_holdout(clips, holdout, data.source_count)),
        "data.validate": _validated(data, chosen),
    }
    if machine.device == "cpu":
        workers = max(1, machine.cpus // 2)
        settings["data.workers"] = Setting(workers, f"{machine.name}: the model needs the others")
    return settings


def _holdout(clips: int, calibrate: float) -> float:
    """Returns the smaller fraction of train that suffices to choose the assigner's threshold; 0 if none does."""
    possible = (fraction for fraction in _HOLDOUTS if fraction + calibrate < 1)
    return next((fraction for fraction in possible if _choosing(clips, fraction) >= FEWEST), 0.0)


def _choosing(clips: int, holdout: float) -> int:
    """Returns how many clips choose the assigner's threshold."""
    return choosing_clips(round(clips * holdout), AssignConfig().select)


def _why_holdout(clips: int, holdout: float, sources: int | None) -> str:
    choosing = _choosing(clips, holdout or _HOLDOUTS[-1])
    if not holdout:
        return (
            f"{clips} clips are too few for an assigner: with {_HOLDOUTS[-1]:g}, {choosing} of them would choose its "
            f"threshold, which takes {FEWEST}. So all are for training"
        )
    needed = videos_needed(0.0, AssignConfig().tolerance, CalibrateConfig().delta)
    assert needed is not None, "some number of clips proves that nothing is lost"
    drawn, evidence, wanted = "drawn one by one", choosing, f"{needed} clips, not {choosing}"
    if sources is not None:  # the clips of one source are one piece of evidence
        drawn, evidence = f"in whole sources, of which train has {sources}", choosing * sources // clips
        wanted = f"{needed} sources ({round(needed * clips / sources)} clips), not {evidence}"
    enough = (
        "enough to prove that it loses at most assign.tolerance"
        if evidence >= needed
        else f"an estimate: a proof that it loses at most assign.tolerance needs about {wanted}"
    )
    return f"about {round(clips * holdout)} of {clips}, {drawn}; {choosing} choose the assigner's threshold, {enough}"


def _validated(data: Survey, chosen: _Recipe) -> Setting:
    if chosen.validated > _NEARLY_ALL:
        return Setting("val", "")
    fraction = max(0.01, round(chosen.validated, 2))
    return Setting(
        fraction,
        f"{round(fraction * data.clips('val'))} of them at a time, for at most a sixth of the time of an epoch",
    )


def _per_class(data: Survey) -> str:
    counts = [count for count in data.counts["train"] if count]
    return f"{min(counts)} to {max(counts)} for each of {len(counts)} classes"


def _text(path: object) -> str | None:
    return None if path is None else str(path)


def _model_settings(
    data: Survey, weights: WeightsFacts | None, model: Mapping[str, Any], chosen: _Recipe, minutes: float
) -> dict[str, Setting]:
    size = chosen.points[0] * model["patch"]
    short = int(data.short_side.middle)
    why = "from the weights; so are the next six" if weights else "small, because there are no weights"
    settings = {f"model.{key}": Setting(value, "") for key, value in model.items() if key in _FROM_SCRATCH}
    settings["model.width"] = Setting(model["width"], why)
    default = ModelConfig().model_dump(mode="json")
    rare = {key: value for key, value in model.items() if key not in _CHOSEN and value != default[key]}
    settings |= {
        f"model.{key}": Setting(value, "from the weights") for key, value in rare.items() if key not in _FROM_SCRATCH
    }
    if weights and weights.normalisation:
        mean, std, origin = weights.normalisation
        settings["model.mean"] = Setting(list(mean), f"by {origin}")
        settings["model.std"] = Setting(list(std), "")
    else:
        settings["model.mean"] = Setting([0.485, 0.456, 0.406], "ImageNet's: nothing states another")
        settings["model.std"] = Setting([0.229, 0.224, 0.225], "")
    limit = f"as large as {minutes:g} min of training allow"
    settings["model.size"] = Setting(
        size, f"{chosen.points[0]} patches of {model['patch']}, {limit}; the short side of the data: {short}"
    )
    settings["model.points"] = Setting(list(chosen.points), _why_points(chosen, minutes))
    settings["model.num_classes"] = Setting(len(data.classes), "")
    settings |= crops(data, size)
    if data.kind == "images":
        settings["model.num_frames"] = Setting(1, "images")
        settings["model.temporal"] = Setting(False, "images")
        return settings
    covered = min(data.seconds.low, _LONGEST_CLIP_S)
    fps = max(1, round(data.fps.middle))
    stride = max(1, round(covered * fps / chosen.frames))
    seconds = data.seconds
    settings["model.fps"] = Setting(fps, f"the usual rate of these videos ({data.fps.low:.3g} to {data.fps.high:.3g})")
    settings["model.num_frames"] = Setting(chosen.frames, f"as many as {minutes:g} min of training allow")
    settings["model.stride_frames"] = Setting(
        stride,
        f"a clip covers {chosen.frames * stride / fps:.1f} s; videos last {seconds.low:.1f} / {seconds.middle:.1f} / "
        f"{seconds.high:.1f} s (short, usual, long)",
    )
    settings["model.temporal"] = Setting(True, "")
    if weights is None:
        settings["model.time_init_std"] = Setting(
            _TIME_INIT_STD, "random weights: with 0 the order of frames is hardly learnt"
        )
    return settings


def _why_points(chosen: _Recipe, minutes: float) -> str:
    if len(chosen.points) > 2:  # noqa: PLR2004
        return "costs of about 1, 1/2 and 1/4"
    return f"costs of about 1 and 1/4: a third point would take more than {minutes:g} min, or pixels"


def crops(data: Survey, size: int) -> dict[str, Setting]:
    """Returns the training crops for a model of `size` pixels."""
    if data.kind == "images":
        return {
            "data.crop_area": Setting([0.4, 1.0], "objects of many sizes"),
        }
    largest = max(size, round(1.3 * size))
    return {"data.short_side": Setting([size, largest], f"from model.size to {largest / size:.2g} times that")}


def _train_settings(
    data: Survey, weights: WeightsFacts | None, machine: MachineFacts, chosen: _Recipe, clips: int
) -> dict[str, Setting]:
    batch = _batch(clips, data, machine)
    minutes = chosen.epochs * chosen.epoch_s / 60
    imbalanced = data.imbalance >= _IMBALANCED
    # A curve of fewer than two validations is none.
    every = chosen.validate_every if chosen.epochs >= 2 * chosen.validate_every else 1
    settings = {
        "loss.label_smoothing": Setting(0.0 if len(data.classes) == 2 else 0.1, f"{len(data.classes)} classes"),  # noqa: PLR2004
        "loss.class_weights": Setting(
            "balanced" if imbalanced else "none",
            f"the largest class has {data.imbalance:.1f} x the smallest one's clips",
        ),
        "train.epochs": Setting(chosen.epochs, f"about {minutes:.0f} min on {machine.name}, without reading"),
        "train.batch": Setting(batch, f"{max(1, clips // batch)} steps an epoch"),
        "train.warmup_epochs": Setting(1 if chosen.epochs > 8 else 0.5, ""),  # noqa: PLR2004
        "train.validate_every": Setting(
            every, "" if every == 1 else f"and after the last epoch, {-(-chosen.epochs // every)} in all: saves time"
        ),
    }
    if weights is None:
        settings["train.lr"] = Setting(0.001, "random weights need a higher rate than pretrained ones")
        settings["train.layer_decay"] = Setting(1.0, "random weights: all blocks must learn")
        settings["train.freeze"] = Setting(None, "")
        return settings
    frozen = chosen.frozen > 0
    settings["train.lr"] = Setting(
        _lr(batch, frozen=frozen),
        "for the blocks that are not frozen; they bear more than all blocks together"
        if frozen
        else "low: pretrained weights are easily destroyed",
    )
    settings["train.layer_decay"] = Setting(0.75, "blocks near the input change least")
    why = (
        f"the first {chosen.frozen} of {weights.model['depth']} blocks keep the weights: faster, and safer on few clips"
    )
    settings["train.freeze"] = Setting(chosen.frozen or None, why if chosen.frozen else _why_free(data))
    return settings


def _why_free(data: Survey) -> str:
    if data.kind == "videos":
        return "image weights have no attention over time: all blocks must learn it"
    return "enough clips and time"


def _lr(batch: int, *, frozen: bool) -> float:
    """Returns a rate that grows with the root of the batch, as is usual for Adam.

    The last blocks alone bear more than all blocks: the first ones lose what they have learnt (docs/log.md).
    """
    return float(f"{(2.5e-4 if frozen else 1e-4) * (batch / 8) ** 0.5:.2g}")


def _batch(clips: int, data: Survey, machine: MachineFacts) -> int:
    """Returns a power of two: at least ten steps an epoch, and no more than the device computes well at once.

    With few clips it is 4, or less if there are not even 4 clips.
    """
    most = 64 if machine.device == "cuda" else 16 if data.kind == "images" else 8
    batch = 4
    while batch * 2 <= most and batch * 20 <= clips:
        batch *= 2
    while batch > clips:
        batch //= 2
    return batch


def _later_settings(data: Survey, machine: MachineFacts, holdout: float) -> dict[str, Setting]:
    source = Setting("holdout", "on clips that it was trained on, a model is nearly always right")
    if not holdout:
        source = Setting("teacher", "without a holdout; no stage that runs needs it")
    if data.kind == "images":
        return {
            "evaluate.temporal_views": Setting(1, "images"),
            "evaluate.spatial_crops": Setting(1, "the centre"),
            "label.source": source,
        }
    covered = min(data.seconds.low, _LONGEST_CLIP_S) / data.seconds.middle
    views = 1 if covered > 0.5 else 2 if covered > 0.25 else 3  # noqa: PLR2004
    crops = 3 if data.aspect > 1.2 and machine.device == "cuda" else 1  # noqa: PLR2004
    return {
        "evaluate.temporal_views": Setting(views, f"a clip covers {min(1.0, covered):.0%} of the usual video"),
        "evaluate.spatial_crops": Setting(
            crops, f"frames are {data.aspect:.2g} times as long as high; on a GPU 3 crops are cheap, on a CPU not"
        ),
        "label.source": source,
    }
