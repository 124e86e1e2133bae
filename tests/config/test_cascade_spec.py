"""The text of a cascade: which texts are parsed to what, and which are errors."""

from __future__ import annotations

import pytest

from videoadapt.config.cascade import CascadeSpec, parse_cascade_spec
from videoadapt.errors import ConfigError

KNOWN = ("14", "14@0.7", "10", "7")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("7,14:0.6", CascadeSpec(("7", "14"), (0.6,), None, "probability")),
        ("7,10,14:0.6", CascadeSpec(("7", "10", "14"), (0.6, 0.6), None, "probability")),  # one threshold for all
        ("7,10,14:0.6,.5:margin", CascadeSpec(("7", "10", "14"), (0.6, 0.5), None, "margin")),
        ("7,14:cost=0.4:entropy", CascadeSpec(("7", "14"), (), 0.4, "entropy")),
        ("14@0.70,14:1", CascadeSpec(("14@0.7", "14"), (1.0,), None, "probability")),  # another spelling of a point
        ("14,7:0", CascadeSpec(("14", "7"), (0.0,), None, "probability")),  # any order
        ("14:views:0.9", CascadeSpec(("14",), (0.9,), None, "probability", views=True)),
        ("7,14:views:0.8,.9:margin", CascadeSpec(("7", "14"), (0.8, 0.9), None, "margin", views=True)),
        ("7,14:views:0.8", CascadeSpec(("7", "14"), (0.8, 0.8), None, "probability", views=True)),
    ],
)
def test_a_text_is_parsed_to_points_thresholds_or_cost_and_measure(text: str, spec: CascadeSpec) -> None:
    assert parse_cascade_spec(text, KNOWN) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7,12:0.6", r"different points of this model \(14, 14@0\.7, 10, 7\)"),
        ("7,7:0.6", "different points"),
        ("7:0.6", "different points"),
        ("7,14", "expected POINT,POINT,...:THRESHOLDS"),
        ("7,14:", "expected POINT,POINT,...:THRESHOLDS"),
        ("7,14:1.1", "thresholds from 0 to 1"),
        ("7,14:-0.1", "thresholds from 0 to 1"),
        ("7,14:cost=", "or cost=0.4"),
        ("7,14:0.6:certainty", "a measure of probability, margin, entropy"),
        ("7,10,14:0.6,0.5,0.4", "expected 1 threshold or 2, got 3"),
        ("7,x:0.6", "point 'x': expected LENGTH"),
        ("14:views", "over views POINT,...:views:THRESHOLDS"),
        ("14:views:", "over views POINT,...:views:THRESHOLDS"),
        ("14,14:views:0.5", "different points"),
        ("7,14:views:0.5,0.6,0.7", "expected 1 threshold or 2, got 3"),
        ("14:views:cost=0.4", "no single views; give thresholds"),
    ],
)
def test_a_wrong_text_is_an_error_with_the_expected_form(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_cascade_spec(text, KNOWN)
