"""Stage 2, first half: what the model gets right at which point, clip by clip, and the token-length labels."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import UserError
from videoadapt.routing.label_rules import LABEL_SPLITS, choose_labels, outcome_table, right_matrix
from videoadapt.routing.scores import Scores, inference_model, score
from videoadapt.runtime.files import write_json, write_parquet
from videoadapt.runtime.lease import sole_writer
from videoadapt.runtime.ranks import broadcast_result, rank, rank0_then_all, ranks


def label(config: Config) -> dict[str, Any]:
    """Runs every point on every clip of the label source's splits and derives the labels.

    Writes `labels/outcomes.parquet` (one row per clip and point) and `labels/labels.parquet`; returns the summary. The
    ranks of a job share the clips; their number changes no label. A shard (`parallel.shard`) only scores its clips.
    """
    path = config.run.dir / "labels" / "label.json"
    with ranks(config), sole_writer(config, "label") as guard:
        manifest = rank0_then_all(lambda: load_or_index(config))
        scores = _score(manifest, config)
        if scores is None:
            return {"shard": config.parallel.shard}
        if rank() == 0:
            tables, summary = _labelled(manifest, scores, config)
            with guard():
                for name, table in tables.items():
                    write_parquet(path.with_name(f"{name}.parquet"), table)
                write_json(path, summary)
        written: dict[str, Any] = broadcast_result(lambda: json.loads(path.read_text(encoding="utf-8")))
    return written


def _score(manifest: Manifest, config: Config) -> Scores | None:
    splits = LABEL_SPLITS[config.label.source]
    usable = (manifest.table["split"].isin(splits) & (manifest.table["status"] == "ok")).to_numpy()
    if not usable.any():
        raise UserError(f"label.source: {config.label.source} has no readable video in {' and '.join(splits)}")
    rows = np.flatnonzero(usable).tolist()
    scores = score(inference_model(config), manifest, rows, config, name="label", temporal_views=1)
    if scores is not None and not len(scores.rows):
        first = scores.failures[0]
        raise UserError(f"label.source: none of its videos could be decoded; {first.path}: {first.cause}")
    return scores


def _labelled(manifest: Manifest, scores: Scores, config: Config) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The tables by name, and the summary."""
    points, names = config.model.points, manifest["video"]
    table = pd.concat(
        outcome_table(names[part.rows].tolist(), part.clips, part.truth, part.probabilities(), points)
        for part in scores.shards()
    )
    clips, right = right_matrix(table, points, source=config.label.source)
    labels = choose_labels(right, config.label.none_right)
    clips["label"] = labels
    summary = {
        "source": config.label.source,
        "none_right": config.label.none_right,
        "manifest": manifest.hash,
        "model": scores.model,
        "clips": len(labels),
        "failed": [{"path": f.path, "cause": f.cause} for f in scores.failures],
        "points": {
            point: {"right": float(right[:, i].mean()), "labelled": int((labels == i).sum())}
            for i, point in enumerate(points)
        },
        "none_right_clips": int((~right.any(axis=1)).sum()),
        "left_out": int((labels < 0).sum()),
    }
    return {"outcomes": table, "labels": clips}, summary
