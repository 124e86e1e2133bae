"""Stage 2, first half: what the model gets right at which point, clip by clip, and the token-length labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config import Config
from videoadapt.data.manifest import load_or_index
from videoadapt.errors import UserError
from videoadapt.labels import LABEL_SPLITS, choose_labels, outcome_table, right_matrix
from videoadapt.log import write_json
from videoadapt.report.tables import write_parquet
from videoadapt.scoring import inference_model, score


def label(config: Config) -> dict[str, Any]:
    """Runs every point on every clip of the label source's splits and derives the labels.

    Writes `labels/outcomes.parquet` (one row per clip and point) and `labels/labels.parquet`; returns the summary.
    """
    manifest = load_or_index(config)
    model = inference_model(config)
    points = model.config.points
    splits = LABEL_SPLITS[config.label.source]
    usable = (manifest.table["split"].isin(splits) & (manifest.table["status"] == "ok")).to_numpy()
    if not usable.any():
        raise UserError(f"label.source: {config.label.source} has no readable video in {' and '.join(splits)}")
    scores = score(model, manifest, np.flatnonzero(usable).tolist(), config, name="label", temporal_views=1)
    if not len(scores.rows):
        first = scores.failures[0]
        raise UserError(f"label.source: none of its videos could be decoded; {first.path}: {first.cause}")
    names = manifest["video"]
    table = pd.concat(
        outcome_table(names[part.rows].tolist(), part.clips, part.truth, part.probabilities(), points)
        for part in scores.parts()
    )
    clips, right = right_matrix(table, points, source=config.label.source)
    labels = choose_labels(right, config.label.none_right)
    clips["label"] = labels
    folder = config.run.dir / "labels"
    for name, frame in (("outcomes", table), ("labels", clips)):
        write_parquet(folder / f"{name}.parquet", frame)
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
    write_json(folder / "label.json", summary)
    return summary
