"""Write the predictions of an evaluated run as a CSV, as challenge servers and colleagues ask for them.

    python tools/make_submission.py runs/timesformer_b_k400 submission.csv --policy assigned --top 5

One line a video, in the order of the manifest: its id (for Kinetics names `youtube_id,time_start,time_end` too), then
`label_1,score_1,...` with class names and probabilities, best first. A video that could not be read has empty fields.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from videoadapt.data.index.find_files import video_id
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import UserError
from videoadapt.runtime.files import write_csv


def main() -> None:
    """Reads a run folder, writes a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of an evaluated run")
    parser.add_argument("output", type=Path, help="the CSV to write; an existing file is not overwritten")
    parser.add_argument("--policy", help="a policy of the evaluation [default: assigned, else the costliest point]")
    parser.add_argument("--top", type=int, default=5, help="classes a video, at most 5 [default: 5]")
    given = parser.parse_args()
    try:
        if given.output.exists():
            raise UserError(f"{given.output}: is there already, and is not overwritten; name another file")
        table = submission(given.run, given.policy, given.top)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_csv(given.output, table)
    print(f"{given.output}: {len(table)} videos, {int(table['label_1'].isna().sum())} of them without a prediction")


def submission(run: Path, policy: str | None, top: int) -> pd.DataFrame:
    """One row a video with its best classes. Raises `UserError` where the run was not evaluated with this policy."""
    source = run / "evaluate" / "videos.parquet"
    try:
        videos = pd.read_parquet(source)
    except FileNotFoundError:
        raise UserError(f"{source}: not there; run `videoadapt evaluate` first") from None
    policies = videos["policy"].unique().tolist()
    chosen = policy or ("assigned" if "assigned" in policies else policies[0])
    if chosen not in policies:
        raise UserError(f"--policy {chosen}: this evaluation has {', '.join(policies)}")
    videos = videos[videos["policy"] == chosen]
    most = int(videos["best"].map(len).max())
    if not 1 <= top <= most:
        raise UserError(f"--top {top}: expected 1 to {most}, the classes that the evaluation kept")
    names = Manifest.load(run / "manifest.parquet").classes
    return pd.DataFrame([_line(row, names, top) for row in videos.to_dict("records")])


def _line(row: dict, names: tuple[str, ...], top: int) -> dict[str, object]:
    line: dict[str, object] = {"video": row["video"]}
    _, youtube = video_id(row["video"])
    if youtube:
        start, end = row["video"].split("_")[-2:]
        line |= {"youtube_id": youtube, "time_start": int(start), "time_end": int(end)}
    for place in range(top):
        there = place < len(row["best"])
        line[f"label_{place + 1}"] = names[row["best"][place]] if there else None
        line[f"score_{place + 1}"] = round(float(row["p_best"][place]), 6) if there else None
    return line


if __name__ == "__main__":
    main()
