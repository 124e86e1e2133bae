"""Compares two evaluated runs on the same videos: paired differences, and whether chance can explain them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from videoadapt.errors import UserError, few
from videoadapt.evaluation.evaluated import read_evaluated_table, read_evaluation, run_folder
from videoadapt.evaluation.intervals import mcnemar, paired_difference
from videoadapt.routing.label_rules import Interval
from videoadapt.runtime.files import Summary


@dataclass(frozen=True)
class ComparedPolicies:
    """One policy of each run on the same videos. Pairs are (a, b). The names are keys of the result."""

    policies: tuple[str, str]
    videos: int
    top1: tuple[float, float]
    difference: Interval  # top-1 of a minus b
    right_in_one_only: tuple[int, int]
    p_value: float  # the result of `mcnemar`, which counts each video of a source alone


@dataclass(frozen=True)
class Comparison:
    """The comparison of two runs. Pairs are (a, b). The names are keys of the result."""

    runs: tuple[str, str]
    manifests: tuple[str, str]  # hashes
    files: tuple[str, str]  # digests of the files that were read
    listed: tuple[int, int]  # videos
    views: tuple[str | None, str | None]  # the views of a video and their mean; None in older evaluations
    common: int  # videos that both runs list
    failed_count_as: str
    policies: list[ComparedPolicies]


def compare(a: str, b: str) -> Summary:
    """Compares the top-1 of two evaluated runs on the videos that both list, policy by policy.

    Policies of the same name are compared; if each side names one policy, those two. A failed video counts as in the
    runs: if one run left it out, it is left out of both.

    Args:
        a: A run folder or a config, or `FOLDER:POLICY` for one policy.
        b: The same.

    Returns:
        The fields of `Comparison`, with lists for tuples.

    Raises:
        UserError: A run was not evaluated, the runs have no video or policy in common, or their classes differ.
    """
    sides = _evaluated(a), _evaluated(b)
    pairs = _pairs(sides, (a, b))
    common = sorted(set(sides[0].videos) & set(sides[1].videos))
    if not common:
        raise UserError(f"{a} and {b}: no video in common, so there is nothing to compare")
    result = Comparison(
        runs=(a, b),
        manifests=(sides[0].summary["manifest"], sides[1].summary["manifest"]),
        files=(sides[0].summary["files"], sides[1].summary["files"]),
        listed=(len(sides[0].videos), len(sides[1].videos)),
        views=(sides[0].summary.get("views"), sides[1].summary.get("views")),
        common=len(common),
        failed_count_as=_counting(sides),
        policies=[_compared(sides, pair, common) for pair in pairs],
    )
    as_json: Summary = json.loads(json.dumps(asdict(result)))  # tuples become lists, as for every other verb
    return as_json


class _Evaluated:
    """The results of one run: `table` is its `videos.parquet`, indexed by policy and video."""

    def __init__(self, folder: Path, policies: list[str]) -> None:
        self.summary = read_evaluation(folder, ["manifest", "files", "failed_count_as"])
        columns = ["policy", "video", "truth", "right", "failed"]
        self.table = read_evaluated_table(folder, "videos", columns).set_index(["policy", "video"])
        known = list(self.summary["policies"])
        unknown = [policy for policy in policies if policy not in known]
        if unknown:
            raise UserError(f"{folder}: has no policy {unknown[0]}; it has {few(known)}")
        self.policies = policies or known
        self.videos = self.table.loc[known[0]].index  # every policy has a row for every listed video


_Sides = tuple[_Evaluated, _Evaluated]


def _evaluated(text: str) -> _Evaluated:
    # Folders and policies may both have a colon in their names, so only a text that is no path is split.
    folder, colon, policy = (text, "", "") if Path(text).exists() else text.partition(":")
    return _Evaluated(run_folder(Path(folder)), [policy] if colon else [])


def _pairs(sides: _Sides, names: tuple[str, str]) -> list[tuple[str, str]]:
    ours, theirs = (side.policies for side in sides)
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    pairs = [(policy, policy) for policy in ours if policy in theirs]
    if not pairs:
        raise UserError(
            f"{names[0]} has the policies {few(ours)}, {names[1]} has {few(theirs)}: none in common; "
            "name one of each as FOLDER:POLICY"
        )
    return pairs


def _counting(sides: _Sides) -> str:
    return "wrong" if all(side.summary["failed_count_as"] == "wrong" for side in sides) else "exclude"


def _compared(sides: _Sides, pair: tuple[str, str], common: list[str]) -> ComparedPolicies:
    a, b = (side.table.loc[policy].loc[common] for side, policy in zip(sides, pair, strict=True))
    differ = a["truth"] != b["truth"]  # (videos,)
    if differ.any():
        video = differ.idxmax()  # the first video that differs
        ours, theirs = a.loc[video, "truth"], b.loc[video, "truth"]
        raise UserError(
            f"{video}: its class is {ours} in one run and {theirs} in the other; the runs must have the same classes"
        )
    if _counting(sides) == "exclude":
        readable = ~(a["failed"] | b["failed"])  # the test is paired: both runs need an answer
        a, b = a[readable], b[readable]
        if not len(a):
            raise UserError("no video was read by both runs, so there is nothing to compare")
    sources = a["source"].to_numpy() if "source" in a else None  # evaluations of older versions have none
    right_a, right_b = a["right"].to_numpy(), b["right"].to_numpy()
    a_only, b_only = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return ComparedPolicies(
        policies=pair,
        videos=len(right_a),
        top1=(float(np.mean(right_a)), float(np.mean(right_b))),
        difference=paired_difference(right_a, right_b, sources=sources),
        right_in_one_only=(a_only, b_only),
        p_value=mcnemar(a_only, b_only),
    )
