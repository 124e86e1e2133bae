"""The speed from files to logits, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from videoadapt.data.clips.datasets import Failure
from videoadapt.evaluation import speed_passes as module


@pytest.mark.parametrize(("decode_s", "model_s"), [(0.0, 2.0), (3.0, 0.0), (1.0, 2.0)])
def test_neither_the_start_of_workers_nor_the_videos_before_it_change_the_speed(
    decode_s: float, model_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, read = [0.0], []

    def stream(_: object, rows: Sequence[int]) -> Iterator[int]:
        now[0] += 100.0  # workers start
        for row in rows:
            now[0] += decode_s
            read.append(row)
            yield row

    def run(videos: Iterator[int]) -> Iterator[Any]:
        for video in videos:
            now[0] += model_s
            yield Failure(video, "a.mp4", "torn") if video == 5 else video

    monkeypatch.setattr(module, "stream", stream)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    bench: Any = SimpleNamespace(router=lambda _: SimpleNamespace(stream=run))
    videos: Any = SimpleNamespace(temporal_views=3)
    found = module._from_files(bench, None, videos, range(8), 2)  # type: ignore[arg-type]
    assert read == [0, 1, *range(8)]
    assert found == pytest.approx(3 * 7 / (8 * (decode_s + model_s)))  # one of the 8 could not be read
