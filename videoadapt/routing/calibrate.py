"""Calibration: chooses a policy with a promise, on clips that neither model, assigner nor threshold was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.load import Config
from videoadapt.config.sections import CalibrateConfig
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.errors import ConfigError, UserError, plural
from videoadapt.model.checkpoint import weights_digest
from videoadapt.routing.assigner import assigner_checkpoints
from videoadapt.routing.calibrate_policies import ROUNDING, Totals, best, measure, run_tests
from videoadapt.routing.candidates import Order, delta_of_orders, known_clips, orders_of
from videoadapt.routing.decide import views_run
from videoadapt.routing.label import say_other_mix
from videoadapt.routing.label_rules import Bools, Choice, Floats
from videoadapt.routing.learn_then_test import loss_upper, mean_upper, provable_loss, videos_needed
from videoadapt.routing.policy import Assigned, Fixed, Leap, Policy, needs_assigner
from videoadapt.routing.policy_file import OF_RUN, PolicyFile
from videoadapt.routing.replay import StoredAnswers
from videoadapt.routing.scores import Scores, inference_model, score_split, trained_checkpoint
from videoadapt.routing.threshold import have_several
from videoadapt.runtime.console import percent, say
from videoadapt.runtime.files import read_json, write_json
from videoadapt.runtime.inputs import Inputs
from videoadapt.runtime.lease import sole_writer
from videoadapt.runtime.ranks import broadcast_result, ranks
from videoadapt.runtime.results import Result, ShardResult, Table
from videoadapt.training.exchange import broadcast_checkpoint
from videoadapt.training.trained_clips import require_unseen


@dataclass(frozen=True)
class CurvePoint:
    """One policy of the accuracy-cost curve. Costs are fractions of the costliest point's.

    `cost_upper` and `loss_upper` hold for one policy that was named beforehand; `valid` holds for all together.
    """

    policy: str
    order: str
    accuracy: float
    cost: float  # mean of the videos
    cost_upper: float  # with confidence 1 - delta
    loss: float  # fraction of the videos on which the costliest point is right and the policy wrong
    loss_upper: float  # with confidence 1 - delta
    p_value: float  # of the hypothesis that the policy breaks the promise
    valid: bool


@dataclass(frozen=True, repr=False)
class CalibrateSummary(Result):
    """The contents of `calibrate.json`; the names are its keys."""

    promise: str  # in words
    eps: float
    delta: float
    max_cost: float | None  # `calibrate.cost`
    videos: int
    sources: int | None  # the units of the promise, if several videos are of one source; None: the videos are
    failed: list[dict[str, str]]  # path and cause
    costliest: str
    costliest_accuracy: float
    chosen: str | None  # the cheapest policy that keeps the promise (with `calibrate.cost`, the most accurate one)
    best_fixed: str  # the cheapest fixed point that is valid; empty if there is none
    # About how many units a first saving needs; None if it is there, if no number suffices, or with `max_cost`.
    needed: int | None
    ms_estimate: dict[str, float] | None  # of a clip, chosen and costliest; None before the first evaluation
    orders: dict[str, float]  # the part of delta of each order
    ordered_by: str  # what the orders come from
    manifest: str
    model: str  # digest of the weights
    inputs: dict[str, Any]  # what the result depends on, by `Inputs.to_json`
    curve: list[CurvePoint]

    def point(self, name: str | None) -> CurvePoint | None:
        """Returns the point of the curve with this policy."""
        return next((each for each in self.curve if each.policy == name), None)

    def table(self) -> Table:
        """Returns the chosen policy beside the fixed points."""
        shown = [self.point(self.chosen)] + [each for each in self.curve if each.policy.startswith("fixed:")]
        rows = [
            (
                each.policy + (" (chosen)" if each.policy == self.chosen else ""),
                percent(each.accuracy),
                f"{percent(each.loss)} (at most {percent(each.loss_upper)})",
                f"{percent(each.cost)} (at most {percent(each.cost_upper)})",
                "yes" if each.valid else "no",
            )
            for each in dict.fromkeys(filter(None, shown))
        ]
        columns = ("policy", "top-1 %", "loss %", "cost % of the costliest point", "keeps the promise")
        return Table(f"{self.promise}; {self.population}", columns, rows)

    @property
    def population(self) -> str:
        """The videos of the calibration in words."""
        sources = f", from {plural(self.sources, 'source')}" if self.sources is not None else ""
        return f"{plural(self.videos, 'video')} of the split calibrate{sources}"


def calibrate(config: Config) -> CalibrateSummary | ShardResult:
    """Chooses the cheapest policy that keeps a promise, with confidence 1 - `calibrate.delta`.

    The promise is that the policy loses at most `calibrate.eps` of accuracy against the costliest point or, with
    `calibrate.cost`, that a video costs at most this fraction of the costliest point's cost on average. It holds for
    videos that are drawn as the split `calibrate` is.

    Writes `calibrate.json` and, if a policy was found, `policy.json` into `calibrate/` of the run folder. A shard
    (`parallel.shard`) only scores its videos.

    Args:
        config: The run's config.

    Returns:
        The contents of `calibrate.json`, or the name of the shard. That no policy is found is a result, too.

    Raises:
        ConfigError: `data.calibrate` is 0.
        UserError: No video of the split can be read, or something was fitted to some of them.
        CheckpointError: There is no model, or the run's assigner does not fit it.
    """
    if not config.data.calibrate:
        raise ConfigError(
            "data.calibrate: 0 leaves no video for a calibration; set it before `train`, for example data.calibrate=0.1"
        )
    if len(config.model.points) == 1:
        raise UserError("calibrate: the model has one point only, so there is nothing to choose; see model.points")
    with ranks(config), sole_writer(config, "calibrate") as guard:
        checkpoint = broadcast_checkpoint(lambda: trained_checkpoint(config))
        model = inference_model(config, checkpoint)
        assigned = Assigned.for_model(config.run.dir, model, config.assign)
        manifest = broadcast_result(lambda: load_or_index(config))
        require_unseen(checkpoint, manifest, config)
        fitted = assigner_checkpoints(config.run.dir).latest() if assigned is not None else None
        if fitted is not None:
            require_unseen(fitted, manifest, config)
        scored = score_split(model, manifest, "calibrate", config, name="calibrate", assigned=assigned)
        if scored is None:
            return ShardResult(str(config.parallel.shard))

        def write() -> CalibrateSummary:
            scores = scored.load("data.calibrate")
            say_other_mix(scores.rows, manifest, "the promise is about videos like these")
            known, ordered_by = known_clips(config, manifest, model, assigned)
            views = config.evaluate.views
            sources = _sources(scores, manifest)
            units = len(scores.rows) // scores.clips_per_video if sources is None else int(sources.max()) + 1
            # The order with the best prediction gets half of delta.
            provable = provable_loss(units, config.calibrate.eps, config.calibrate.delta / 2)
            orders = orders_of(config.model, assigned, known, provable=provable, views=views)
            found = _chosen(scores, sources, orders, ordered_by, manifest, config)
            with guard():
                _write(found, orders, assigned, config)
            return found

        return broadcast_result(write)


def _sources(scores: Scores, manifest: Manifest) -> Choice | None:
    """Returns the number of each video's source, `(videos,)`; None if no two videos are of one source."""
    numbers: Choice = pd.factorize(manifest.sources[scores.rows[:: scores.clips_per_video]])[0]
    return numbers if have_several(numbers) else None


def _chosen(  # noqa: PLR0913, PLR0917 - what a calibration has
    scores: Scores,
    sources: Choice | None,
    orders: list[Order],
    ordered_by: str,
    manifest: Manifest,
    config: Config,
) -> CalibrateSummary:
    settings, points = config.calibrate, config.model.points
    # Fixed points stand at the end, for the curve: not all of them are in an order.
    policies = list(dict.fromkeys([*(p for order in orders for p in order.policies), *map(Fixed, points)]))
    measured = measure(scores, policies, config)
    totals = (measured if sources is None else measured.by_source(sources)).totals()
    deltas = delta_of_orders(orders, settings.delta)
    p_values, valid = run_tests(totals, policies, orders, deltas, settings)
    curve = _curve(totals, policies, orders, p_values, valid, settings.delta)
    chosen = best(valid, totals, settings)
    fixed = [each for each in curve if each.policy.startswith("fixed:") and each.valid]
    needed = [
        _needed(order, delta, policies, totals, settings.eps) for order, delta in zip(orders, deltas, strict=True)
    ]
    return CalibrateSummary(
        promise=promise_of(settings, sources),
        eps=settings.eps,
        delta=settings.delta,
        max_cost=settings.cost,
        videos=len(scores.rows) // scores.clips_per_video,
        sources=None if sources is None else totals.units,
        failed=[{"path": str(failure.path), "cause": failure.cause} for failure in scores.failures],
        costliest=points[0],
        costliest_accuracy=float(totals.accuracies[policies.index(Fixed(points[0]))]),
        chosen=None if chosen is None else policies[chosen].name,
        best_fixed=min(fixed, key=lambda each: each.cost).policy if fixed else "",
        needed=min(filter(None, needed), default=None) if chosen is None and settings.cost is None else None,
        ms_estimate=_milliseconds([Fixed(points[0]), *([] if chosen is None else [policies[chosen]])], scores, config),
        orders={order.name: delta for order, delta in zip(orders, deltas, strict=True)},
        ordered_by=ordered_by,
        manifest=manifest.hash,
        model=scores.model,
        inputs=Inputs.of(config, manifest.hash, scores.model, "run", "data", "model", "evaluate").to_json(),
        curve=curve,
    )


def _curve(  # noqa: PLR0913, PLR0917 - columns of one table
    totals: Totals, policies: Sequence[Policy], orders: Sequence[Order], p_values: Floats, valid: Bools, delta: float
) -> list[CurvePoint]:
    of_order = {policy: order.name for order in reversed(orders) for policy in order.policies}
    units, losses = totals.units, totals.losses / totals.units
    exact = totals.whole
    uppers = loss_upper(totals.losses, units, delta) if exact else [mean_upper(x, 1.0, units, delta) for x in losses]
    found = []
    for number, policy in enumerate(policies):
        cost, most = float(totals.costs[number]), float(totals.most[number])
        known = isinstance(policy, Fixed)  # its cost is the same for every video
        costliest = known and cost >= 1 - ROUNDING
        point = CurvePoint(
            policy=policy.name,
            order=of_order.get(policy, "fixed points"),
            accuracy=float(totals.accuracies[number]),
            cost=cost,
            cost_upper=cost if known else mean_upper(cost, most, units, delta),
            loss=float(losses[number]),
            loss_upper=0.0 if costliest else float(uppers[number]),
            p_value=float(p_values[number]),
            valid=bool(valid[number]),
        )
        found.append(point)
    return found


def _milliseconds(policies: Sequence[Policy], scores: Scores, config: Config) -> dict[str, float] | None:
    """Estimates the milliseconds of a clip by policy; None before the first evaluation, or if it measured no speed.

    The speeds of the fixed points are read from the evaluation's file. The assigner is left out. Batches, the load of
    the machine and other clips change it, so it is an estimate.
    """
    path = config.run.dir / "evaluate" / "evaluate.json"
    try:
        speeds = (read_json(path, "run `evaluate` again").get("speed") or {}).get("clips_per_s", {})
        of_point = [1000 / speeds[Fixed(point).name] for point in config.model.points]  # all crops of a clip
    except (UserError, KeyError):  # there is no evaluation, or it measured no speed
        return None
    stored, crops = StoredAnswers(scores, config), config.evaluate.spatial_crops
    found = {}
    for policy in policies:
        views = views_run(
            policy, stored.decide(policy), len(of_point), clips=scores.clips_per_video, crops=crops
        )  # (clips, points)
        found[policy.name] = float(views.mean(0) @ np.array(of_point) / crops)
    return found


def _needed(order: Order, delta: float, policies: Sequence[Policy], totals: Totals, eps: float) -> int | None:
    """Returns about how many videos prove the first policy of an order that saves anything; None if no more do."""
    numbers = [policies.index(policy) for policy in order.policies]
    saving = next((number for number in numbers if totals.costs[number] < 1 - ROUNDING), None)
    if saving is None:
        return None
    needed = videos_needed(float(totals.losses[saving] / totals.units), eps, delta)
    return needed if needed is not None and needed > totals.units else None


def promise_of(settings: CalibrateConfig, sources: Choice | None) -> str:
    """Returns the promise in words. Where sources have several videos, each source counts alike."""
    alike = ", of sources, which count alike" if sources is not None else ""
    confidence = f"with confidence {percent(1 - settings.delta)} %{alike}"
    if settings.cost is not None:
        return f"mean MACs of a video at most {percent(settings.cost)} % of the costliest point's, {confidence}"
    return f"at most {100 * settings.eps:g} points of accuracy lost against the costliest point, {confidence}"


def _write(found: CalibrateSummary, orders: list[Order], assigned: Assigned | None, config: Config) -> None:
    file = config.run.dir / OF_RUN
    file.unlink(missing_ok=True)  # of an earlier promise
    if found.chosen is not None:
        fitted = assigned.assigner if assigned is not None and needs_assigner(found.chosen) else None
        tested = {policy.name: policy for order in orders for policy in order.policies}
        chosen = tested[found.chosen]
        PolicyFile(
            policy=found.chosen,
            promise=found.promise,
            weights=found.model,
            assigner=None if fitted is None else weights_digest(fitted),
            manifest=found.manifest,
            videos=found.videos,
            temporal_views=config.evaluate.temporal_views,
            inputs=found.inputs,
            leap=chosen.to_json() if isinstance(chosen, Leap) else None,
        ).write(file)
    write_json(file.with_name("calibrate.json"), asdict(found))
    if found.chosen is not None:
        say(f"policy: {file}; `evaluate` reports it; in `videoadapt predict {config.run.dir} ...` use --policy {file}")
