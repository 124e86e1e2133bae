"""Simulates calibrations on a recorded table of outcomes: `python tools/simulate_calibration.py FILE [key=value ...]`.

Each simulation draws videos from the table, with replacement, and calibrates on them. The true loss and cost of a
policy are those of the whole table, so that it is known whether a promise was kept. For each `eps`, calibrations have
the number of videos that `videos_needed` names, and three times as many. Costs are those of `configs/demo.yaml`;
`section.key=value` overrides it where the table is of another model.

`python tools/simulate_calibration.py record RUN FILE` records the table of an evaluated run: where the model is right
at each point, its confidences, and the assigner's probabilities, on the clips of the label table (which fix the orders)
and on the videos of the split val (from which calibrations draw).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from one_line_failures import one_line_failures
from videoadapt.config.cascade import MEASURES
from videoadapt.config.load import Config, load_config
from videoadapt.config.sections import CalibrateConfig
from videoadapt.data.index.manifest import load_or_index
from videoadapt.errors import UserError
from videoadapt.routing.assigner import Assigner
from videoadapt.routing.calibrate_policies import Measured, best, measure, run_tests
from videoadapt.routing.candidates import KnownClips, Order, delta_of_orders, known_clips, orders_of
from videoadapt.routing.learn_then_test import provable_loss, videos_needed
from videoadapt.routing.policy import Assigned, Fixed, Policy
from videoadapt.routing.scores import Scored, Scores, inference_model, score_split
from videoadapt.runtime.console import percent, print_table
from videoadapt.runtime.files import write_parquet

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"  # of the recorded table: points, and what they cost
MORE = 3  # times the needed videos, with which a calibration must succeed
_STORED: dict[str, type] = {"right": bool, "assigned": np.float32, **{name: np.float32 for name in MEASURES}}


@dataclass(frozen=True)
class Settings:
    """The settings of a simulation. The names are the keys of the command line."""

    eps: tuple[float, ...] = (0.005, 0.01, 0.02)
    delta: float = 0.1
    draws: int = 1000
    seed: int = 0

    @classmethod
    def parse(cls, words: Sequence[str]) -> Settings:
        """Parses `key=value`; several values of `eps` are separated by commas."""
        given: dict[str, object] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key not in cls.__dataclass_fields__:
                raise UserError(f"{word!r}: expected eps=0.01,0.02, delta=0.1, draws=1000 or seed=0")
            try:
                given[key] = tuple(map(float, value.split(","))) if key == "eps" else type(getattr(cls, key))(value)
            except ValueError:
                raise UserError(f"{word!r}: expected a number") from None
        return cls(**given)  # type: ignore[arg-type]


class RecordedScores(Scores):
    """Scores of one view a video, whose logits say which class the model chooses."""

    def shards(self) -> Iterator[Scored]:
        """Yields all videos: class 0 is the truth."""
        logits = np.where(self.right[..., None], [1.0, 0.0], [0.0, 1.0])[:, None]  # (videos, 1, points, 2)
        yield Scored(self.rows, self.clips, self.truth, logits)


class Simulated(NamedTuple):
    """The outcome of many calibrations with one `eps` and one number of videos."""

    eps: float
    videos: int
    broken: float  # fraction of the calibrations whose policy truly loses more than eps
    untested: float  # the same, if the cheapest policy that loses at most eps on the drawn videos is taken
    found: float  # fraction of the calibrations that found a policy cheaper than the costliest point
    saved: float  # mean true saving, 0 where none was found
    possible: float  # the saving of the best policy, if all losses were known
    best_fixed: float  # the saving of the cheapest fixed point that keeps the promise


def record(run: str, file: Path) -> None:
    """Writes the table of an evaluated run; the scores of the run are read, and nothing is computed again."""
    config = load_config(run)
    model, manifest = inference_model(config), load_or_index(config)
    assigned = Assigned.for_model(config.run.dir, model, config.assign)
    known, _ = known_clips(config, manifest, model, assigned)
    files = score_split(model, manifest, "val", config, name="evaluate", assigned=assigned)
    assert files is not None, "this is no shard"
    scores = files.load("data.val.annotations")
    if known is None or known.assigned is None or known.right_assigned is None or scores.draws is None:
        raise UserError(f"{run}: needs labels, an assigner and an evaluation, all of this version")
    parts = [
        _frame("label", {"right": known.right, **known.confidence}, config),
        _frame("selecting", {"right": known.right_assigned, "assigned": known.assigned}, config),
        _frame("val", {"right": scores.right, **scores.confidence, "assigned": scores.assigned}, config),
    ]
    parts[-1]["draw"] = scores.draws
    write_parquet(file, pd.concat(parts, ignore_index=True))


def _frame(part: str, arrays: dict, config: Config) -> pd.DataFrame:
    columns = {
        f"{name}_{point}": values[:, number].astype(_STORED[name])
        for name, values in arrays.items()
        for number, point in enumerate(config.model.points)
    }
    return pd.DataFrame({"part": part, **columns})


def read(file: Path, config: Config) -> tuple[Scores, KnownClips]:
    """Returns the videos of a recorded table as scores, and the clips of its label table."""
    table = pd.read_parquet(file)

    def matrix(part: str, name: str) -> np.ndarray:
        rows = table.loc[table["part"] == part, [f"{name}_{point}" for point in config.model.points]]
        return rows.to_numpy(bool if name == "right" else np.float64)

    right = matrix("val", "right")
    scores = RecordedScores(
        rows=np.arange(len(right)),
        clips=np.zeros(len(right), np.int64),
        starts_s=np.zeros(len(right)),
        truth=np.zeros(len(right), np.int64),
        right=right,
        confidence={name: matrix("val", name) for name in MEASURES},
        assigned=matrix("val", "assigned"),
        draws=table.loc[table["part"] == "val", "draw"].to_numpy(np.float64),
        failures=[],
        model="",
        files=[],
    )
    confidence = {name: matrix("label", name) for name in MEASURES}
    known = KnownClips(
        matrix("label", "right"), confidence, matrix("selecting", "assigned"), matrix("selecting", "right")
    )
    return scores, known


def simulate(file: Path, settings: Settings, overrides: Sequence[str] = ()) -> Iterator[Simulated]:
    """Yields the outcome for each eps, with the needed videos and with more."""
    config = load_config(CONFIG, overrides)
    scores, known = read(file, config)
    assigned = Assigned(Assigner(config.assign, len(config.model.points)).eval(), config.model.points)
    for eps in settings.eps:
        needed = videos_needed(0.0, eps, settings.delta / 2)  # the part of the best order
        assert needed is not None, "a policy that loses nothing can be proven"
        for videos in (needed, MORE * needed):
            provable = provable_loss(videos, eps, settings.delta / 2)
            orders = orders_of(config.model, assigned, known, provable=provable, views=1)
            policies: list[Policy] = list(
                dict.fromkeys([*(p for order in orders for p in order.policies), *map(Fixed, config.model.points)])
            )
            measured = measure(scores, policies, config)
            deltas = delta_of_orders(orders, settings.delta)
            promise = CalibrateConfig(eps=eps, delta=settings.delta)
            yield _simulate(measured, policies, orders, deltas, promise, videos=videos, settings=settings)


def _simulate(  # noqa: PLR0913, PLR0917 - what one calibration has
    measured: Measured,
    policies: list[Policy],
    orders: list[Order],
    deltas: list[float],
    promise: CalibrateConfig,
    *,
    videos: int,
    settings: Settings,
) -> Simulated:
    count = measured.cost.shape[1]
    loss, cost = measured.lost.mean(1), measured.cost.mean(1)
    rng = np.random.default_rng(settings.seed)
    chosen, untested = [], []
    for _ in range(settings.draws):
        drawn = measured.totals(np.bincount(rng.integers(0, count, videos), minlength=count))
        _, valid = run_tests(drawn, policies, orders, deltas, promise)
        chosen.append(best(valid, drawn, promise))
        untested.append(best(drawn.losses <= promise.eps * drawn.units, drawn, promise))
    found = np.array([number for number in chosen if number is not None], dtype=np.int64)
    fixed = np.array([isinstance(policy, Fixed) for policy in policies])
    keeps = loss <= promise.eps
    return Simulated(
        eps=promise.eps,
        videos=videos,
        broken=float((~keeps[found]).sum() / settings.draws),
        untested=sum(number is not None and not keeps[number] for number in untested) / settings.draws,
        found=len(found) / settings.draws,
        saved=float((1 - cost[found]).sum() / settings.draws),
        possible=float(1 - cost[keeps].min()),
        best_fixed=float(1 - cost[keeps & fixed].min()),
    )


def main(words: Sequence[str]) -> None:
    """Runs the command of the module's docstring."""
    if len(words) < (3 if words[:1] == ["record"] else 1):
        raise UserError("expected TABLE [KEY=VALUE ...], or record RUN TABLE; the script's first lines show both")
    if words[:1] == ["record"]:
        record(words[1], Path(words[2]))
        return
    overrides = [word for word in words[1:] if "." in word.partition("=")[0]]
    settings = Settings.parse([word for word in words[1:] if word not in overrides])
    rows = [
        (
            f"{100 * row.eps:g}",
            row.videos,
            percent(row.broken),
            percent(row.untested),
            percent(row.found),
            percent(row.saved),
            percent(row.possible),
            percent(row.best_fixed),
        )
        for row in simulate(Path(words[0]), settings, overrides)
    ]
    figures = ("broken %", "without tests %", "found %", "saved %", "possible %", "best fixed %")
    columns = ("eps points", "videos", *figures)
    print_table(f"{settings.draws} calibrations each, delta {settings.delta:g}", columns, rows)


if __name__ == "__main__":
    with one_line_failures():
        main(sys.argv[1:])
