"""Suggestions for wrong keys: typing errors, other programs' names, wrong sections, and silence."""

from __future__ import annotations

import pytest

from videoadapt.config.load import known_keys
from videoadapt.config.suggest import suggest_keys


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("model.depht", "model.depth"),
        ("modle.points", "model.points"),
        ("trian.epoch", "train.epochs"),
        ("loss.tua", "loss.tau"),
        ("loss.lamda", "loss.lam"),
        ("train.optimiser", "train.optimizer"),
        ("slurm.partion", "slurm.partition"),
        ("data.train.annotation", "data.train.annotations"),
        ("data.annotations", "data.train.annotations data.val.annotations"),
        ("val.annotations", "data.val.annotations"),
        # other programs' names
        ("train.batch_size", "train.batch"),
        ("train.learning_rate", "train.lr"),
        ("train.wd", "train.weight_decay"),
        ("train.grad_clip", "train.clip_grad"),
        ("train.warmup", "train.warmup_epochs"),
        ("data.num_workers", "data.workers"),
        ("model.patch_size", "model.patch"),
        ("model.num_heads", "model.heads"),
        ("evaluate.crops", "evaluate.spatial_crops"),
        # a key of another section: its own name counts more than a likeness within the section
        ("train.seed", "run.seed"),
        ("data.num_frames", "model.num_frames"),
        ("model.frames", "model.num_frames"),
        ("train.label_smoothing", "loss.label_smoothing"),
        ("model.epochs", "train.epochs assign.epochs"),
        # a section, or a key without one
        ("trian", "train"),
        ("eval", "evaluate"),
        ("dataset", "data"),
        ("points", "model.points"),
        ("learning_rate", "train.lr assign.lr"),
    ],
)
def test_a_wrong_key_suggests_what_was_meant(wrong: str, meant: str) -> None:
    assert " ".join(suggest_keys(wrong, known_keys())) == meant


@pytest.mark.parametrize(
    "wrong",
    ["model.lenght", "model.dropout", "train.amp", "run.output", "pretrained", "foo.bar", "x", "x" * 10_000, ""],
)
def test_what_is_like_no_key_suggests_none(wrong: str) -> None:
    assert suggest_keys(wrong, known_keys()) == []
