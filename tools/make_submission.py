"""Writes the predictions of an evaluated run as a CSV, for example for a challenge server.

    python tools/make_submission.py runs/timesformer_b_k400 submission.csv --policy assigned --top 5

There is one line per video, in the order of the manifest. It has the video's id and, for Kinetics names, `youtube_id,
time_start,time_end`, then `label_1,score_1,...` with class names and probabilities, best first. The labels and scores
of a video that could not be read are empty.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from videoadapt.data.index.find_files import video_id
from videoadapt.errors import UserError
from videoadapt.evaluation.evaluated import read_evaluated_table, run_folder
from videoadapt.runtime.files import write_csv


def main() -> None:
    """Reads a run folder and writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of an evaluated run")
    parser.add_argument("output", type=Path, help="the CSV to write; an existing file is not overwritten")
    parser.add_argument(
        "--policy", help="a policy of the evaluation [default: assigned; the costliest point if there is no assigner]"
    )
    parser.add_argument("--top", type=int, default=5, help="classes per video, at most 5 [default: 5]")
    given = parser.parse_args()
    try:
        if given.output.exists():
            raise UserError(f"{given.output}: exists, and is not overwritten; name another file")
        table = submission(given.run, given.policy, given.top)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_csv(given.output, table)
    print(f"{given.output}: {len(table)} videos, {int(table['label_1'].isna().sum())} of them without a prediction")


def submission(run: Path, policy: str | None, top: int) -> pd.DataFrame:
    """Returns a row for each video with its best classes.

    Args:
        run: The folder of an evaluated run, or its config.
        policy: One of its policies; None as in the option `--policy`.
        top: Number of classes.

    Raises:
        UserError: The run was not evaluated, or not with this policy, or kept fewer classes.
    """
    videos = read_evaluated_table(run_folder(run), "videos", ["policy", "video"])
    policies = videos["policy"].unique().tolist()
    chosen = policy or ("assigned" if "assigned" in policies else policies[0])
    if chosen not in policies:
        raise UserError(f"--policy {chosen}: this evaluation has {', '.join(policies)}")
    videos = videos[videos["policy"] == chosen]  # one row per video, in the order of the manifest
    most = sum(column.startswith("best_") for column in videos)
    if not 1 <= top <= most:
        raise UserError(f"--top {top}: expected 1 to {most}, the number of classes that the evaluation kept")
    return pd.DataFrame([_cells(row, top) for row in videos.to_dict("records")])


def _cells(row: dict, top: int) -> dict[str, object]:
    """Returns the cells of a video by column."""
    cells: dict[str, object] = {"video": row["video"]}
    _, youtube = video_id(row["video"])
    if youtube:
        start, end = row["video"].split("_")[-2:]  # Kinetics names: ID_000024_000034
        cells |= {"youtube_id": youtube, "time_start": int(start), "time_end": int(end)}
    for rank in range(top):
        name = row[f"best_{rank + 1}"]  # a video that could not be read has none
        cells[f"label_{rank + 1}"] = name if pd.notna(name) else None
        cells[f"score_{rank + 1}"] = round(float(row[f"p_{rank + 1}"]), 6) if pd.notna(name) else None
    return cells


if __name__ == "__main__":
    main()
