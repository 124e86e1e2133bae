"""The verbs as functions for scripts and notebooks: `va.train("config.yaml")` is `videoadapt train config.yaml`.

Every function takes a `Config`, the path of a YAML file, or a run folder, and returns a dataclass; `index`
returns the `Manifest`. `progress=False` hides bars and messages, which otherwise go to stderr.

Ctrl-C, or "interrupt the kernel" in a notebook, ends a stage at the next step, after its state is saved. It raises
`KeyboardInterrupt`, and the same call goes on where it stopped. This holds in the main thread. Python gives no signals
to other threads, so a stage in another thread runs to its end. Signal handlers are restored in every case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from videoadapt.commands.stage import CurvesWhileTraining, draw_figures_of_evaluation, draw_new_curves
from videoadapt.config.load import Config, ConfigSource, as_config
from videoadapt.data.index.manifest import Manifest
from videoadapt.data.index.manifest import index as run_index
from videoadapt.errors import UserError
from videoadapt.evaluation.evaluate import EvaluationSummary
from videoadapt.evaluation.evaluate import evaluate as run_evaluate
from videoadapt.routing.calibrate import CalibrateSummary
from videoadapt.routing.calibrate import calibrate as run_calibrate
from videoadapt.routing.fit_assigner import AssignSummary
from videoadapt.routing.fit_assigner import assign as run_assign
from videoadapt.routing.label import LabelSummary
from videoadapt.routing.label import label as run_label
from videoadapt.routing.policy import Policy
from videoadapt.runtime.console import progress_shown
from videoadapt.runtime.results import ShardResult
from videoadapt.training.metrics import TrainSummary
from videoadapt.training.train import train as run_train

if TYPE_CHECKING:
    from videoadapt.exporting.export import ExportSummary

T = TypeVar("T")


def index(config: ConfigSource, *, progress: bool = True) -> Manifest:
    """Probes every listed video and writes the manifest; the other stages do it themselves where it is missing.

    Args:
        config: A `Config`, a YAML file, or a run folder.
        progress: Show bars and messages.

    Returns:
        The manifest, one row per listed video. Unreadable files are rows, too.

    Raises:
        ConfigError: The annotations cannot be used.
        UserError: A video has two labels, or a file name is not UTF-8.
    """
    with progress_shown(progress):
        return run_index(as_config(config))


def train(config: ConfigSource, *, progress: bool = True) -> TrainSummary:
    """Stage 1: trains one model at all points, from the run's newest checkpoint if there is one.

    Args:
        config: A `Config`, a YAML file, or a run folder.
        progress: Show bars and messages.

    Returns:
        Losses and accuracies of the last epoch. A finished run is not trained again.

    Raises:
        UserError: The config or the data cannot be used.
        RunError: A loss is not finite, videos cannot be read, or another process writes into the run folder.
        CheckpointError: The checkpoint belongs to another model, recipe or manifest.
        KeyboardInterrupt: Ctrl-C; the state is saved at the end of the step.
    """
    loaded = as_config(config)
    with progress_shown(progress):
        summary = run_train(loaded, CurvesWhileTraining(loaded.run.dir))
        draw_new_curves(loaded.run.dir)
    return summary


def label(config: ConfigSource, *, progress: bool = True) -> LabelSummary:
    """Stage 2: finds the cheapest point at which the model is right, for every clip.

    Args:
        config: A `Config`, a YAML file, or a run folder.
        progress: Show bars and messages.

    Returns:
        How often each point is right, and how many clips have it as their label.

    Raises:
        UserError: No video can be read, or the model was trained on clips of `holdout`.
        CheckpointError: There is no trained model.
        KeyboardInterrupt: Ctrl-C; the clips that are scored stay scored.
    """
    loaded = _whole(as_config(config), "label")
    with progress_shown(progress):
        return _not_shard(run_label(loaded))


def assign(config: ConfigSource, *, progress: bool = True) -> AssignSummary:
    """Stage 2: fits the assigner, the network that predicts the label of a clip.

    Args:
        config: A `Config`, a YAML file, or a run folder.
        progress: Show bars and messages.

    Returns:
        What the assigner saves and loses on the clips that chose its threshold.

    Raises:
        UserError: There is no label table, it does not fit the config, or it has too few clips.
        CheckpointError: An earlier assigner of this run was fitted with other settings.
        KeyboardInterrupt: Ctrl-C; the state is saved at the end of the epoch.
    """
    with progress_shown(progress):
        return run_assign(as_config(config))


def calibrate(config: ConfigSource, *, progress: bool = True) -> CalibrateSummary:
    """Chooses the cheapest policy that keeps a promise, on the videos of `data.calibrate` (docs/calibrate.md).

    Args:
        config: A `Config`, a YAML file, or a run folder.
        progress: Show bars and messages.

    Returns:
        The promise, the chosen policy, and the whole curve of accuracy and cost.

    Raises:
        ConfigError: `data.calibrate` is 0.
        UserError: No video of the split can be read, or something was fitted to some of them.
        CheckpointError: There is no model, or the run's assigner does not fit it.
        KeyboardInterrupt: Ctrl-C; the videos that are scored stay scored.
    """
    loaded = _whole(as_config(config), "calibrate")
    with progress_shown(progress):
        return _not_shard(run_calibrate(loaded))


def evaluate(
    config: ConfigSource, policies: Sequence[Policy | str] = (), *, progress: bool = True
) -> EvaluationSummary:
    """Measures accuracy, cost and speed of all policies on the split `val`.

    Args:
        config: A `Config`, a YAML file, or a run folder.
        policies: Further policies to evaluate: policies, their texts, or the file that `calibrate` wrote.
        progress: Show bars and messages.

    Returns:
        The figures of each policy, the population, and the videos that failed.

    Raises:
        UserError: No video can be read, a policy does not fit the model, or two policies have the same name.
        CheckpointError: There is no model, or the run's assigner does not fit it.
        KeyboardInterrupt: Ctrl-C; the videos that are scored stay scored.
    """
    loaded = _whole(as_config(config), "evaluate")
    with progress_shown(progress):
        summary = _not_shard(run_evaluate(loaded, policies))
        draw_figures_of_evaluation(loaded.run.dir)
    return summary


def export(config: ConfigSource, *, progress: bool = True) -> ExportSummary:
    """Writes the model for other programs: ONNX, torch.export, a folder for the hub, or one point for Hugging Face.

    Args:
        config: A `Config`, a YAML file, or a run folder. Its section `export` says what is written.
        progress: Show messages.

    Returns:
        What was written, and how far it differs from the model on real clips.

    Raises:
        UserError: A package of the extra `export` is missing, or the policy or the point cannot be exported.
        CheckpointError: There is no model, or the run's assigner does not fit it.
        RunError: A written graph differs from the model by more than `export.tolerance`.
    """
    from videoadapt.exporting.export import export as run_export  # with the hub's library, which no other verb needs

    with progress_shown(progress):
        return run_export(as_config(config))


def _whole(config: Config, verb: str) -> Config:
    """Refuses one shard of an array job, which has no result of its own."""
    if config.parallel.shard is not None:
        raise UserError(
            f"parallel.shard: va.{verb} returns the result of all shards; leave it out, or run each shard with "
            f"`videoadapt {verb}`"
        )
    return config


def _not_shard(result: T | ShardResult) -> T:
    assert not isinstance(result, ShardResult), "`_whole` has refused shards"
    return result
