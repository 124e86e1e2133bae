"""The model card: what a model is, what it costs, how good it was measured to be, and what a user must know."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from videoadapt.config.cost import point_macs
from videoadapt.config.load import RUN_CONFIG, load_config
from videoadapt.config.points import Point
from videoadapt.config.sections import ModelConfig
from videoadapt.errors import UserError
from videoadapt.evaluation.evaluated import evaluation_path, read_evaluation
from videoadapt.model.checkpoint import weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.facts import stated_licence
from videoadapt.routing.assigner import Assigner, assigner_macs
from videoadapt.runtime.console import macs, percent, percent_interval, say
from videoadapt.runtime.files import read_json

_FIGURES = ("top1", "top1_low", "top1_high", "top5", "macs_per_video")  # of a policy

_LICENCE = """Licence: not stated. Fill in the field `license` at the head of this file before you publish it; the
licences of the training videos and of the pretrained weights, if any, apply too."""

_CUT_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A plain TimeSformer: point {{ point }} of a model that was trained with videoadapt at the points {{ points }}.

{{ licence }}

## Use

```python
from transformers import TimesformerForVideoClassification
model = TimesformerForVideoClassification.from_pretrained("THIS FOLDER OR REPOSITORY")
```

## Input

Clips of {{ model.num_frames }} RGB frames of {{ side }} x {{ side }} pixels, {{ sampling }}. Pixels in [0, 1] are
normalised with mean {{ model.mean | list }} and standard deviation {{ model.std | list }}. {{ cost }} MACs per view.

## Accuracy
{% if row %}
Measured by `videoadapt evaluate` on {{ facts.scored }} videos of split `{{ facts.split }}`, {{ facts.views }} per
video: top-1 {{ row[1] }} %, with its 95 % interval.{{ guessing }} Population: manifest `{{ facts.manifest }}`.

{{ doubts }}
{% else %}
Not measured.
{% endif %}
{{ initial }} Weights of the whole model: `{{ weights }}`.
"""

_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A TimeSformer of {{ points | length }} operating points, trained with videoadapt. Each clip is answered at the point
that the policy `{{ policy }}` chooses{{ ", with the assigner in this folder" if assigner }}.

{{ licence }}

## Use

```python
import videoadapt as va
model = va.AdaptiveModel.from_pretrained("THIS FOLDER OR REPOSITORY")
model.predict("video.mp4")
```

## Points

| point | MACs per view |
| --- | --- |
{% for point, cost in points.items() -%}
| {{ point }} | {{ cost }} |
{% endfor -%}
{% if assigner %}| assigner, per clip | {{ assigner }} |
{% endif %}
{{ parameters }} parameters. MACs are multiply-adds; many papers call them FLOPs.

## Input

Clips of {{ model.num_frames }} RGB frames of {{ model.size }} x {{ model.size }} pixels, {{ sampling }}. Pixels in
[0, 1] are normalised with mean {{ model.mean | list }} and standard deviation {{ model.std | list }}.

## Accuracy
{% if rows %}
Measured by `videoadapt evaluate` on {{ facts.scored }} videos of split `{{ facts.split }}`, {{ facts.views }} per
video. Population: manifest `{{ facts.manifest }}`. In brackets: 95 % intervals.

| policy | top-1, % | top-5, % | MACs per video |
| --- | --- | --- | --- |
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor -%}
{{ guessing }}
{% else %}
Not measured: the model was not evaluated before it was saved.
{% endif %}
{{ doubts }}

## Training
{% if facts.trained_on %}
Trained on {{ facts.trained_on }} videos of manifest `{{ facts.train_manifest }}` for {{ facts.epochs }} epochs.
{% else %}
Not recorded.
{% endif %}
{{ initial }} Weights: `{{ weights }}`. Classes: {{ model.num_classes }}{{ classes }}.
"""


@dataclass(frozen=True)
class Facts:
    """What is known of a model's training and evaluation. Everything is empty without them.

    Attributes:
        trained_on: Videos of the training.
        epochs: Epochs of the training.
        train_manifest: `Manifest.hash` of the training.
        initial: The weights that the training began with; empty: random ones, or not recorded.
        initial_licence: Their licence; see `stated_licence`.
        manifest: `Manifest.hash` of the evaluation.
        split: Split of the evaluation.
        scored: Videos that count in it.
        largest_class: The most frequent class of this split.
        guessing: The top-1 of always answering with it.
        seen: How many of them, or others of their sources, were in the training.
        views: Views of a video in words.
        policies: `_FIGURES` of each policy, by name.
        precision: `run.precision`: the weights of the evaluation had it.
    """

    trained_on: int = 0
    epochs: int = 0
    train_manifest: str = ""
    initial: str = ""
    initial_licence: str = ""
    manifest: str = ""
    split: str = ""
    scored: int = 0
    largest_class: str = ""
    guessing: float | None = None
    seen: int = 0
    views: str = ""
    policies: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    precision: str = "fp32"

    @classmethod
    def of_run(cls, run: Path, model: TimeSformer, precision: str) -> Facts:
        """Reads the facts of a run. Prints a message if its evaluation is of other weights, and leaves it out.

        Args:
            run: The run folder.
            model: The model with weights in `precision`, as an evaluation has it.
            precision: `run.precision`.
        """
        return cls(**_training(run), **_evaluation(run, weights_digest(model)), precision=precision)

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Facts:
        """Returns the facts of `to_json`.

        Raises:
            TypeError: The content has other keys.
        """
        return cls(**content)


def _training(run: Path) -> dict[str, Any]:
    if not (run / "train.json").exists():
        return {}
    found = read_json(run / "train.json", "run `videoadapt train` again", ["clips", "epochs", "manifest"])
    initial = load_config(run).train.init if (run / RUN_CONFIG).exists() else None
    return {
        "trained_on": found["clips"],
        "epochs": found["epochs"],
        "train_manifest": found["manifest"],
        "initial": os.path.basename(initial) if initial and os.path.isabs(initial) else initial or "",
        "initial_licence": stated_licence(initial) if initial else "",
    }


def _evaluation(run: Path, weights: str) -> dict[str, Any]:
    if not evaluation_path(run).exists():
        return {}
    found = read_evaluation(run, ["manifest", "split", "scored", "views", "model"])
    if found["model"] != weights:
        say("export: the evaluation of this run is of other weights, so the model card leaves its figures out")
        return {}
    policies = {
        name: {key: row.get(key) for key in _FIGURES}
        for name, row in found["policies"].items()
        if name != "oracle"  # it reads the truth
    }
    named = {key: found[key] for key in ("manifest", "split", "scored", "views")}
    if found.get("failed_count_as") == "wrong":  # then the videos that could not be read are in the accuracies, too
        named["scored"] = found.get("listed", found["scored"])
    named |= {"largest_class": found.get("largest_class", ""), "guessing": found.get("largest_class_fraction")}
    return named | {"seen": int(found.get("trained_on") or 0), "policies": policies}


def weights_of_card(text: str) -> str | None:
    """Returns the digest of the weights that a model card names; None if it names none, as a card of other origin."""
    found = re.search(r"\bWeights: `(\w+)`", text)
    return found and found[1]


def stated_in(text: str) -> dict[str, Any]:
    """Returns the licence that a user has written into the metadata of a model card, by the hub's keys."""
    try:
        metadata = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}  # no metadata that the hub could read
    return {key: metadata[key] for key in ("license", "license_name", "license_link") if key in metadata}


def model_card(
    model: TimeSformer,
    assigner: Assigner | None,
    policy: str,
    facts: Facts,
    licence: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Returns the card of a model, as Markdown with the metadata that the Hugging Face hub reads.

    Args:
        model: The model.
        assigner: Its assigner.
        policy: The name of its policy.
        facts: The figures of its evaluation.
        licence: From `stated_in`. None: the licence is left to the user.
    """
    config, names = model.config, model.class_names
    return ModelCard.from_template(
        _metadata("videoadapt", config, licence),
        template_str=_TEMPLATE,
        licence=f"Licence: {', '.join(map(str, licence.values()))}." if licence else _LICENCE,
        title=f"TimeSformer of {len(config.points)} points, {config.width} x {config.depth}",
        policy=policy,
        points={point: macs(cost) for point, cost in point_macs(config).items()},
        assigner=macs(assigner_macs(assigner.config, len(config.points))) if assigner is not None else "",
        parameters=macs(sum(parameter.numel() for parameter in model.parameters())),
        model=config,
        sampling=_sampling(config),
        rows=[_row(name, figures) for name, figures in facts.policies.items()],
        guessing=_guessing(facts),
        doubts=_doubts(facts),
        initial=_initial(facts),
        facts=facts,
        weights=weights_digest(model),
        classes=f", such as {', '.join(names[:3])}" if names else "",
    )


def cut_card(model: TimeSformer, point: str, facts: Facts) -> ModelCard:
    """Returns the card of a point that was cut out for Hugging Face's transformers; see `model_card`."""
    config, figures = model.config, facts.policies.get(f"fixed:{point}")
    return ModelCard.from_template(
        _metadata("transformers", config),
        template_str=_CUT_TEMPLATE,
        licence=_LICENCE,
        title=f"TimeSformer, {config.width} x {config.depth}, {point} tokens per side",
        point=point,
        points=", ".join(config.points),
        model=config,
        side=Point.parse(point).length * config.patch,
        sampling=_sampling(config),
        cost=macs(point_macs(config)[point]),
        row=_row(point, figures) if figures else None,
        guessing=_guessing(facts),
        doubts=_doubts(facts),
        initial=_initial(facts),
        facts=facts,
        weights=weights_digest(model),
    )


def _metadata(library: str, config: ModelConfig, licence: Mapping[str, Any] | None = None) -> ModelCardData:
    kind = "video-classification" if config.num_frames > 1 else "image-classification"
    tags = ["timesformer", "adaptive-inference"]
    return ModelCardData(library_name=library, pipeline_tag=kind, tags=tags, **(licence or {}))


def _sampling(config: ModelConfig) -> str:
    if config.num_frames == 1:
        return "one of each image"
    rate = f"{config.fps:g} frames a second" if config.fps else "the video's own rate"
    return f"{config.stride_frames} frames apart at {rate}"


def _guessing(facts: Facts) -> str:
    if facts.guessing is None:
        return ""
    return f"\nAlways answering with the most frequent class, {facts.largest_class}: {percent(facts.guessing)} %."


def _doubts(facts: Facts) -> str:
    """Returns what the accuracies cannot say of the weights of the folder; empty if they are theirs."""
    doubts = []
    if facts.seen:
        doubts.append(
            f"{facts.seen} of these videos, or others of their sources, were in the training, so that the figures may "
            "be too high."
        )
    if facts.policies and facts.precision != "fp32":
        doubts.append(f"The figures are of the weights in {facts.precision}; the weights of this folder are float32.")
    return "\n".join(doubts)


def _initial(facts: Facts) -> str:
    if not facts.initial:
        return "Initial weights: random." if facts.trained_on else "Initial weights: not recorded."
    return f"Initial weights: `{facts.initial}`. Their licence: {facts.initial_licence or 'not known'}."


def _row(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        top1 = percent_interval(figures["top1"], figures["top1_low"], figures["top1_high"])
        top5 = percent(figures["top5"]) if figures["top5"] is not None else "-"
        return f"`{name}`", top1, top5, macs(figures["macs_per_video"])
    except (KeyError, TypeError) as error:
        raise UserError(f"model card: the evaluation has no valid figures of {name} ({error})") from None
