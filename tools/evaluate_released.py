r"""Evaluate released weights: a TimeSformer under its paper's protocol, a model of images under its config's.

    python tools/evaluate_released.py TimeSformer_divST_8x32_224_K400.pyth configs/timesformer_b_k400.yaml \
        data.root=/data/k400 data.val.annotations=/data/k400/kinetics-400_val.csv

WEIGHTS is a `.pyth` of facebookresearch or a Hugging Face folder; the config names the architecture
(timesformer_hr_k400.yaml and timesformer_l_k400.yaml for the other two). TimeSformer's protocol is one clip in the
centre of a video, and three crops; its released models know their costliest length alone, so that it is the only point,
unless `model.points` says otherwise. Models of images (`model.num_frames` is 1) have the points, crops and views of the
config: SuperViT's `.pth` go with configs/supervit_*_in1k.yaml.

The input is normalised as the config says: for video with mean 0.45 and deviation 0.225, as the released weights were
trained. The processors of converted folders (`preprocessor_config.json`) state other values; where they do, that is
said. For weights of your own, set `model.mean` and `model.std`.

Stops, and goes on, as `videoadapt evaluate` does; torchrun spreads it over several processes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from videoadapt.commands.tables import print_evaluate
from videoadapt.config.load import Config, load_config
from videoadapt.config.points import Point
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import CheckpointError, RunError, UserError
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.model.checkpoint import load_checkpoint, save_checkpoint, weights_digest
from videoadapt.model.timesformer import build_model
from videoadapt.model.weights.load import LOADED, NEW, load_weights
from videoadapt.model.weights.sources import read_weights
from videoadapt.runtime.console import say
from videoadapt.runtime.ranks import rank, rank0_then_all, ranks

VIDEO_PROTOCOL = ["evaluate.temporal_views=1", "evaluate.spatial_crops=3"]


def main() -> None:
    """Converts, evaluates, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a .pyth or .pth file, or a Hugging Face folder")
    parser.add_argument("config", type=Path, help="the architecture, such as configs/timesformer_b_k400.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    try:
        config = released_config(given.weights, given.config, given.overrides)
        with ranks(config):
            rank0_then_all(lambda: convert(given.weights, config))
            summary = evaluate(config)
            if rank() == 0:
                print_evaluate(summary)
    except (UserError, RunError) as error:
        sys.exit(f"error: {error}")


def released_config(weights: Path, path: Path, overrides: list[str]) -> Config:
    """The config with a run folder for these weights and, of video, with TimeSformer's protocol."""
    model = load_config(path, overrides).model
    own = [f"run.dir=runs/released/{weights.stem}"]
    if model.num_frames > 1:
        own += [f"model.points=['{max(map(Point.parse, model.points))}']", *VIDEO_PROTOCOL]
    config = load_config(path, [*own, *overrides])
    return config.model_copy(
        update={"run": config.run.model_copy(update={"checkpoint": config.run.dir / "released.safetensors"})}
    )


def _note_normalisation(path: Path, config: Config) -> None:
    """Says so where a Hugging Face folder states another normalisation than the one that is used."""
    stated, model = _read_json(path), config.model
    for key, used, theirs in (("mean", model.mean, "image_mean"), ("std", model.std, "image_std")):
        if theirs in stated and list(used) != stated[theirs]:
            say(f"note: {path} states {theirs} {stated[theirs]}; used is model.{key} {list(used)}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    return values


def convert(weights: Path, config: Config) -> None:
    """Writes the weights as a checkpoint of ours, if they fill the whole model and name the classes as we do."""
    classes = load_or_index(config).classes
    _require_classes(weights / "config.json", classes)
    _note_normalisation(weights / "preprocessor_config.json", config)
    model = build_model(config)
    report = load_weights(model, read_weights(weights).tensors)
    say(str(report))
    new = [row.name for row in report.rows if row.fate == NEW]
    if new:
        raise CheckpointError(
            f"{weights}: does not fill {new[0]} (and {len(new) - 1} more), which is then not the released model; "
            "the config must be of its architecture and class count"
        )
    changed = [row for row in report.rows if row.name and row.fate != LOADED]
    if changed:
        say(f"note: {len(changed)} tensors are {changed[0].fate} ({changed[0].name}): not the released model unchanged")
    path = config.run.checkpoint
    assert path is not None, "released_config names it"
    if path.exists():
        there = load_checkpoint(path, "train").meta["digest"]
        if there != weights_digest(model):
            raise UserError(f"{path}: holds other weights, which are not overwritten; set run.dir to another folder")
        return
    meta = config.model_dump(mode="json") | {"classes": list(classes), "digest": weights_digest(model), "step": 0}
    save_checkpoint(path, "train", {f"model/{name}": t for name, t in model.state_dict().items()}, meta)


def _require_classes(path: Path, classes: tuple[str, ...]) -> None:
    """Refuses a Hugging Face folder whose classes have other numbers than ours; numbers alone cannot be compared."""
    theirs = {int(number): name for number, name in _read_json(path).get("id2label", {}).items()}
    if all(name.isdigit() for name in classes) or all(name.startswith("LABEL_") for name in theirs.values()):
        return
    plain = [name.replace("_", " ").strip('"').casefold() for name in classes]
    for number, name in sorted(theirs.items()):
        if number >= len(plain) or plain[number] != name.replace("_", " ").strip('"').casefold():
            ours = classes[number] if number < len(classes) else "nothing"
            raise UserError(f"{path}: its class {number} is {name!r}, ours is {ours!r}; set data.classes to its order")


if __name__ == "__main__":
    main()
