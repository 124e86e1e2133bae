"""Shared decoding: each clip of a step is decoded once over all ranks, and nothing else changes."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs as runs
from rank_jobs import Ranks
from videoadapt.config.load import Config, dump_config
from videoadapt.data.clips.loader import steps_per_epoch
from videoadapt.data.clips.token_labels import SHAPE, label_map_file
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.model.checkpoint import train_checkpoints

LAYOUTS = {"2, 1": {"8": 2, "6+4": 1}, "1, 1, 1": {"8": 1, "6": 1, "4": 1}}
RANKS = 3
EPOCHS = 3


def prepared(folder: Path, groups: dict[str, int], **sections: dict[str, Any]) -> tuple[Config, Manifest]:
    """A config, in `folder` too, and its manifest; one of its videos has gone since."""
    config = runs.config(
        runs.make_data(folder / "data"),
        folder / "run",
        train={"batch": 12, "accumulate": 2, "epochs": EPOCHS, "save_steps": 1, "keep_checkpoints": 9},
        parallel={"groups": groups},
        **({"data": {"mixup": 0.4}} | sections),
    )
    (folder / "config.yaml").write_text(dump_config(config))
    manifest = load_or_index(config)
    readable = (manifest["split"] == "train") & (manifest["status"] == "ok")
    Path(manifest["path"][readable][0]).unlink()
    return config, manifest


def labelled(folder: Path, groups: dict[str, int]) -> tuple[Config, Manifest]:
    """The same with images and their label maps, of which one is missing and one is torn."""
    config, manifest = prepared(
        folder,
        groups,
        model={"num_frames": 1, "temporal": False, "time_init_std": 0.0, "dense_head": 0.25},
        assign={"frames": 1},
        data={"mixup": 0.0, "mix_token": 1.0, "flip": 0.5, "token_labels": str(folder / "maps")},
    )
    readable = (manifest["split"] == "train") & (manifest["status"] == "ok")
    files = [label_map_file(folder / "maps", path) for path in manifest["path"][readable]]
    for seed, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.randint(9, SHAPE, generator=torch.Generator().manual_seed(seed)).half(), file)
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:99])
    return config, manifest


LOADING = """
import pickle
from functools import partial
from videoadapt.config.load import load_config
from videoadapt.data.clips.datasets import TrainClips
from videoadapt.data.clips.loader import train_batches
from videoadapt.data.index.manifest import load_or_index
from videoadapt.training.exchange import ClipExchange
from videoadapt.training.groups import make_plan

config, decoded = load_config(folder / "config.yaml"), []
read = TrainClips.__getitem__
TrainClips.__getitem__ = lambda self, key: decoded.append(key) or read(self, key)
with ranks(config):
    manifest, plan = load_or_index(config), make_plan(config, world_size(), {})
    share = partial(plan.group(rank()).positions, rank(), pairs=True)
    held = {}
    for form in ("own", "shared"):
        exchange = ClipExchange(manifest, config, plan) if form == "shared" else None
        steps = list(train_batches(manifest, config, 1, positions=share, exchange=exchange))
        held[form] = steps, decoded.copy()
        decoded.clear()
    (folder / f"rank{rank()}.pickle").write_bytes(pickle.dumps(held))
"""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prepare", [prepared, labelled])
def test_ranks_get_the_same_clips_and_each_is_decoded_once(
    tmp_path: Path, layout: str, prepare: Callable[[Path, dict[str, int]], tuple[Config, Manifest]]
) -> None:
    """From the second step to the end, in parts, with a video that cannot be read."""
    config, manifest = prepare(tmp_path, LAYOUTS[layout])
    ended = Ranks(LOADING, tmp_path, RANKS).ended()
    assert [code for code, _ in ended.values()] == [0] * RANKS, ended
    held = [pickle.loads((tmp_path / f"rank{rank}.pickle").read_bytes()) for rank in range(RANKS)]
    failures = []
    for rank in held:
        own, shared = ([batch for step in rank[form][0] for batch in step] for form in ("own", "shared"))
        assert len(own) == len(shared) == 2 * (EPOCHS * steps_per_epoch(manifest, config) - 1)
        for one, other in zip(own, shared, strict=True):
            assert torch.equal(one.clips, other.clips)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.videos, other.videos)
            assert (one.positions, one.failures) == (other.positions, other.failures)
            assert (one.tokens is None) == (other.tokens is None) == (config.data.token_labels is None)
            assert all(map(torch.equal, one.tokens or (), other.tokens or ()))
            failures += other.failures
    causes = ["not found; it was moved"] + ([": No such file", ": torn"] if config.data.token_labels else [])
    assert len({failure.video for failure in failures}) == len(causes)
    assert all(any(cause in failure.cause for failure in failures) for cause in causes)
    decoded = {form: Counter(key for rank in held for key in rank[form][1]) for form in ("own", "shared")}
    assert set(decoded["own"].values()) == {len(LAYOUTS[layout])}
    assert decoded["shared"] == Counter(decoded["own"].keys())
    counts = [len(rank["shared"][1]) for rank in held]
    assert max(counts) == min(counts)  # 12 clips a step over 3 ranks


TRAINING = """
import os, signal
import videoadapt.training.train as training
from videoadapt.config.load import load_config

step = training.train_step

def stopped_once(state, role, batches):
    asked = folder / "asked"
    if state.config.parallel.decode == "shared" and state.step == 2 and rank() == 1 and not asked.exists():
        asked.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return step(state, role, batches)

training.train_step = stopped_once
for form in ("own", "shared"):
    config = load_config(folder / "config.yaml", [f"run.dir={folder / form}", f"parallel.decode={form}"])
    try:
        training.train(config)
    except KeyboardInterrupt:
        (folder / f"stopped{os.environ['SLURM_PROCID']}").touch()
        training.train(config)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_with_shared_decoding_that_was_stopped_equals_one_without_to_the_bit(tmp_path: Path, layout: str) -> None:
    config, manifest = prepared(tmp_path, LAYOUTS[layout], data={"mixup": 0.4, "workers": 1})
    for form in ("own", "shared"):  # as long as all videos were there
        (tmp_path / form).mkdir()
        for file in config.run.dir.iterdir():
            (tmp_path / form / file.name).write_bytes(file.read_bytes())
    ended = Ranks(TRAINING, tmp_path, RANKS).ended(timeout_s=280)
    assert [code for code, _ in ended.values()] == [0] * RANKS, ended
    assert len(list(tmp_path.glob("stopped*"))) == RANKS
    own, shared = (train_checkpoints(tmp_path / form).latest() for form in ("own", "shared"))
    assert own is not None and shared is not None  # noqa: PT018
    assert own.meta["step"] == shared.meta["step"] == EPOCHS * steps_per_epoch(manifest, config) >= 5
    assert own.meta["skipped"] == shared.meta["skipped"] > 0
    assert [name for name, tensor in own.tensors.items() if not torch.equal(tensor, shared.tensors[name])] == []
    assert (tmp_path / "own/skipped.jsonl").read_text() == (tmp_path / "shared/skipped.jsonl").read_text()


FAILING = """
import os, signal
import videoadapt.training.train as training
from torch.utils.data import get_worker_info
from videoadapt.config.load import load_config
from videoadapt.data.clips.datasets import TrainClips

read, count = TrainClips.__getitem__, 0

def failing(self, key):
    global count
    count += get_worker_info() is not None  # not those of the preflight
    if count == 10 and os.environ["SLURM_PROCID"] == "1":
        os.kill({victim}, signal.SIGKILL)
    return read(self, key)

TrainClips.__getitem__ = failing
training.train(load_config(folder / "config.yaml", ["parallel.decode=shared"]))
"""


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("os.getpid()", "RunError: reading videos failed: DataLoader worker"),
        ("os.getppid()", "RunError: rank 1 of 3 died or hangs; a collective operation of the other ranks failed"),
    ],
)
def test_a_rank_whose_reading_fails_ends_all_with_one_message(tmp_path: Path, victim: str, message: str) -> None:
    prepared(tmp_path, LAYOUTS["1, 1, 1"], data={"mixup": 0.4, "workers": 1})
    job = Ranks(FAILING.format(victim=victim), tmp_path, RANKS)
    ended = job.ended()
    assert time.monotonic() - job.since < 90
    if victim == "os.getppid()":  # of a rank that was killed, a worker that is left alone may print
        ended[1] = ended[1][0], ""
    tracebacks = [errors for _, errors in ended.values() if "Traceback" in errors]
    assert len(tracebacks) == 1, "\n".join(tracebacks)
    [told] = tracebacks
    assert message in told, told
    assert all(code != 0 for code, _ in ended.values())
