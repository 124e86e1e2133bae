"""Looking again at the files of a manifest: what has gone, changed or broken since it was made, and what was mended."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest, Row
from videoadapt.data.index.probe_pool import Finding, look_at
from videoadapt.data.video.files import exists
from videoadapt.data.video.probe import probe
from videoadapt.errors import UserError
from videoadapt.runtime.console import Bar
from videoadapt.runtime.machine import worker_count


def check(path: Path, config: Config) -> dict[str, Any]:
    """What differs from a manifest (its file, or the folder of its run), JSON-able; nothing is written.

    Each file is read whole and its bytes are compared, in `data.workers` processes, `index.timeout_s` for each. Raises
    `UserError` if the manifest cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a manifest, or the folder of a run")
    manifest = Manifest.load(path / "manifest.parquet" if path.is_dir() else path)
    now = _look(set(manifest["path"]), config)
    changes = ((row, now[row.path], _change(row, now[row.path])) for row in manifest)
    differences = [
        {"path": row.path, "split": row.split, "change": change, "cause": found if isinstance(found, str) else ""}
        for row, found, change in changes
        if change
    ]
    return {
        "manifest": manifest.hash,
        "videos": len(manifest),
        "unchanged": len(manifest) - len(differences),
        "changes": dict(Counter(difference["change"] for difference in differences).most_common()),
        "differences": differences,
    }


def _look(paths: set[str], config: Config) -> dict[str, Finding]:
    found: dict[str, Finding] = {path: None for path in paths if not exists(path)}
    todo = sorted(paths - found.keys())
    workers = worker_count(config.data.workers)
    with (
        Bar("check", total=len(paths), unit="files", start=len(found)) as bar,
        closing(look_at(todo, probe, workers=workers, timeout_s=config.index.timeout_s)) as findings,
    ):
        for path, finding in findings:
            found[path] = finding
            bar.step()
    return found


def _change(row: Row, now: Finding) -> str:
    """What has become of a video, in two words; nothing if it is as it was."""
    if now is None:
        return "" if row.status == "missing" else "gone"
    if isinstance(now, str):
        return "" if row.status == "broken" else "broken now"
    if (now.bytes, now.content) == (row.bytes, row.content):
        return ""
    return {"ok": "changed", "missing": "found now", "broken": "readable now"}[row.status]
