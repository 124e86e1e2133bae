"""What the output of a stage depends on. It is recorded with the output, and every later stage compares it.

Every stage has the same record: the manifest (population, labels and splits), the weights, and the settings that
decide what the model sees. A stage that reads the output makes the record again from its own config, and lists the
differences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from videoadapt.config.load import Config
from videoadapt.config.sections import Section
from videoadapt.errors import shown

NO_EFFECT_ONCE_TRAINED = ("drop_path", "drop_path_unit", "init_std", "time_init_std")  # keys of `model`
# Keys that do not change what a trained model sees of a video, by section: places, speed, the training recipe, and
# rules that are applied to stored answers. All other keys of these sections count, new ones too.
_FREE: dict[str, tuple[str, ...]] = {
    "run": ("dir", "seed", "device", "checkpoint", "deterministic"),
    "model": NO_EFFECT_ONCE_TRAINED,
    "data": (
        *("root", "train", "val", "classes", "kind", "holdout", "calibrate", "workers", "timeout_s", "max_pixels"),
        *("max_frames", "short_side", "crop_area", "flip", "rand_augment", "color_jitter", "erase", "mixup", "cutmix"),
        *("mix_token", "token_labels", "validate"),
    ),
    "evaluate": (
        "temporal_views",
        "batch",
        "failed",
        "speed_seconds",
        "speed_clips",
        "speed_repeats",
        "cascade",
        "leap",
    ),
    "label": ("none_right",),
}


@dataclass(frozen=True)
class Inputs:
    """The record of one stage.

    Attributes:
        manifest: `Manifest.hash`. None if the stage reads none, as `predict`.
        weights: `weights_digest` of the model; None if there is none.
        settings: Values by section and key, as JSON values.
    """

    manifest: str | None
    weights: str | None
    settings: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, config: Config, manifest: str | None, weights: str | None, *sections: str) -> Inputs:
        """Returns the record of a stage.

        Args:
            config: The run's config.
            manifest: See the class.
            weights: See the class.
            sections: Names of the sections whose settings count, such as `data`.
        """
        dumped = config.model_dump(mode="json")
        settings = {s: {k: v for k, v in dumped[s].items() if k not in _FREE.get(s, ())} for s in sections}
        return cls(manifest, weights, settings)

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON values."""
        return {"manifest": self.manifest, "weights": self.weights, "settings": self.settings}

    def digest(self, *further: Any, without: Collection[str] = ()) -> str:
        """Returns 12 hex digits of the record, for the name of a file that holds what was made from it.

        Keys at their defaults do not count: a new key, whose default keeps the behaviour from before it, changes no
        name.

        Args:
            further: JSON values that the file depends on beside the record.
            without: Keys that the file does not depend on, such as `evaluate.average`.
        """
        changed = []
        for section, values in sorted(self.settings.items()):
            defaults = getattr(Config(), section).model_dump(mode="json")
            changed += [
                (f"{section}.{key}", value)
                for key, value in sorted(values.items())
                if value != defaults[key] and f"{section}.{key}" not in without
            ]
        content = json.dumps([self.manifest, self.weights, changed, *further])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """Compares the inputs with those that another stage has recorded, as far as both have them.

        Args:
            recorded: The result of `to_json`, perhaps of an older version and therefore with fewer keys.

        Returns:
            A sentence for each difference, such as "data.reader: 'pyav' then, 'decord' now".
        """
        found = []
        digests = {"the manifest": self.manifest, "the weights (or run.precision)": self.weights}
        for (words, mine), name in zip(digests.items(), ("manifest", "weights"), strict=True):
            theirs = recorded.get(name)
            if mine is not None and theirs is not None and theirs != mine:
                found.append(f"{words}: {shown(theirs)} then, {shown(mine)} now")
        sections = recorded.get("settings")
        for section, values in self.settings.items():
            if isinstance(sections, Mapping) and isinstance(sections.get(section), Mapping):
                differing = different_settings(getattr(Config(), section), values, sections[section])
                found += [f"{section}.{k}: {shown(old)} then, {shown(new)} now" for k, old, new in differing]
        return found


def different_settings(
    defaults: Section, ours: Mapping[str, Any], theirs: Mapping[str, Any], free: Collection[str] = ()
) -> list[tuple[str, Any, Any]]:
    """Compares the settings of one section. All comparisons of settings are made here.

    A key that is missing in a record is newer than the record. It is compared by its default value, because defaults
    keep the behaviour from before the key existed.

    Args:
        defaults: The section with its default values.
        ours: The present settings, as JSON values.
        theirs: The recorded settings.
        free: Keys that may differ.

    Returns:
        For each key that differs: its name, the recorded value, the present value.
    """
    theirs = defaults.model_dump(mode="json") | dict(theirs)
    keys = [key for key in ours if key not in free and not _equal(key, theirs.get(key), ours[key])]
    return [(key, theirs.get(key), ours[key]) for key in keys]


def _equal(key: str, theirs: Any, ours: Any) -> bool:
    if key == "points" and isinstance(theirs, (list, tuple)):  # sorted by cost, which depends on other fields
        return sorted(map(str, theirs)) == sorted(ours)
    if key == "token_labels":  # the folder may move, as `data.root` may
        return (theirs is None) == (ours is None)
    return bool(theirs == ours)
