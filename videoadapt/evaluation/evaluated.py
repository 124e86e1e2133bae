"""Reads the files of an evaluation that other verbs need; a damaged one is an error with its remedy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

from videoadapt.config.load import RUN_CONFIG, Config, load_config
from videoadapt.errors import UserError
from videoadapt.runtime.files import Summary, read_json, read_parquet

_REMEDY = "run `videoadapt evaluate` first"
VIEWS = ("temporal_views", "spatial_crops")  # keys of `evaluate`, and of `evaluate.json`


def run_folder(path: Path) -> Path:
    """Returns the run folder that a path stands for, as for every verb.

    Args:
        path: A run folder, or a config, or the folder of a config whose `run.dir` is elsewhere.

    Raises:
        ConfigError: The config cannot be read.
    """
    if (path / "evaluate").is_dir() or not (path.is_file() or (path / RUN_CONFIG).is_file()):
        return path
    return load_config(path).run.dir


def evaluation_path(run: Path) -> Path:
    """Returns the path of the summary that `evaluate` writes."""
    return run / "evaluate" / "evaluate.json"


def read_evaluation(run: Path, keys: Collection[str] = ()) -> Summary:
    """Reads `evaluate.json` of a run.

    Args:
        run: The run folder.
        keys: Keys that the caller needs, besides `policies`.

    Raises:
        UserError: The run was not evaluated, or the file is damaged.
    """
    return read_json(evaluation_path(run), _REMEDY, ["policies", *keys])


def as_evaluated(config: Config) -> Config:
    """Returns the config with the views of the run's evaluation, which may have been overridden; as it is without one.

    Raises:
        UserError: `evaluate.json` is damaged.
    """
    if not evaluation_path(config.run.dir).exists():
        return config
    found = read_evaluation(config.run.dir)
    views = {key: found[key] for key in VIEWS if isinstance(found.get(key), int)}  # earlier versions have none
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update=views)})


def read_evaluated_table(run: Path, name: str, columns: Collection[str]) -> pd.DataFrame:
    """Reads `evaluate/NAME.parquet` of a run.

    Raises:
        UserError: The file is missing or damaged, or has not the columns.
    """
    path = run / "evaluate" / f"{name}.parquet"
    table = read_parquet(path, _REMEDY, columns)
    if "truth" in table and is_numeric_dtype(table["truth"]):
        raise UserError(
            f"{path}: of an older version, with numbers of classes and not their names; run `evaluate` again"
        )
    return table


def reported_policy(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the policy that figures, the page and the clip-level report are about.

    It is the routing policy with the largest gain over mixtures of fixed points, of those that save MACs and are not
    proven to be less accurate than the costliest point. Where none gains, it is the assigned policy; without one, the
    first cascade or leap; without both, the costliest point.

    Args:
        policies: The rows of `evaluate.json`, by policy name. The first is the costliest point.
    """
    routing = routing_policies(policies)
    return max(
        (name for name in routing if gain_over_mixtures(policies[name]) > 0),
        key=lambda name: gain_over_mixtures(policies[name]),
        default=next(iter([*routing, *policies])),
    )


def has_text(name: str) -> bool:
    """Returns whether `--policy` takes the name of a policy that `evaluate` does not evaluate by itself."""
    return name.startswith(("assigned:", "cascade:", "leap:", "mixture:"))


def routing_policies(policies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the policies of an evaluation among which `reported_policy` chooses: all that could route new clips."""
    # What is compared with a mixture routes, but for a mixture, whose difference to itself is chance. In an evaluation
    # of an older version, the assigned policy has a difference to random routing, a cascade records its thresholds, a
    # leap its price.
    keys = {"difference_to_mixture", "difference_to_random", "thresholds", "price"}
    return [name for name, row in policies.items() if keys & row.keys() and not name.startswith("mixture:")]


def gain_over_mixtures(row: Mapping[str, Any]) -> float:
    """Returns the gain of a policy over mixtures; 0 if it saves nothing, loses significantly, or was not compared."""
    if "difference_to_mixture" not in row or row["macs_saved"] <= 0 or row["difference_to_costliest"][2] < 0:
        return 0.0
    return float(row["difference_to_mixture"][0])


def unclear_speeds(policies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the policies that are faster than the first one by the median of their speeds, but not of the ratios.

    Args:
        policies: The key `policies` of `speed`. The first one is the fixed costliest point.
    """
    first = next(iter(policies.values()))["clips_per_s"]
    return [
        name
        for name, policy in policies.items()
        if (policy["clips_per_s"] - first) * (policy["speedup"][0] - 1) < 0  # one rises and the other falls
    ]
