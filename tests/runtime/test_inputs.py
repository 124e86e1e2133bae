"""What a stage depends on: recorded as JSON, and compared by later stages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from videoadapt.config.load import make_config
from videoadapt.runtime.inputs import Inputs, different_settings

SECTIONS = ("run", "data", "model", "evaluate", "label")
CONFIG = make_config({})


def record(manifest: str | None = "m1", weights: str | None = "w1", **sections: dict) -> Inputs:
    return Inputs.of(make_config(sections), manifest, weights, *SECTIONS)


def stored(inputs: Inputs) -> dict:
    return json.loads(json.dumps(inputs.to_json()))


def test_the_same_inputs_have_no_differences() -> None:
    assert record().differences(stored(record())) == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"manifest": "m2"}, ["the manifest: 'm1' then, 'm2' now"]),
        ({"weights": "w2"}, ["the weights (or run.precision): 'w1' then, 'w2' now"]),
        ({"data": {"interpolation": "bicubic"}}, ["data.interpolation: 'bilinear' then, 'bicubic' now"]),
        ({"evaluate": {"spatial_crops": 1}}, ["evaluate.spatial_crops: 3 then, 1 now"]),
        ({"run": {"precision": "bf16"}}, ["run.precision: 'fp32' then, 'bf16' now"]),
        ({"label": {"source": "teacher"}}, ["label.source: 'train' then, 'teacher' now"]),
        ({"model": {"stride_frames": 16}}, ["model.stride_frames: 32 then, 16 now"]),
    ],
)
def test_each_input_that_differs_is_named_with_both_values(changed: dict, expected: list[str]) -> None:
    assert record(**changed).differences(stored(record())) == expected


def test_keys_that_change_no_result_may_differ() -> None:
    free: dict[str, Any] = {
        "run": {"dir": "elsewhere", "seed": 4, "device": "cpu"},
        "data": {"workers": 3, "flip": 0.0, "holdout": 0.2},
        "evaluate": {"batch": 2, "failed": "exclude", "temporal_views": 4},
        "label": {"none_right": "exclude"},
    }
    assert record(**free).differences(stored(record())) == []


def test_what_a_record_of_an_older_version_lacks_is_not_compared() -> None:
    assert record().differences({}) == []
    assert record().differences({"manifest": "m1", "settings": None}) == []
    assert record(None, None).differences(stored(record("m2", "w2"))) == []
    assert record(manifest="m2").differences({"manifest": "m1"}) == ["the manifest: 'm1' then, 'm2' now"]


def test_a_key_newer_than_the_record_counts_as_its_default() -> None:
    older = stored(record())
    del older["settings"]["data"]["interpolation"]
    assert record().differences(older) == []
    assert record(data={"interpolation": "bicubic"}).differences(older) == [
        "data.interpolation: 'bilinear' then, 'bicubic' now"
    ]


def test_the_order_of_points_is_no_difference() -> None:
    ours = {"points": ["14", "10"], "width": 4}
    assert different_settings(CONFIG.model, ours, {"points": ["10", "14"], "width": 4}) == []
    assert different_settings(CONFIG.model, ours, {"points": ["14"], "width": 4}) == [("points", ["14"], ["14", "10"])]
