"""Two evaluated runs on the same videos: paired differences, and whether they can be chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.errors import UserError
from videoadapt.evaluation.intervals import mcnemar, paired_difference


def compare(a: str, b: str) -> dict[str, Any]:
    """Top-1 of two evaluated runs on the videos that both list, policy by policy.

    Each is a run folder, or `FOLDER:POLICY` for one policy. Policies of the same name are compared; where each side
    names one, those. Videos that failed count as each run counted them: if one left them out, they are left out of
    both. Raises `UserError` if a run was not evaluated, or if the runs have nothing in common.
    """
    sides = [_evaluated(text) for text in (a, b)]
    pairs = _pairs(sides, (a, b))
    common = sorted(set(sides[0].videos) & set(sides[1].videos))
    if not common:
        raise UserError(f"{a} and {b}: not one video in common, so there is nothing to compare")
    rows = [_compared(sides, pair, common) for pair in pairs]
    return {
        "runs": [a, b],
        "manifests": [side.summary["manifest"] for side in sides],
        "files": [side.summary["files"] for side in sides],
        "listed": [len(side.videos) for side in sides],
        "common": len(common),
        "failed_count_as": _counting(sides),
        "policies": rows,
    }


class _Evaluated:
    """The results of one run: `table` is its `videos.parquet`, indexed by policy and video."""

    def __init__(self, folder: Path, policies: list[str]) -> None:
        try:
            self.summary = json.loads((folder / "evaluate" / "evaluate.json").read_text(encoding="utf-8"))
            self.table = pd.read_parquet(folder / "evaluate" / "videos.parquet").set_index(["policy", "video"])
        except FileNotFoundError as error:
            raise UserError(f"{error.filename or folder}: not there; run `videoadapt evaluate` first") from None
        known = list(self.summary["policies"])
        unknown = [policy for policy in policies if policy not in known]
        if unknown:
            raise UserError(f"{folder}: has no policy {unknown[0]}; it has {', '.join(known)}")
        self.policies = policies or known
        self.videos = self.table.loc[known[0]].index


def _evaluated(text: str) -> _Evaluated:
    folder, colon, policy = (text, "", "") if Path(text).is_dir() else text.partition(":")
    return _Evaluated(Path(folder), [policy] if colon else [])


def _pairs(sides: list[_Evaluated], names: tuple[str, str]) -> list[tuple[str, str]]:
    ours, theirs = (side.policies for side in sides)
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    pairs = [(policy, policy) for policy in ours if policy in theirs]
    if not pairs:
        raise UserError(
            f"{names[0]} has the policies {', '.join(ours)}, {names[1]} has {', '.join(theirs)}: none in common; "
            "name one of each as FOLDER:POLICY"
        )
    return pairs


def _counting(sides: list[_Evaluated]) -> str:
    return "wrong" if all(side.summary["failed_count_as"] == "wrong" for side in sides) else "exclude"


def _compared(sides: list[_Evaluated], pair: tuple[str, str], common: list[str]) -> dict[str, Any]:
    a, b = (side.table.loc[policy].loc[common] for side, policy in zip(sides, pair, strict=True))
    differ = a["truth"] != b["truth"]
    if differ.any():
        video = differ.idxmax()
        raise UserError(
            f"{video}: its class is {a.loc[video, 'truth']} in one run and {b.loc[video, 'truth']} in the other; "
            "these runs have other classes, or number them otherwise"
        )
    if _counting(sides) == "exclude":
        readable = ~(a["failed"] | b["failed"])
        a, b = a[readable], b[readable]
        if not len(a):
            raise UserError("of the videos that both runs list, not one was read by both; nothing can be compared")
    right_a, right_b = a["right"].to_numpy(), b["right"].to_numpy()
    a_only, b_only = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return {
        "policies": list(pair),
        "videos": len(right_a),
        "top1": [float(np.mean(right_a)), float(np.mean(right_b))],
        "difference": list(paired_difference(right_a, right_b)),
        "right_in_one_only": [a_only, b_only],
        "p_value": mcnemar(a_only, b_only),
    }
