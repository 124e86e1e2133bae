"""`evaluate/logits.npz`: the logits of every view at every point, with names, for the fusion of models."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from videoadapt.evaluation.outcomes import Population
from videoadapt.evaluation.result_tables import video_names
from videoadapt.routing.scores import Scores
from videoadapt.runtime.files import replacing


def write_logits(
    path: Path, scores: Scores, population: Population, paths: dict[int, str], points: tuple[str, ...]
) -> None:
    """Writes a file for `numpy.load`, one shard after the other: all logits may not fit into memory together.

    Its arrays, for n views:

    - `logits`: float32 `(n, points, classes)`.
    - `video`, `path`, `truth`: texts `(n,)`: the video's name as in the tables, its file, and its class.
    - `clip`, `crop`: `(n,)`: number of the clip within the video, and of the crop within the clip.
    - `points`, `classes`: texts, the names along the axes of `logits`.

    Views are in the order of the manifest's videos, then of clips, then of crops: two runs with the same videos and
    views have the same order.

    Args:
        path: The file.
        scores: The scores of all clips.
        population: The listed videos.
        paths: The file of each video, by manifest row.
        points: The points of the model.
    """
    crops = next(scores.shards()).logits.shape[1]
    names, classes = video_names(scores, population), np.array(population.classes)
    rows = np.repeat(scores.rows, crops)  # (n,)
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "video": np.array([names[row] for row in rows.tolist()]),
        "path": np.array([paths[row] for row in rows.tolist()]),
        "clip": np.repeat(scores.clips, crops),
        "crop": np.tile(np.arange(crops), len(scores.rows)),
        "truth": classes[np.repeat(scores.truth, crops)],
        "points": np.array(points),
        "classes": classes,
    }
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, array)
        with archive.open("logits.npy", "w", force_zip64=True) as file:  # its size is not known to `zipfile`
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), len(points), len(classes))}
            np.lib.format.write_array_header_2_0(file, header)
            for shard in scores.shards():
                file.write(np.ascontiguousarray(shard.logits, "<f4").tobytes())  # (clips, crops, points, classes)
