"""A model with its assigner and policy as one object, which saves itself to a folder and loads from one or the hub."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.repocard import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from videoadapt.config.load import Config
from videoadapt.config.sections import AssignConfig, DataConfig, EvaluateConfig, ModelConfig
from videoadapt.errors import CheckpointError, UserError
from videoadapt.evaluation.predict import Predictions, Videos, predict
from videoadapt.exporting.card import Facts, model_card, stated_in, weights_of_card
from videoadapt.model.checkpoint import load_tensors, restore_model, weights_digest
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.label_inputs import label_inputs
from videoadapt.routing.policy import Assigned, Leap, Policy, parse_policy
from videoadapt.routing.policy_file import OF_RUN, is_policy_file, say_other_inputs
from videoadapt.routing.scores import trained_checkpoint
from videoadapt.runtime.console import say
from videoadapt.runtime.files import read_json, replacing, write_json
from videoadapt.runtime.machine import precision_dtype

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
_FILES = (CONFIG_FILE, WEIGHTS_FILE)  # of a model
_KEY, _FORMAT = "videoadapt", 1  # key in config.json, and the version of what is below it
_REMEDY = "save the model again"
# The keys of two sections that decide which pixels the model sees. The others name places of one machine.
_EVALUATE = ("temporal_views", "single_clip", "spatial_crops", "crop_offset", "average", "crop_pct")
_DATA = ("reader", "sampling", "interpolation", "antialias", "max_pixels", "max_frames")


class AdaptiveModel(nn.Module, PyTorchModelHubMixin):
    """A model, its assigner and its policy: all that predicts a video.

    `save_pretrained(folder)` writes `config.json`, `model.safetensors` and a model card; `from_pretrained` loads them
    from a folder, or from a repository of the Hugging Face hub; `push_to_hub(name)` uploads them.

    Args:
        model: The model.
        assigned: The assigner, with its points and its threshold; None if there is none.
        policy: The policy as text or the file of a calibrated one, see `parse_policy`; or a leap, whose text lacks its
            numbers. None: `assigned` with an assigner, otherwise the costliest point.
        evaluate: How views are cut.
        data: How videos are read and resized.
        facts: What the model card says of training and evaluation; see `card.Facts`.

    Raises:
        UserError: The policy does not fit the model.
        CheckpointError: The file of a policy, or the assigner, is of another model.

    Example:
        >>> adaptive = AdaptiveModel.from_run(load_config("runs/mine"))
        >>> adaptive.save_pretrained("mine")
        >>> AdaptiveModel.from_pretrained("mine").predict("clip.mp4")
    """

    def __init__(
        self,
        model: TimeSformer,
        assigned: Assigned | None = None,
        policy: str | Leap | None = None,
        *,
        evaluate: EvaluateConfig | None = None,
        data: DataConfig | None = None,
        facts: Facts | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.assigned = assigned
        self.assigner = assigned.assigner if assigned is not None else None  # a module of this one
        if assigned is not None:
            assigned.check(model)
        default = "assigned" if assigned is not None else f"fixed:{model.config.points[0]}"
        self.policy = policy if isinstance(policy, Leap) else self._parsed(policy or default)
        if isinstance(policy, Leap):
            policy.check(model)  # of a text, parsing compares the points
        self.evaluate, self.data = evaluate or EvaluateConfig(), data or DataConfig()
        self.facts = facts or Facts()

    @classmethod
    def from_run(cls, config: Config, policy: str | None = None) -> AdaptiveModel:
        """Loads the model of a run, on the CPU in float32, with its assigner, its policy and its evaluation.

        Args:
            config: The run's config.
            policy: The policy as text, or a file of `calibrate`. None: `calibrate/policy.json` of the run if it exists,
                then as in the class.

        Raises:
            UserError: The policy does not fit the model, or needs the truth.
            CheckpointError: There is no model, or the assigner or the calibrated policy is of other weights.
        """
        run = config.run.dir
        model = restore_model(trained_checkpoint(config), config.model)
        # What belongs to the run was made with weights in the run's precision.
        dtype = precision_dtype(config.run.precision)
        measured = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
        assigned = Assigned.for_model(run, measured)
        if policy is None and (run / OF_RUN).exists():
            policy = str(run / OF_RUN)
        chosen = parse_policy(policy, assigned, model.config, run, measured) if policy else None
        if assigned is not None:
            assigned.say_other_inputs(label_inputs(config, None, None))
        if is_policy_file(policy):
            say_other_inputs(Path(policy), config, None)
            if measured is not model:
                say(
                    f"{policy}: was calibrated with weights in {config.run.precision}. The weights of this model are "
                    "float32, for which the promise was not tested"
                )
        return cls(
            model,
            # Its weights are compared; another comparison would print its warnings twice.
            None if assigned is None else replace(assigned, weights=None, assigner=assigned.assigner.float()),
            chosen if chosen is None or isinstance(chosen, Leap) else chosen.written(),
            evaluate=_kept(config.evaluate, _EVALUATE),
            data=_kept(config.data, _DATA),
            facts=Facts.of_run(run, measured, config.run.precision),
        )

    def forward(self, clips: Tensor, point: str) -> Tensor:
        """Returns the logits of normalised clips at a point; see `TimeSformer.forward`."""
        logits: Tensor = self.model(clips, point)
        return logits

    def predict(self, videos: Videos, policy: str | None = None, **settings: Any) -> Predictions:
        """Predicts videos with the policy of the model, and with its views.

        Args:
            videos: As in `va.predict`.
            policy: Another policy as text, or the file of one that was calibrated with these weights.
            settings: Further arguments of `va.predict`, such as `fps` and `top`.

        Raises:
            UserError: The policy does not fit the model, or as in `va.predict`.
            CheckpointError: The file of the policy is of other weights.
        """
        chosen = self._parsed(policy) if policy else self.policy
        return predict(self.model, videos, chosen, evaluate=self.evaluate, data=self.data, **settings)

    def _parsed(self, policy: str) -> Policy:
        return parse_policy(policy, self.assigned, self.model.config, weights=self.model)

    def generate_model_card(self, *_: Any, licence: Mapping[str, Any] | None = None, **__: Any) -> ModelCard:
        """Returns the model card: points, costs, accuracies with intervals, normalisation, and data."""
        return model_card(self.model, self.assigner, self.policy.name, self.facts, licence)

    def settings(self) -> dict[str, Any]:
        """Returns the contents of `config.json`."""
        assigned = self.assigned
        return {
            _KEY: {
                "format": _FORMAT,
                "weights": weights_digest(self),
                "model": self.model.config.model_dump(mode="json"),
                "classes": list(self.model.class_names),
                "policy": self.policy.written(),
                "leap": self.policy.to_json() if isinstance(self.policy, Leap) else None,
                "assigner": None
                if assigned is None
                else {
                    "settings": assigned.assigner.config.model_dump(mode="json"),
                    "threshold": assigned.threshold,
                    "inputs": assigned.inputs,
                },
                "evaluate": self.evaluate.model_dump(mode="json", include=set(_EVALUATE)),
                "data": self.data.model_dump(mode="json", include=set(_DATA)),
                "facts": self.facts.to_json(),
            }
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        # The mixin removes an old config.json before, and this writes the new one last, with the digest of the weights:
        # a folder of an interrupted call is refused when it is loaded.
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with replacing(save_directory / WEIGHTS_FILE) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        self._renew_card(save_directory / CARD_FILE)
        write_json(save_directory / CONFIG_FILE, self.settings())

    def _renew_card(self, path: Path) -> None:
        """Replaces the model card of other weights, whose figures are not of these; the mixin keeps every card."""
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if weights_of_card(text) in (None, weights_digest(self.model)):
            return
        licence, old = stated_in(text), path.with_suffix(".old.md")
        old.write_text(text, encoding="utf-8")
        with replacing(path) as temporary:
            self.generate_model_card(licence=licence).save(temporary)
        kept = "its licence is kept" if licence else "no licence was found in it"
        say(f"{path}: was the card of other weights, now {old.name}, and is written anew; {kept}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **settings: Any) -> AdaptiveModel:
        """Loads a model from a folder of `save_pretrained`, or from a repository of the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: The folder, or the name of the repository, such as `user/model`.
            settings: As in huggingface_hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Returns:
            The model on the CPU, in eval mode.

        Raises:
            UserError: There is no such folder, and the hub does not have it.
            CheckpointError: A file is missing or damaged, or the files are not of one save.
        """
        # Not by the mixin, which reads config.json itself, and fails with a traceback if that is torn.
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            return _load(folder)
        try:
            files = [hf_hub_download(str(pretrained_model_name_or_path), name, **settings) for name in _FILES]
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise UserError(
                f"{pretrained_model_name_or_path}: no such folder, and not to be had from the hub "
                f"({' '.join(str(error).split())[:200]})"
            ) from None
        return _load(Path(files[0]).parent)


def _kept(section: Any, names: tuple[str, ...]) -> Any:
    """Returns a section with some of its keys, and the others at their defaults."""
    return type(section)(**section.model_dump(include=set(names)))


def _load(folder: Path) -> AdaptiveModel:
    """Loads a folder that `save_pretrained` wrote.

    Raises:
        CheckpointError: A file is missing or damaged, or the files are not of one save.
    """
    path = folder / CONFIG_FILE
    try:
        content = read_json(path, _REMEDY, [_KEY])[_KEY]
    except UserError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: not of this version of videoadapt; {_REMEDY} with this version")
    try:
        adaptive, weights = _built(content), content["weights"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # ValueError: pydantic's, and ours
        cause = f"without {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: describes no model ({cause}); {_REMEDY}") from None
    file = folder / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: does not exist; {_REMEDY}") from None
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file}: torn or not a safetensors file ({str(error)[:200]}); {_REMEDY}") from None
    load_tensors(adaptive, tensors, file)
    if weights_digest(adaptive) != weights:
        raise CheckpointError(
            f"{file}: its weights are not those of {CONFIG_FILE}; the save was interrupted. {_REMEDY}"
        )
    return adaptive.eval()


def _built(content: Mapping[str, Any]) -> AdaptiveModel:
    """Builds the model that `config.json` describes, with random weights."""
    model = TimeSformer(ModelConfig(**content["model"]), tuple(map(str, content["classes"])))
    assigned, recorded = None, content["assigner"]
    if recorded is not None:
        points = model.config.points
        network = Assigner(AssignConfig(**recorded["settings"]), len(points)).eval()
        # Without the digest of the model's weights, which are not loaded yet.
        assigned = Assigned(network, points, float(recorded["threshold"]), None, recorded["inputs"])
    policy, leap = content["policy"], content.get("leap")
    adaptive = AdaptiveModel(
        model,
        assigned,
        policy if leap is None else Leap.from_json(policy, leap),
        evaluate=EvaluateConfig(**content["evaluate"]),
        data=DataConfig(**content["data"]),
        facts=Facts.from_json(content["facts"]),
    )
    return adaptive
