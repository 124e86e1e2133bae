"""Makes the HTML of the page and of each answer. Jinja2 escapes every text: names of files come from users."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from videoadapt.data.pictures import data_uri
from videoadapt.errors import plural
from videoadapt.evaluation.explain import Explanation, PointAnswer, ReadVideo, UnitChoice
from videoadapt.evaluation.predict import Predictor
from videoadapt.routing.policy import Assigned, Cascade
from videoadapt.runtime.console import macs


@dataclass(frozen=True)
class Answer:
    """One line of the response to a video.

    Attributes:
        state: `progress`; last `done` or `refused`.
        text: What the video waits for; the HTML of the answer; or the reason of the refusal.
    """

    state: Literal["progress", "done", "refused"]
    text: str


class ClipPictures(NamedTuple):
    """The pictures of a clip, JPEG files, with its start in seconds and its number from 1."""

    start_s: float
    number: int
    pictures: list[bytes]


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"macs": macs, "time": duration, "percent": percent, "plural": plural, "jpeg": data_uri}
    return environment


def page_html(predictor: Predictor) -> str:
    """Returns the page, without answers."""
    config = predictor.config
    return (
        _templates()
        .get_template("page.html")
        .render(
            run=config.run.dir.name or str(config.run.dir),
            model=config.model,
            policy=predictor.policy.name,
            device=str(predictor.model.head.weight.device),
            limits=config.serve,
            images=config.model.num_frames == 1,
        )
    )


def answer_html(explanation: Explanation, video: ReadVideo, predictor: Predictor) -> str:
    """Returns the answer to a video, as a part of the page."""
    costliest = explanation.answers[0]
    return (
        _templates()
        .get_template("answer.html")
        .render(
            explanation=explanation,
            prediction=explanation.prediction,
            answers=explanation.answers,
            costliest=costliest,
            slowest_s=max(explanation.seconds, *(answer.seconds for answer in explanation.answers)),
            verdict=_verdict(explanation, costliest),
            units=_with_pictures(explanation, video),
            clips=len(video.pictures),
            chosen=set(explanation.prediction.points),
            evidence_title=_evidence_title(predictor),
            info=video.info,
            views=video.views.shape[0] * video.views.shape[1],
            device=str(predictor.model.head.weight.device),
            bar=_bar,
        )
    )


def _with_pictures(explanation: Explanation, video: ReadVideo) -> list[tuple[UnitChoice, list[ClipPictures]]]:
    """Returns each choice with the clips that it is about."""
    pictures = enumerate(video.pictures, 1)
    return [(unit, [ClipPictures(start_s, *next(pictures)) for start_s in unit.starts_s]) for unit in explanation.units]


def _verdict(explanation: Explanation, costliest: PointAnswer) -> str:
    """Returns what the policy saved on this video, in a sentence."""
    cost = _ratio(explanation.prediction.macs / costliest.macs)
    times = f"{duration(explanation.seconds)} instead of {duration(costliest.seconds)}"
    return f"{cost} of the MACs of {costliest.point}, the costliest point, and {times}"


def _ratio(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction < 10 else f"{fraction:.1f} times"  # noqa: PLR2004


def _evidence_title(predictor: Predictor) -> str:
    """Returns the header of the number that the policy compares with a threshold; empty if it compares none."""
    if isinstance(predictor.policy, Assigned):
        return "this point or a cheaper one is right"
    return f"confidence ({predictor.policy.measure})" if isinstance(predictor.policy, Cascade) else ""


def _bar(value: float, mark: float | None = None, full: float = 1.0) -> dict[str, Any]:
    """Returns the numbers of a bar in a drawing of 100 x 8: its width, and the place of its mark."""
    width = 100 * value / full if full > 0 else 0.0
    shown = min(max(width, 0.0), 100.0) if width == width else 0.0  # NaN has no bar  # noqa: PLR0124
    return {"width": f"{shown:.2f}", "mark": None if mark is None or mark > full else f"{100 * mark / full:.2f}"}


def duration(seconds: float) -> str:
    """Formats a time of one video: `0.42 ms`, `12.3 ms`, `1.24 s`."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def percent(value: float) -> str:
    """Formats a probability: `93.1 %`, without a line break before the sign."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
