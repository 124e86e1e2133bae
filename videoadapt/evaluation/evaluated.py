"""Reads the files of an evaluation that other verbs need; a damaged one is an error with its remedy."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from videoadapt.runtime.files import Summary, read_json, read_parquet

_REMEDY = "run `videoadapt evaluate` first"


def read_evaluation(run: Path, keys: Collection[str] = ()) -> Summary:
    """Reads `evaluate.json` of a run.

    Args:
        run: The run folder.
        keys: Keys that the caller needs, besides `policies`.

    Raises:
        UserError: The run was not evaluated, or the file is damaged.
    """
    return read_json(run / "evaluate" / "evaluate.json", _REMEDY, ["policies", *keys])


def read_evaluated_table(run: Path, name: str, columns: Collection[str]) -> pd.DataFrame:
    """Reads `evaluate/NAME.parquet` of a run.

    Raises:
        UserError: The file is missing or damaged, or has not the columns.
    """
    return read_parquet(run / "evaluate" / f"{name}.parquet", _REMEDY, columns)
