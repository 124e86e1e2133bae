"""Looks up the file of each entry of the annotations."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

from videoadapt.data.index.find_files import NearFiles, best_first, files_by_stem, video_id
from videoadapt.data.index.sources import SPLIT_NAMES, AnnotationEntry, AnnotationSource, Split


class FileLookup:
    """Finds the files of all sources, and keeps messages about files that are not where the annotations say.

    Attributes:
        ignored_files: One message for each file that is not used because another has the same name.
    """

    def __init__(self, sources: Mapping[Split, AnnotationSource], near: NearFiles) -> None:
        self.ignored_files: list[str] = []
        self._near = near
        self._differing: dict[str, list[str]] = {}  # how paths differ from the annotations -> examples
        tables = [source for source in sources.values() if source.format == "table"]
        # Splits often share a root, which may hold 300,000 files: each root is searched once.
        self._files = {root: files_by_stem(root) for root in {source.root for source in tables}}
        clips = {entry.name for source in tables for entry in source.entries}
        self._clips_of = Counter(video_id(name)[1] for name in clips)  # YouTube id -> its clips

    def path(self, entry: AnnotationEntry, source: AnnotationSource, split: Split) -> str:
        """Returns the absolute path of an entry's file, or the expected path if no file is found."""
        expected = os.path.abspath(os.path.join(source.root, entry.name))
        if source.format == "table":
            return self._below_root(entry, source, split) or expected
        if source.format == "folder":
            return expected
        found = self._near.find(expected)
        example = f"{entry.location}: {entry.name}: {found.path}"
        if found.found_by:
            self._differing.setdefault(f"files listed {found.found_by}", []).append(example)
        elif found.similar:
            example = f"{entry.location}: {entry.name}: {' and '.join(found.similar[:2])}"
            self._differing.setdefault("missing files beside files of the same name", []).append(example)
        return found.path

    def notes(self) -> list[str]:
        """Returns a message for each way in which files differ from the annotations."""
        return [f"{kind}: {len(items)}, the first: {items[0]}" for kind, items in self._differing.items()]

    def _below_root(self, entry: AnnotationEntry, source: AnnotationSource, split: Split) -> str:
        """Returns the best file of a table's row, or an empty string."""
        stem = os.path.splitext(entry.name)[0]
        _, youtube_id = video_id(entry.name)
        files = self._files[source.root]
        found = files.get(stem) or files.get(_without_zeros(stem, youtube_id), [])
        if not found and youtube_id in files:
            kind = "files found by their YouTube id alone, which must be cut to the times of the table"
            if self._clips_of[youtube_id] > 1:  # an uncut video: its clips would be equal
                kind = "missing clips beside a file with their YouTube id, which several clips share"
            else:
                found = files[youtube_id]
            self._differing.setdefault(kind, []).append(f"{entry.location}: {files[youtube_id][0]}")
        if len(found) > 1:
            found = best_first(found, source.root, SPLIT_NAMES[split], entry.label)
            self.ignored_files += [f"{other}: ignored, {found[0]} is used" for other in found[1:]]
        return found[0] if found else ""


def _without_zeros(stem: str, youtube_id: str) -> str:
    """Returns `ID_417_427` for `ID_000417_000427`; some programs write the times so."""
    if not youtube_id:
        return stem
    start, end = stem.removeprefix(f"{youtube_id}_").split("_")
    return f"{youtube_id}_{int(start)}_{int(end)}"
