r"""Evaluates released weights: a TimeSformer with its paper's protocol, an image model with its config's.

    python tools/evaluate_released.py TimeSformer_divST_8x32_224_K400.pyth configs/timesformer_b_k400.yaml \
        data.root=/data/k400 data.val.annotations=/data/k400/kinetics-400_val.csv

WEIGHTS is a `.pyth` of facebookresearch or a Hugging Face folder. The config gives the architecture: also
timesformer_hr_k400.yaml and timesformer_l_k400.yaml. The protocol of TimeSformer's code is: one clip that starts at
frame 0 (the paper says the centre: evaluate.single_clip=centre), resized without antialiasing, three crops, the mean
of their logits, float32. The released models were trained only at their costliest length, which is the only point
unless `model.points` is set. Image models (`model.num_frames` is 1) have the points, crops and views of the config, in
float32: configs/supervit_*_in1k.yaml go with the `.pth` of SuperViT.

A file may hold the last weights of a training and their moving average. `train.weights` chooses: `ema` (default, if the
file has one) or `last`. The first line of the output names the choice. The published figures of SuperViT-DeiT-S are of
the last weights (configs/supervit_deit_s_in1k.yaml sets this), those of SuperViT-LV-ViT-S of the moving average. The
files of TimeSformer have one set of weights.

The config also gives the normalisation. For video it is mean 0.45 and deviation 0.225, with which the released weights
were trained. The `preprocessor_config.json` of a Hugging Face folder can have other values; a note then shows both.
For other weights, set `model.mean` and `model.std`.

Like `videoadapt evaluate`, it resumes where it was stopped; torchrun distributes it over several processes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from one_line_failures import one_line_failures
from videoadapt.commands.tables import print_evaluate
from videoadapt.config.load import Config, load_config
from videoadapt.config.points import Point
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import CheckpointError, UserError
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.model.checkpoint import load_checkpoint, save_checkpoint, weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.load import LOADED, NEW, load_weights
from videoadapt.runtime.console import say
from videoadapt.runtime.ranks import broadcast_result, rank, ranks

VIDEO_PROTOCOL = [  # of TimeSformer's code
    "evaluate.temporal_views=1",
    "evaluate.single_clip=start",
    "evaluate.spatial_crops=3",
    "evaluate.crop_pct=1.0",
    "evaluate.crop_offset=ceil",
    "evaluate.average=logits",
    "data.interpolation=bilinear",
    "data.antialias=false",
]


def main() -> None:
    """Converts the weights, evaluates them and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a .pyth or .pth file, or a Hugging Face folder")
    parser.add_argument("config", type=Path, help="the architecture, for example configs/timesformer_b_k400.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    with one_line_failures():
        config = released_config(given.weights, given.config, given.overrides)
        with ranks(config):
            broadcast_result(lambda: convert(given.weights, config))  # the other ranks wait for the checkpoint
            summary = evaluate(config)
            if rank() == 0:
                print_evaluate(summary.to_json())


def released_config(weights: Path, path: Path, overrides: list[str]) -> Config:
    """Loads the config of an evaluation. Its precision is float32, whatever the config trains with.

    Args:
        weights: Name the default run folder.
        path: The config of the architecture. A video model gets TimeSformer's protocol and its costliest point alone.
        overrides: Texts `section.key=value`; they replace all of these defaults.
    """
    model = load_config(path, overrides).model  # whether it is a video model decides about the defaults
    defaults = [f"run.dir=runs/released/{weights.stem}", "run.precision=fp32"]
    if model.num_frames > 1:
        defaults += [f"model.points=['{max(map(Point.parse, model.points))}']", *VIDEO_PROTOCOL]
    config = load_config(path, [*defaults, *overrides])  # the last one of a key counts
    return config.model_copy(
        update={"run": config.run.model_copy(update={"checkpoint": config.run.dir / "released.safetensors"})}
    )


def _note_normalisation(path: Path, config: Config) -> None:
    """Prints a note if a Hugging Face folder has another normalisation than the config."""
    values, model = _read_json(path), config.model
    for key, ours, theirs in (("mean", model.mean, "image_mean"), ("std", model.std, "image_std")):
        if theirs in values and list(ours) != values[theirs]:
            say(f"note: {path} has {theirs} {values[theirs]}; the evaluation uses model.{key} {list(ours)}")


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the values of a JSON file; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    return values


def convert(weights: Path, config: Config) -> None:
    """Writes the weights as a checkpoint of the run, unless the same weights are there already.

    Raises:
        CheckpointError: The weights do not fill the model.
        UserError: A class has another number in the weights, or the run folder has other weights.
    """
    classes = load_or_index(config).classes
    _require_classes(weights / "config.json", classes)
    _note_normalisation(weights / "preprocessor_config.json", config)
    model = TimeSformer(config.model)
    report = load_weights(model, weights, which=config.train.weights, resample=config.train.resample)
    say(str(report))
    new = [row.name for row in report.rows if row.status == NEW]
    if new:
        raise CheckpointError(
            f"{weights}: does not fill {new[0]} and {len(new) - 1} more tensors of the model; take a config with the "
            "architecture and the number of classes of the weights"
        )
    changed = [row for row in report.rows if row.name and row.status != LOADED]
    if changed:
        say(
            f"note: {len(changed)} tensors are {changed[0].status} (first: {changed[0].name}); the evaluated model "
            "differs from the released one"
        )
    path = config.run.checkpoint
    assert path is not None, "released_config sets it"
    if path.exists():
        digest = load_checkpoint(path, "train").meta["digest"]
        if digest != weights_digest(model):
            raise UserError(f"{path}: holds other weights, which are not overwritten; set run.dir to another folder")
        return
    # The entries that `evaluate` reads from a checkpoint of training.
    meta = config.model_dump(mode="json") | {"classes": list(classes), "digest": weights_digest(model), "step": 0}
    save_checkpoint(path, "train", {f"model/{name}": t for name, t in model.state_dict().items()}, meta)


def _require_classes(path: Path, classes: tuple[str, ...]) -> None:
    """Raises `UserError` if a class of a Hugging Face folder has another number than in the manifest.

    Without names on both sides there is nothing to compare.
    """
    theirs = {int(number): name for number, name in _read_json(path).get("id2label", {}).items()}
    # Kinetics lists without a file of names have numbers; converted models without names have LABEL_0, LABEL_1, ...
    if all(name.isdigit() for name in classes) or all(name.startswith("LABEL_") for name in theirs.values()):
        return
    for number, name in sorted(theirs.items()):
        ours = classes[number] if number < len(classes) else "nothing"
        if number >= len(classes) or _comparable(ours) != _comparable(name):
            raise UserError(
                f"{path}: its class {number} is {name!r}, but class {number} of this run is {ours!r}; set data.classes "
                "to a list in the order of the weights"
            )


def _comparable(name: str) -> str:
    """Returns a class name without the differences between copies of Kinetics."""
    return name.replace("_", " ").strip('"').casefold()


if __name__ == "__main__":
    main()
