"""Shared decoding: each clip of a step is decoded once over all ranks, and training has the same result."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import small_runs as runs
import videoadapt.training.train as training
from forked_ranks import ForkedRanks
from rank_jobs import Ranks
from videoadapt.config.load import Config, dump_config, load_config
from videoadapt.data.clips.datasets import Clip, Failure, TrainClips
from videoadapt.data.clips.loader import steps_per_epoch, train_batches
from videoadapt.data.clips.token_labels import SHAPE, label_map_file
from videoadapt.data.index.manifest import Manifest, load_or_index
from videoadapt.model.checkpoint import save_checkpoint, train_checkpoints
from videoadapt.runtime.ranks import rank, ranks, world_size
from videoadapt.training.exchange import ClipExchange
from videoadapt.training.groups import make_plan
from videoadapt.training.state import State
from videoadapt.training.step_report import StepReport

LAYOUTS = {"2, 1": {"8": 2, "6+4": 1}, "1, 1, 1": {"8": 1, "6": 1, "4": 1}}
RANKS = 3
EPOCHS = 3


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkedRanks]:
    started = ForkedRanks(Path(__file__))
    yield started
    started.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_data(tmp_path_factory.mktemp("videos") / "data")


def prepared(videos: Path, folder: Path, groups: dict[str, int], **sections: dict[str, Any]) -> tuple[Config, Manifest]:
    """Returns a config, also written into `folder`, and its manifest; one video is deleted after indexing."""
    shutil.copytree(videos, folder / "data")
    config = runs.config(
        folder / "data",
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


def labelled(videos: Path, folder: Path, groups: dict[str, int]) -> tuple[Config, Manifest]:
    """Returns the same with one-frame clips and label maps, one of which is missing and one of which is torn."""
    config, manifest = prepared(
        videos,
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


def load_in_both_forms(folder: str) -> None:
    """Rank r writes FOLDER/rankR.pickle: for each form of decoding, its steps and the keys that it decoded."""
    config = load_config(Path(folder) / "config.yaml")
    decoded: list[tuple[int, int]] = []
    read = TrainClips.__getitem__

    def noted(self: TrainClips, key: tuple[int, int]) -> Clip | Failure:
        decoded.append(key)
        return read(self, key)

    TrainClips.__getitem__ = noted  # type: ignore[method-assign] # only in this process, which ends
    with ranks(config):
        manifest, plan = load_or_index(config), make_plan(config, world_size(), {})
        positions = partial(plan.group(rank()).positions, rank(), pairs=True)
        found = {}
        for form in ("own", "shared"):
            exchange = ClipExchange(manifest, config, plan) if form == "shared" else None
            steps = list(train_batches(manifest, config, 1, positions=positions, exchange=exchange))
            found[form] = steps, decoded.copy()
            decoded.clear()
        (Path(folder) / f"rank{rank()}.pickle").write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prepare", [prepared, labelled])
def test_ranks_get_the_same_clips_and_each_is_decoded_once(
    forked: ForkedRanks,
    videos: Path,
    tmp_path: Path,
    layout: str,
    prepare: Callable[[Path, Path, dict[str, int]], tuple[Config, Manifest]],
) -> None:
    """From the second step to the end, in micro-batches, with a video that cannot be read."""
    config, manifest = prepare(videos, tmp_path, LAYOUTS[layout])
    forked.run(load_in_both_forms, RANKS, tmp_path)
    found = [pickle.loads((tmp_path / f"rank{number}.pickle").read_bytes()) for number in range(RANKS)]
    failures = []
    for by_form in found:
        own, shared = ([batch for step in by_form[form][0] for batch in step] for form in ("own", "shared"))
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
    decoded = {form: Counter(key for by_form in found for key in by_form[form][1]) for form in ("own", "shared")}
    assert set(decoded["own"].values()) == {len(LAYOUTS[layout])}
    assert decoded["shared"] == Counter(decoded["own"].keys())
    counts = [len(by_form["shared"][1]) for by_form in found]
    assert max(counts) == min(counts)  # 12 clips a step over 3 ranks


def train_in_both_forms(folder: str) -> None:
    """Trains FOLDER/own, then FOLDER/shared, which is stopped by a signal to rank 1 after two steps and continued."""
    step, path = training.train_step, Path(folder)

    def step_with_signal(state: State, *rest: Any) -> StepReport:
        sent = path / "sent"
        if state.config.parallel.decode == "shared" and state.step == 2 and rank() == 1 and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, *rest)

    training.train_step = step_with_signal  # type: ignore[assignment] # only in this process, which ends
    for form in ("own", "shared"):
        config = load_config(path / "config.yaml", [f"run.dir={path / form}", f"parallel.decode={form}"])
        try:
            training.train(config)
        except KeyboardInterrupt:
            (path / f"stopped{os.environ['SLURM_PROCID']}").touch()
            training.train(config)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stopped_run_with_shared_decoding_equals_one_without_to_the_bit(
    forked: ForkedRanks, videos: Path, tmp_path: Path, layout: str
) -> None:
    config, manifest = prepared(videos, tmp_path, LAYOUTS[layout], data={"mixup": 0.4, "workers": 1})
    for form in ("own", "shared"):  # the manifest, which was made when all videos were there
        (tmp_path / form).mkdir()
        for file in config.run.dir.iterdir():
            (tmp_path / form / file.name).write_bytes(file.read_bytes())
    forked.run(train_in_both_forms, RANKS, tmp_path)
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
    count += get_worker_info() is not None  # the preflight reads in the main process
    if count == 10 and os.environ["SLURM_PROCID"] == "1":
        os.kill({victim}, signal.SIGKILL)
    return read(self, key)

TrainClips.__getitem__ = failing
training.train(load_config(folder / "config.yaml", ["parallel.decode=shared"]))
"""


@pytest.mark.usefixtures("rank_server")
@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("os.getpid()", "RunError: reading videos failed: DataLoader worker"),
        ("os.getppid()", "died or hangs; a collective operation of the other ranks failed"),
    ],
)
def test_a_rank_whose_reading_fails_ends_all_with_one_message(
    videos: Path, tmp_path: Path, victim: str, message: str
) -> None:
    prepared(videos, tmp_path, LAYOUTS["1, 1, 1"], data={"mixup": 0.4, "workers": 1})
    job = Ranks(FAILING.format(victim=victim), tmp_path, RANKS)
    ended = job.ended()
    assert time.monotonic() - job.since < 90
    if victim == "os.getppid()":  # the orphaned worker of a killed rank may print
        ended[1] = ended[1][0], ""
    tracebacks = [errors for _, errors in ended.values() if "Traceback" in errors]
    # The two that are left may see the end of a killed rank in the same moment; then both name it.
    assert 1 <= len(tracebacks) <= (2 if victim == "os.getppid()" else 1), "\n".join(tracebacks)
    for printed in tracebacks:
        assert message in printed, printed
    assert all(code != 0 for code, _ in ended.values())


@pytest.mark.usefixtures("rank_server")
def test_one_rank_reads_a_checkpoint_for_all(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}
    save_checkpoint(tmp_path / "a.safetensors", "train", tensors, {"step": 3})
    program = """
import torch
from videoadapt.model.checkpoint import load_checkpoint
from videoadapt.training.exchange import broadcast_checkpoint

def find():
    (folder / f"opened{rank()}").touch()
    return load_checkpoint(folder / "a.safetensors", "train")

with ranks(config):
    found = broadcast_checkpoint(find)
    expected = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}
    assert found.meta["step"] == 3
    assert all(torch.equal(found.tensors[name], value) for name, value in expected.items())
    assert broadcast_checkpoint(lambda: None) is None
"""
    ended = Ranks(program, tmp_path, RANKS).ended()
    assert [code for code, _ in ended.values()] == [0] * RANKS, ended
    assert [path.name for path in tmp_path.glob("opened*")] == ["opened0"]
