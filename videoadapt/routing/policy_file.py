"""The file of a calibrated policy: its text, the promise, and the weights and videos that the promise belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import nn

from videoadapt.config.load import Config
from videoadapt.errors import CheckpointError, UserError, few
from videoadapt.model.checkpoint import weights_digest
from videoadapt.runtime.console import say
from videoadapt.runtime.files import read_json, write_json
from videoadapt.runtime.inputs import Inputs

OF_RUN = Path("calibrate") / "policy.json"  # in the run folder; `calibrate` writes it
SUFFIX = ".json"  # how a file is told from the text of a policy
_REMEDY = "make it with `videoadapt calibrate`"


def is_policy_file(policy: object) -> TypeGuard[str]:
    """Returns whether a policy is given as the path of a file."""
    return isinstance(policy, str) and policy.endswith(SUFFIX)


@dataclass(frozen=True)
class PolicyFile:
    """The contents of the file `OF_RUN`; the names are its keys.

    Attributes:
        policy: The policy as text; see `parse_policy`.
        promise: The promise in words.
        weights: `weights_digest` of the model.
        assigner: `weights_digest` of the assigner that the policy reads; None if it reads none.
        manifest: `Manifest.hash` of the videos that the calibration split was drawn from.
        videos: Videos of the calibration split.
        temporal_views: Clips of a video.
        inputs: What the calibration depends on, by `Inputs.to_json`.
        leap: The numbers of a leap, `Leap.to_json`; None for another policy.
    """

    policy: str
    promise: str
    weights: str
    assigner: str | None
    manifest: str
    videos: int
    temporal_views: int
    inputs: Mapping[str, Any]
    leap: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> PolicyFile:
        """Reads a file that `write` wrote.

        Raises:
            UserError: The file is missing, damaged, or no policy.
        """
        *keys, _ = cls.__dataclass_fields__
        content = read_json(path, _REMEDY, keys)
        texts = [content[key] for key in ("policy", "promise", "weights", "manifest")]
        if not all(isinstance(text, str) for text in texts) or not isinstance(content["inputs"], dict):
            raise UserError(f"{path}: not the file of a policy; {_REMEDY}")
        # A file of an earlier version has no key `leap`.
        return cls(**{key: content[key] for key in keys}, leap=content.get("leap"))

    def write(self, path: Path) -> None:
        """Writes the file; an interrupted call leaves no unfinished one."""
        write_json(path, asdict(self))

    def text_for(self, path: Path, model: nn.Module | None, assigner: nn.Module | None) -> str:
        """Returns the text of the policy, once it is clear that the promise belongs to these weights.

        Args:
            path: The file, for messages.
            model: The model; None: weights are not compared.
            assigner: The assigner of the run; None if there is none.

        Raises:
            CheckpointError: The policy was calibrated with another model, or with another assigner.
        """
        if model is None:
            return self.policy
        pairs = [("model", self.weights, weights_digest(model))]
        if self.assigner is not None:
            pairs.append(("assigner", self.assigner, weights_digest(assigner) if assigner is not None else "none"))
        for name, then, now in pairs:
            if then != now:
                raise CheckpointError(
                    f"{path}: was calibrated with another {name} (weights {then}, now {now}; another run.precision "
                    "changes them too), so its promise does not hold here; run `videoadapt calibrate` for this one"
                )
        return self.policy


def say_other_inputs(path: Path, config: Config, manifest: str | None) -> None:
    """Prints how videos and views differ from those of a policy's calibration: the promise may not hold for these.

    Args:
        path: The file of the policy.
        config: The run's config.
        manifest: `Manifest.hash` of the videos; None if they are in no manifest.
    """
    file = PolicyFile.read(path)
    found = Inputs.of(config, manifest, None, "run", "data", "model", "evaluate").differences(file.inputs)
    views = config.evaluate.temporal_views
    if file.temporal_views != views:
        found.append(f"evaluate.temporal_views: {file.temporal_views} then, {views} now")
    if found:
        say(f"{path}: the promise of this policy may not hold here, other inputs: {few(found, separator='; ')}")
