"""Compares the files of a manifest with their state when it was made: removed, changed, broken or repaired files."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from videoadapt.config.load import Config
from videoadapt.data.index.manifest import Manifest, Row, manifest_path
from videoadapt.data.index.probe_pool import NotProbed, ProbeResult, run_on_files
from videoadapt.data.video.files import exists
from videoadapt.data.video.limits import Limits
from videoadapt.data.video.probe import probe
from videoadapt.errors import UserError
from videoadapt.runtime.console import Bar
from videoadapt.runtime.machine import worker_count


@dataclass(frozen=True)
class Difference:
    """A video whose file differs from the manifest."""

    path: str
    split: str
    change: str  # gone, broken now, changed, found now, readable now, not probed
    cause: str  # the reason why the file cannot be read, or empty


@dataclass(frozen=True)
class CheckResult:
    """Result of `check`. `changes` is the number of videos by kind of change, the most frequent first."""

    manifest: str  # hash of the population
    videos: int
    unchanged: int
    changes: dict[str, int]
    differences: list[Difference]


def check(path: Path, config: Config) -> CheckResult:
    """Reads every file of a manifest again and compares its bytes. Writes nothing.

    Args:
        path: A manifest, or the folder of a run that has one.
        config: `data.workers` is the number of processes, `index.timeout_s` the time limit of each file.

    Raises:
        UserError: The manifest cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; expected a manifest, or the folder of a run")
    manifest = Manifest.load(manifest_path(path) if path.is_dir() else path)
    results = _probe_again(set(manifest["path"]), config)
    differences = []
    for row in manifest:
        result = results[row.path]
        change = _change(row, result)
        if change:
            differences.append(Difference(row.path, row.split, change, result if isinstance(result, str) else ""))
    return CheckResult(
        manifest=manifest.hash,
        videos=len(manifest),
        unchanged=len(manifest) - len(differences),
        changes=dict(Counter(difference.change for difference in differences).most_common()),
        differences=differences,
    )


def _probe_again(paths: set[str], config: Config) -> dict[str, ProbeResult]:
    # Missing files are not sent to the worker processes, because thousands may be missing.
    results: dict[str, ProbeResult] = {path: None for path in paths if not exists(path)}
    todo = sorted(paths - results.keys())
    workers, probe_again = worker_count(config.data.workers), partial(probe, limits=Limits.of(config.data))
    with (
        Bar("check", total=len(paths), unit="files", start=len(results)) as bar,
        closing(run_on_files(todo, probe_again, workers=workers, timeout_s=config.index.timeout_s)) as finished,
    ):
        for path, result in finished:
            results[path] = result
            bar.step()
    return results


def _change(row: Row, now: ProbeResult) -> str:
    """Returns how a video differs from its row, or an empty string if it does not."""
    if now is None:
        return "" if row.status == "missing" else "gone"
    if isinstance(now, NotProbed):
        return "not probed"
    if isinstance(now, str):
        return "" if row.status == "broken" else "broken now"
    # Also true for a folder of undamaged images whose number differs from the list: it is `broken` with a hash.
    if (now.bytes, now.content) == (row.bytes, row.content):
        return ""
    return {"ok": "changed", "missing": "found now", "broken": "readable now", "unprobed": "readable now"}[row.status]
