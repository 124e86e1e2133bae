"""Run folders as `evaluate` leaves them, with simulated answers: as many clips and classes as a test wants."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from videoadapt.config.cost import point_macs
from videoadapt.config.load import Config, make_config
from videoadapt.data.index.manifest import SCHEMA, Manifest, manifest_path
from videoadapt.evaluation.outcomes import Outcome, Population, policy_rows
from videoadapt.evaluation.result_tables import write_tables
from videoadapt.routing.policy import Evidence, Fixed, OnePointPolicy
from videoadapt.routing.scores import Scores
from videoadapt.runtime.files import write_json
from videoadapt.runtime.run_config import record_config

POINTS = ("8", "8@0.5", "4")
EASY = (0.02, 0.15, 0.35, 0.48)  # of the clips: no point right, only the costliest, the middle one too, all
ASSIGNER_MACS = 1_000_000


class Chosen(OnePointPolicy):
    """A policy whose points are known: the simulation has no network to ask."""

    def __init__(self, name: str, choice: np.ndarray, imitates: str | None = None) -> None:
        self._name, self.choice, self.imitates = name, choice, imitates
        needs: dict[str, frozenset[Any]] = {"random": frozenset({"population"}), "oracle": frozenset({"truth"})}
        self.needs = needs.get(name, frozenset())

    @property
    def name(self) -> str:
        return self._name

    def choose(self, evidence: Evidence) -> np.ndarray:
        return self.choice


def simulate(
    folder: Path,
    *,
    videos: int = 200,
    classes: Sequence[str] = ("running", "jumping", "standing"),
    clips: int = 1,
    assigner: bool = True,
    skill: float = 2.0,
    failed: int = 0,
    data: Path | None = None,
    seed: int = 1,
) -> Config:
    """Writes a run folder: config, manifest, index, evaluation, training.

    Args:
        folder: The run folder.
        videos: Listed videos of the split val.
        classes: Names of the classes.
        clips: Of each video.
        assigner: Whether the run has one.
        skill: How much the assigner knows; 0 is nothing.
        failed: Videos that cannot be read.
        data: A folder with `val/00000.mp4` and so on; without it, no file exists.
        seed: Of all draws.
    """
    rng = np.random.default_rng(seed)
    model: dict[str, Any] = {
        "width": 64,
        "depth": 2,
        "heads": 4,
        "patch": 8,
        "size": 64,
        "num_frames": 4,
        "stride_frames": 2,
    }
    model |= {"fps": None, "num_classes": len(classes), "points": list(POINTS), "drop_blocks": [1]}
    config = make_config(
        {
            "run": {"dir": str(folder), "device": "cpu"},
            "data": {"root": str(data or folder), "workers": 0},
            "model": model,
            "evaluate": {"temporal_views": clips, "spatial_crops": 1},
        }
    )
    record_config(config)
    names = [f"val/{number:05d}.mp4" for number in range(videos)]
    truth = rng.integers(0, len(classes), videos)
    manifest = _manifest(names, truth, classes, data or folder, failed)
    manifest.save(manifest_path(folder))
    scored = np.arange(failed, videos)
    level = rng.choice(4, p=EASY, size=len(scored))  # how many points are right
    right = np.arange(3)[None, :] < level[:, None]  # (scored, points): the costliest is right first
    rows = np.repeat(scored, clips)
    clip_right = np.repeat(right, clips, axis=0)
    said = rng.normal(size=clip_right.shape) + skill * np.eye(3)[np.clip(np.repeat(level, clips) - 1, 0, 2)]
    p = np.exp(said) / np.exp(said).sum(1, keepdims=True)
    scores = Scores(
        rows=rows,
        clips=np.tile(np.arange(clips), len(scored)),
        starts_s=np.zeros(len(rows)),
        truth=truth[rows],
        right=clip_right,
        confidence={},
        assigned=p if assigner else None,
        draws=rng.random(len(rows)),
        failures=[],
        model="0" * 12,
        files=[],
    )
    choice, count = p.argmax(1), len(rows)
    oracle = np.where(clip_right.any(1), 2 - clip_right[:, ::-1].argmax(1), 2)
    policies: list[tuple[OnePointPolicy, np.ndarray]]
    policies = [(Fixed(point), np.full(count, number)) for number, point in enumerate(POINTS)]
    if assigner:
        shuffled = rng.permutation(choice)
        policies += [(Chosen("assigned", choice), choice), (Chosen("random", shuffled, "assigned"), shuffled)]
    policies.append((Chosen("oracle", oracle), oracle))
    population = Population(
        names, truth, np.arange(videos), tuple(classes), scored, [{"path": n, "cause": "torn"} for n in names[:failed]]
    )
    outcomes = [_outcome(policy, ran, right, truth[scored], clips, config=config, rng=rng) for policy, ran in policies]
    speeds = {o.policy.name: 5e9 / (o.macs.mean() + 2e6) for o in outcomes}
    table = policy_rows(outcomes, population, speeds, config)
    write_tables(config, scores, population, outcomes)
    (folder / "evaluate" / "views.parquet").unlink()  # empty: the simulation has no logits
    digest = "0" * 12
    summary = {
        "split": "val",
        "manifest": manifest.hash,
        "files": digest,
        "model": digest,
        "trained_on": 0,
    }
    summary |= {"listed": videos, "scored": len(scored), "failed": population.failed, "failed_count_as": "wrong"}
    summary |= {"largest_class": classes[0], "largest_class_fraction": 1 / len(classes), "date": "2026-11-27"}
    summary |= {"views": f"{clips} clip x 1 crop", "macs_per_view": point_macs(config.model), "speed": None}
    summary |= {"policies": {name: row.to_json() for name, row in table.items()}}
    summary |= {"stages": {"score": 90.0, "speed": 12.0}, "seconds": 105.0}
    write_json(folder / "evaluate" / "evaluate.json", json.loads(json.dumps(summary)))
    _write_training(folder, rng)
    return config


def add_speed(folder: Path) -> None:
    """Adds the measurements of `speed.policies` to the evaluation of a run."""
    path = folder / "evaluate" / "evaluate.json"
    summary = json.loads(path.read_text())
    dear, measured = next(iter(summary["policies"].values())), {}
    for name, row in summary["policies"].items():
        faster, ratio = row["clips_per_s"] / dear["clips_per_s"], dear["macs_per_clip"] / row["macs_per_clip"]
        model_s = 1 / row["clips_per_s"]
        measured[name] = {
            "clips_per_s": row["clips_per_s"],
            "speedup": [faster, 0.97 * faster, 1.03 * faster],
            "routed_efficiency": [faster / ratio, 0.97 * faster / ratio, 1.03 * faster / ratio],
            "end_to_end_efficiency": [faster / ratio / 2, 0.4 * faster / ratio, 0.6 * faster / ratio],
            "joules_per_clip": None if name == "oracle" else 40 * model_s,
            "p50_ms": 1300 * model_s,
            "p95_ms": 2100 * model_s,
            "stages_s": {"decode": 0.004, "preprocess": 0.001, "transfer": 0.0, "assign": 0.0005, "model": model_s},
            "stages_cpu_s": {"decode": 0.003, "preprocess": 0.002, "route": 0.0001, "model": 2 * model_s},
        }
    summary["speed"] = {"policies": measured, "clips": 256, "rounds": 7, "measured": {"device": "a CPU", "threads": 2}}
    path.write_text(json.dumps(summary))


def add_calibration(folder: Path) -> None:
    """Adds the result of `calibrate` to a run: one valid policy of three."""
    costs = {"fixed:8": (1.0, 0.0, 0.0), "assigned@0.2": (0.6, 0.004, 0.01), "assigned@0.9": (0.3, 0.05, 0.08)}
    curve = [
        {"policy": name, "cost": cost, "cost_upper": cost, "loss": loss, "loss_upper": upper, "valid": loss == 0.004}
        for name, (cost, loss, upper) in costs.items()
    ]
    found = {"eps": 0.01, "delta": 0.1, "videos": 300, "chosen": "assigned@0.2", "needed": 299, "curve": curve}
    write_json(folder / "calibrate" / "calibrate.json", found)


def _manifest(names: list[str], truth: np.ndarray, classes: Sequence[str], data: Path, failed: int) -> Manifest:
    table = pd.DataFrame({"video": names, "label": truth, "split": "val", "status": "ok", "cause": ""})
    table["path"] = [str(data / name) for name in names]
    table["bytes"] = [path.stat().st_size if (path := Path(text)).exists() else 0 for text in table["path"]]
    table.loc[: failed - 1, ["status", "cause"]] = ["broken", "torn"]
    blank = {"string": "", "int64": 0, "double": 0.0, "bool": False}
    for field in SCHEMA:
        if field.name not in table:
            table[field.name] = {"fps": 8.0, "width": 64, "height": 64, "frames": 8, "duration_s": 1.0}.get(
                field.name, blank.get(str(field.type), None)
            )
    return Manifest(table[SCHEMA.names], classes)


def _outcome(
    policy: OnePointPolicy,
    choice: np.ndarray,
    right: np.ndarray,
    truth: np.ndarray,
    clips: int,
    *,
    config: Config,
    rng: np.random.Generator,
) -> Outcome:
    classes = config.model.num_classes
    first = choice[::clips]
    answered = right[np.arange(len(truth)), first]
    # A wrong answer is one of two neighbours, as classes that look alike are.
    answers = np.where(answered, truth, (truth + rng.integers(1, 3, len(truth))) % classes)
    count = min(5, classes)
    best = (answers[:, None] + np.arange(count)) % classes
    costs = np.array(list(point_macs(config.model).values()), dtype=float)
    extra = ASSIGNER_MACS if policy.name == "assigned" else 0
    ran = (choice[:, None] == np.arange(len(POINTS))).astype(np.int64)
    return Outcome(policy, choice, best, np.full(best.shape, 1 / count), ran, costs[choice] + extra, extra)


def _write_training(folder: Path, rng: np.random.Generator) -> None:
    steps, epochs = 400, 5
    lines = []
    for step in range(1, steps + 1):
        line: dict[str, float] = {"step": step}
        for number, point in enumerate(POINTS):
            line[f"loss/{point}"] = 2.5 * np.exp(-step / 120) + 0.1 * number + 0.05 * rng.normal()
            line[f"top1/{point}"] = float(np.clip(1 - np.exp(-step / 130) - 0.05 * number + 0.03 * rng.normal(), 0, 1))
        lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    checks = [
        {"epoch": e, "step": 80 * e, "videos": 100, "read": 100}
        | {f"loss/{p}": 2.4 * np.exp(-e / 1.5) + 0.1 * n for n, p in enumerate(POINTS)}
        | {f"top1/{p}": 1 - np.exp(-e / 1.4) - 0.04 * n for n, p in enumerate(POINTS)}
        for e in range(1, epochs + 1)
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(check) + "\n" for check in checks))
    write_json(
        folder / "train.json", {"points": {p: {} for p in POINTS}, "steps": steps, "epochs": epochs, "seconds": 71}
    )
    split = {"listed": 200, "ok": 198, "missing": 1, "broken": 1, "hours": 0.06}
    write_json(folder / "index.json", {"manifest": "0" * 12, "classes": 3, "splits": {"train": split, "val": split}})
