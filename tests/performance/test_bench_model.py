"""`bench model`: every case of our model and of its peer, with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from videoadapt.config.load import make_config
from videoadapt.errors import ConfigError
from videoadapt.performance.bench.model import bench_model
from videoadapt.performance.bench.peers import peer_of

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "patch": 4, "size": 16, "num_classes": 5}
MODELS: dict[str, dict[str, Any]] = {
    "Hugging Face": {"num_frames": 2, "points": ["4", "2"]},
    "timm": {"num_frames": 1, "temporal": False, "points": ["4", "4@0.5"], "drop_blocks": [1]},
}


@pytest.mark.parametrize("peer", MODELS)
def test_our_model_and_its_peer_are_measured_with_the_same_weights(peer: str, tmp_path: Path) -> None:
    config = make_config(
        {"model": SIZES | MODELS[peer] | {"drop_path": 0.1}, "assign": {"frames": 1}, "run": {"device": "cpu"}}
    )
    result = bench_model(config, ["rounds=2", "batches=[2]", f"dir={tmp_path}"])
    assert result["difference"][peer] < 1e-5
    points = config.model.points
    assert [(row["precision"], row["kind"], row["model"], row["point"]) for row in result["rows"]] == [
        (precision, kind, model, point)
        for precision in ("fp32", "bf16")
        for model, measured in {"ours": points, peer: points[:1]}.items()
        for kind in ("forward", "step")
        for point in measured
    ]
    for row in result["rows"]:
        median, low, high = row["seconds"]
        assert 0 < low <= median <= high
        assert row["clips_per_s"] == pytest.approx(2 / median)
        assert (row["speed"] is not None) == (row["model"] == "ours" and row["point"] == "4")
    assert result["config"]["model"]["drop_path"] == 0  # as in the peer
    assert json.loads((tmp_path / "model.json").read_text()) == result


def test_a_model_without_a_peer_is_measured_alone(tmp_path: Path) -> None:
    model = SIZES | {"num_frames": 1, "temporal": False, "embed": "stem", "points": ["4"]}
    config = make_config({"model": model, "assign": {"frames": 1}, "run": {"device": "cpu"}})
    assert not peer_of(config.model)
    assert not peer_of(config.model.model_copy(update={"temporal": True}))
    result = bench_model(
        config, ["rounds=1", "batches=[1]", "precisions=[fp32]", "passes=[forward]", f"dir={tmp_path}"]
    )
    assert [row["model"] for row in result["rows"]] == ["ours"]
    with pytest.raises(ConfigError, match="bench model: unknown key batch; did you mean batches"):
        bench_model(config, ["batch=1"])
