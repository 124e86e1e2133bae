"""A checkpoint remembers the clips of its training, so that no later stage takes them for unseen ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from videoadapt.config.load import make_config
from videoadapt.data.index.manifest import Manifest
from videoadapt.errors import UserError
from videoadapt.evaluation.evaluate import _trained_on
from videoadapt.model.checkpoint import Checkpoint
from videoadapt.training.trained_clips import (
    INITIAL,
    TENSOR,
    clip_keys,
    clips_of_weights,
    require_held_out,
    require_unseen,
    trained_clips,
)

CLIPS = 8
COLUMNS: dict[str, Any] = {
    "label": 0, "frames": 9, "fps": 30.0, "width": 8, "height": 8, "duration_s": 1.0, "codec": "", "container": "",
    "rotation": 0, "reader": "pyav", "bytes": 1, "damage": "", "variable_rate": False, "status": "ok", "cause": "",
}  # fmt: skip
CONFIG = make_config({"data": {"holdout": 0.5}, "label": {"source": "holdout"}})


def manifest(holdout: set[int], *, video: str = "v", content: str = "c", source: str = "") -> Manifest:
    """Clips 0 to 7; the rest of them are in the split train."""
    rows = [
        COLUMNS
        | {"path": f"/data/{video}{n}", "video": f"{video}{n}", "source": source and f"{source}{n}"}
        | {"content": content and f"{content}{n}", "split": "holdout" if n in holdout else "train"}
        for n in range(CLIPS)
    ]
    return Manifest(pd.DataFrame(rows), ("a",))


def checkpoint(trained_on: Manifest, *, recorded: bool = True, seed: int = 0) -> Checkpoint:
    meta = {"manifest": trained_on.hash, "run": {"seed": seed}, "data": {"holdout": 0.5}}
    return Checkpoint(Path("step-1"), {TENSOR: clip_keys(trained_on)} if recorded else {}, meta)


def test_clips_that_were_held_out_may_be_labelled() -> None:
    first = manifest({1, 2})
    require_held_out(checkpoint(first), first, CONFIG)
    require_held_out(checkpoint(first), manifest({2}), CONFIG)  # fewer of the same


@pytest.mark.parametrize("same", [{"content": "other"}, {"video": "renamed"}, {"video": "x", "content": "y"}])
def test_clips_of_the_training_are_refused_with_their_number(same: dict[str, str]) -> None:
    """A clip is known by its id, by the bytes of its file, or by its YouTube id."""
    trained = checkpoint(manifest({1, 2}, source="youtube"), seed=3)
    expected = r"label\.source: holdout .* 2 of the 3 clips .*; since then run\.seed changed from 3 to 0\. Undo"
    with pytest.raises(UserError, match=expected):
        require_held_out(trained, manifest({2, 3, 4}, source="youtube", **same), CONFIG)


def test_a_calibration_on_clips_of_a_fit_is_refused_with_their_number() -> None:
    trained = checkpoint(manifest({1, 2}, source="youtube"), seed=3)
    table = manifest(set(), source="youtube").table
    table.loc[[1, 2], "split"] = "calibrate"
    require_unseen(trained, Manifest(table, ("a",)), CONFIG)
    table.loc[[3, 4], "split"] = "calibrate"
    expected = r"data\.calibrate: .* 2 of the 4 clips .*; since then run\.seed changed from 3 to 0\. Undo"
    with pytest.raises(UserError, match=expected):
        require_unseen(trained, Manifest(table, ("a",)), CONFIG)


def test_clips_of_the_initial_weights_are_remembered_by_their_bytes(tmp_path: Path) -> None:
    """Run A has trained on all clips, and B begins with its weights. A clip of another list may have the same id."""
    first, second = manifest(set()), manifest({1, 2})
    save_file({TENSOR: clip_keys(first)}, tmp_path / "a.safetensors")
    initial = clips_of_weights(str(tmp_path / "a.safetensors"))
    assert torch.equal(initial, clip_keys(first))
    assert not len(clips_of_weights("vit_small_patch16_224"))
    own = checkpoint(second)
    later = replace(own, tensors={**own.tensors, INITIAL: initial})
    with pytest.raises(UserError, match="2 of the 2 clips"):
        require_held_out(later, second, CONFIG)
    # Another list may have the same ids, and the same sources by a pattern.
    assert trained_clips(later, manifest({1, 2}, content="other", source="p").split("holdout")) == 0
    save_file(later.tensors, tmp_path / "b.safetensors")
    assert torch.equal(clips_of_weights(str(tmp_path / "b.safetensors")), initial)


def test_evaluate_tells_files_of_the_training_from_others_of_their_sources(capfd: pytest.CaptureFixture[str]) -> None:
    table = manifest(set(), source="youtube").table
    table.loc[4:, "split"] = "val"
    table.loc[4, ["source", "content"]] = table.loc[0, ["source", "content"]]  # the same file
    table.loc[[5, 6], "source"] = table.loc[1, "source"]
    found = Manifest(table, ("a",))
    assert _trained_on(checkpoint(found), found) == 3
    said = " ".join(capfd.readouterr().err.split())
    assert "files of the val split that were in the training of step-1: 1 of 4" in said
    assert "whose source had other videos in the training: 2 of 4" in said


def test_unknown_clips_are_not_taken_for_trained_ones() -> None:
    trained = checkpoint(manifest({1, 2}, content=""))
    require_held_out(trained, manifest({3, 4}, video="w", content=""), CONFIG)  # empty values identify nothing
    assert trained_clips(trained, manifest(set(), video="w")) == 0
    assert trained_clips(trained, manifest(set()), ("source", "content")) == 0  # the ids alone are the same


def test_an_older_checkpoint_says_that_it_cannot_tell(capfd: pytest.CaptureFixture[str]) -> None:
    first, second = manifest({1, 2}), manifest({3})
    old = checkpoint(first, recorded=False)
    require_held_out(old, first, CONFIG)
    assert capfd.readouterr().err == ""
    require_held_out(old, second, CONFIG)
    assert "whether clips of the split holdout were among them cannot be found out" in capfd.readouterr().err
    assert trained_clips(old, second) is None
    with pytest.raises(UserError, match=r"probably many of the 1 clips .* run\.seed changed from 5 to 0"):
        require_held_out(checkpoint(first, recorded=False, seed=5), second, CONFIG)


def test_the_record_is_small_and_does_not_depend_on_the_order() -> None:
    keys = clip_keys(manifest(set()))
    assert keys.dtype == torch.int64
    assert len(keys) == 2 * CLIPS + 1  # id and content of each; all have the same empty source
    backwards = Manifest(manifest(set()).table.iloc[::-1].reset_index(drop=True), ("a",))
    assert torch.equal(clip_keys(backwards), keys)
