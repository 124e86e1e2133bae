"""The label table of a run, as later stages read it: whole, and made from the same inputs as theirs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from videoadapt.config.load import Config
from videoadapt.errors import UserError, few
from videoadapt.runtime.console import say
from videoadapt.runtime.files import Summary, read_json, read_parquet
from videoadapt.runtime.inputs import Inputs

_REMEDY = "run `label` again"


def label_inputs(config: Config, manifest: str | None, weights: str | None) -> Inputs:
    """Returns what labels depend on: the clips and splits, the weights, and how a clip is read.

    Args:
        config: The run's config.
        manifest: `Manifest.hash`; None if the caller reads no manifest.
        weights: `weights_digest` of the model; None if the caller has none.
    """
    return Inputs.of(config, manifest, weights, "run", "data", "model", "evaluate", "label")


def label_summary_path(run: Path) -> Path:
    """Returns the path of the summary that `label` writes."""
    return run / "labels" / "label.json"


def outcomes_path(run: Path) -> Path:
    """Returns the path of the label table, with one row per clip and point."""
    return run / "labels" / "outcomes.parquet"


def read_label_summary(run: Path) -> Summary:
    """Reads `label.json` of a run.

    Raises:
        UserError: There is none, or it is damaged.
    """
    return read_json(label_summary_path(run), _REMEDY, ["source", "manifest", "model"])


def read_outcomes(run: Path) -> pd.DataFrame:
    """Reads `outcomes.parquet` of a run, one row per clip and point.

    Raises:
        UserError: There is none, or it is damaged.
    """
    columns = ["video", "clip", "point", "truth", "prediction"]
    return read_parquet(outcomes_path(run), _REMEDY, columns)


def require_same_label_inputs(run: Path, now: Inputs) -> None:
    """Checks that the label table of a run was made from the same inputs as the present stage uses.

    Prints a message about a table of an older version, which did not record its settings.

    Args:
        run: The run folder.
        now: The present inputs, by `label_inputs`; None and empty fields are not compared.

    Raises:
        UserError: Inputs differ; the message names each of them with both values.
    """
    path, summary = label_summary_path(run), read_label_summary(run)
    recorded = {"manifest": summary["manifest"], "weights": summary["model"]}
    if isinstance(summary.get("inputs"), dict):
        recorded["settings"] = summary["inputs"].get("settings")
    elif now.settings:
        say(f"{path}: an older version wrote it, without its settings; whether they have changed cannot be found out")
    differences = now.differences(recorded)
    if differences:
        raise UserError(
            f"{path.parent}: these labels belong to other inputs: {few(differences, separator='; ')}. "
            f"{_REMEDY.capitalize()}, or undo the change"
        )
