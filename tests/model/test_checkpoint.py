"""Checkpoints: written whole or not at all, refused with a clear message, never unpickled."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import videoadapt.model.checkpoint as module
from videoadapt.config.sections import AssignConfig, ModelConfig, TrainConfig
from videoadapt.errors import CheckpointError, RunError
from videoadapt.model.checkpoint import (
    Checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_model,
    load_tensors,
    require_same,
    restore_optimizer,
    save_checkpoint,
    train_checkpoints,
)
from videoadapt.model.timesformer import TimeSformer
from videoadapt.routing.assigner import Assigner, assigner_checkpoints, load_assigner

TENSORS: dict[str, Tensor] = {
    "model/w": torch.arange(6.0).view(2, 3),
    "model/b": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    "optimizer/w/step": torch.tensor(7, dtype=torch.int64),
    "rng/torch": torch.arange(16, dtype=torch.uint8),
    "empty": torch.zeros(0, 3),
}
META = {"epoch": 2, "names": ["übung", 'a "b"'], "nested": {"lr": 0.1, "none": None}}
TINY = ModelConfig(
    width=8, depth=1, heads=2, patch=4, size=16, num_frames=2, num_classes=3, points=("4", "2"), init_std=0.5
)
SMALL = AssignConfig(frames=2, size=32, channel_multiplier=0.25, stages=1)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k].nan_to_num(9), b[k].nan_to_num(9))
        for k in a
    )


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, "train", keep)
    for step in steps:
        checkpoints.save(step, {"model/w": torch.full((50,), float(step))}, {"at": step})
    return checkpoints


def tear(path: Path, fraction: float = 0.6) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(checkpoints: Checkpoints) -> Any:
    found = checkpoints.latest()
    assert found is not None
    return found.meta["step"]


# One file.


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.safetensors"
    save_checkpoint(path, "train", TENSORS, META)
    found = load_checkpoint(path, "train")
    assert same(found.tensors, TENSORS)
    assert found.meta == {**META, "kind": "train", "version": 1}
    assert found.path == path
    assert names(path.parent) == ["a.safetensors"]


def test_tensors_are_found_under_a_whole_prefix(tmp_path: Path) -> None:
    tensors = {"model/w": torch.zeros(1), "model_ema/w": torch.ones(1), "ema/model/w": torch.ones(2)}
    save_checkpoint(tmp_path / "a", "train", tensors, {})
    found = load_checkpoint(tmp_path / "a", "train")
    assert same(found.tensors_under("model"), {"w": torch.zeros(1)})
    assert same(found.tensors_under("ema"), {"model/w": torch.ones(2)})
    assert found.tensors_under("optimizer") == {}


def test_views_and_parameters_are_saved_by_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"t": base.t(), "p": torch.nn.Parameter(torch.ones(2))}
    save_checkpoint(tmp_path / "a", "train", tensors, {})
    found = load_checkpoint(tmp_path / "a", "train").tensors
    assert torch.equal(found["t"], base.t())
    assert not found["p"].requires_grad


def test_a_loaded_checkpoint_outlives_its_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "train", TENSORS, {})
    found = load_checkpoint(tmp_path / "a", "train")
    save_checkpoint(tmp_path / "a", "train", {"model/w": torch.zeros(2)}, {})
    (tmp_path / "a").unlink()
    assert same(found.tensors, TENSORS)


def test_a_file_torn_anywhere_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, "train", TENSORS, META)
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), 8, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(path, "train")
        assert str(error.value).startswith(f"{path}: torn or not a checkpoint"), length


def test_a_file_with_too_many_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, "train", TENSORS, META)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(CheckpointError, match="torn or not a checkpoint"):
        load_checkpoint(path, "train")


@pytest.mark.parametrize("damage", ["bit", "page", "setting"])
def test_damage_that_safetensors_reads_without_an_error_is_found(
    tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    path = tmp_path / "step-00000020.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "bit":
        content[-3] ^= 1
    elif damage == "page":
        content[-200:] = bytes(200)
    else:
        content[content.index(b"20,", 8)] ^= 1  # `"step": 20` becomes `"step": 30`
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step-00000020\.safetensors: damaged, .* differ from its checksum"):
        load_checkpoint(path, "train")
    found = checkpoints.latest()
    assert found is not None
    assert found.meta["at"] == 10
    assert found.tensors["model/w"].eq(10).all()
    assert "checksum; name another one; going back to the checkpoint before it" in capfd.readouterr().err


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, "train", TENSORS, META)
    content = path.read_bytes()
    for number in range(0, 8 * len(content), 43):
        changed = bytearray(content)
        changed[number // 8] ^= 1 << number % 8
        path.write_bytes(changed)
        try:
            found = load_checkpoint(path, "train")
        except CheckpointError:
            continue
        assert same(found.tensors, TENSORS), number
        assert found.meta.items() >= META.items(), number


def test_a_checkpoint_of_an_older_version_is_loaded_with_a_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    header = {"videoadapt": json.dumps({"kind": "train", "version": 1, "step": 3})}
    save_file({"model/w": torch.ones(2)}, tmp_path / "old.safetensors", metadata=header)
    assert load_checkpoint(tmp_path / "old.safetensors", "train").meta["step"] == 3
    assert "old.safetensors: was written without a checksum, by an older version" in capfd.readouterr().err


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


FOREIGN: dict[str, bytes] = {
    "text": b"this is a text file and not a checkpoint\n" * 20,
    "empty": b"",
    "zeros": bytes(4096),
    "pickle": pickle.dumps({"model": Bomb()}),
    "header without JSON": (20).to_bytes(8, "little") + b"x" * 20,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_by_its_path_and_not_unpickled(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(FOREIGN[name])
    for load in (lambda: load_checkpoint(path, "train"), lambda: load_model(path), lambda: load_assigner(path)):
        with pytest.raises(CheckpointError, match="torn or not a checkpoint") as error:
            load()
        assert str(path) in str(error.value)


def test_a_torch_file_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    torch.save({"model": Bomb()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: torn or not a checkpoint"):
        load_model(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "metadata",
    [None, {"format": "pt"}, {"videoadapt": "[1]"}, {"videoadapt": '{"kind": "train", "version": 0}'}],
)
def test_a_weights_file_is_refused_with_a_hint_to_train_init(tmp_path: Path, metadata: Any) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this version.*train\.init") as error:
        load_checkpoint(path, "train")
    assert str(path) in str(error.value)


def test_a_header_without_json_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "a", metadata={"videoadapt": "{"})
    with pytest.raises(CheckpointError, match="torn or not a checkpoint"):
        load_checkpoint(tmp_path / "a", "train")


def test_a_checkpoint_of_the_other_stage_is_refused_by_kind(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", "assigner", TENSORS, {})
    with pytest.raises(CheckpointError, match="expected a checkpoint of kind train, got one of kind assigner") as error:
        load_checkpoint(tmp_path / "a", "train")
    assert str(tmp_path / "a") in str(error.value)


def test_a_missing_file_or_a_folder_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such checkpoint"):
        load_checkpoint(tmp_path / "gone.safetensors", "train")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path, "train")
    assert str(tmp_path) in str(error.value)


# The checkpoints of a folder.


def test_the_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20, 100, 1000)
    assert names(tmp_path) == ["last", "step-00000100.safetensors", "step-00001000.safetensors"]
    assert (tmp_path / "last").read_text() == "step-00001000.safetensors"
    found = checkpoints.latest()
    assert found is not None
    assert (found.meta["step"], found.meta["at"]) == (1000, 1000)


def test_keep_sets_how_many_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3, 4, 5, keep=3)
    assert len(list(tmp_path.glob("step-*"))) == 3


def test_the_best_checkpoint_stays_until_another_one_is_the_best(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10)
    checkpoints.mark_best(10)
    saved(tmp_path, 20, 30, 40)
    assert [int(path.stem[-8:]) for path in sorted(tmp_path.glob("step-*"))] == [10, 30, 40]
    assert checkpoints.best().meta["step"] == 10
    checkpoints.mark_best(40)
    saved(tmp_path, 50, 60)
    assert [int(path.stem[-8:]) for path in sorted(tmp_path.glob("step-*"))] == [40, 50, 60]
    assert checkpoints.best().meta["step"] == 40


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    checkpoints.save(20, {"model/w": torch.zeros(1)}, {"at": "again"})
    found = checkpoints.latest()
    assert found is not None
    assert found.meta["at"] == "again"
    assert names(tmp_path) == ["last", "step-00000010.safetensors", "step-00000020.safetensors"]


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "gone", "train").latest() is None
    assert Checkpoints(tmp_path, "train").latest() is None


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
def test_a_torn_newest_checkpoint_is_skipped_with_a_message(
    tmp_path: Path, fraction: float, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    tear(tmp_path / "step-00000020.safetensors", fraction)
    assert newest(checkpoints) == 10
    out, err = capfd.readouterr()
    assert out == ""
    assert "step-00000020.safetensors: torn or not a checkpoint" in err
    assert "going back to the checkpoint before it" in err


def test_a_missing_newest_checkpoint_is_skipped(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    (tmp_path / "step-00000020.safetensors").unlink()
    assert newest(checkpoints) == 10


def test_a_run_saves_again_after_a_torn_checkpoint(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    tear(tmp_path / "step-00000020.safetensors")
    assert newest(checkpoints) == 10
    checkpoints.save(15, {"model/w": torch.zeros(1)}, {})
    assert newest(checkpoints) == 15
    checkpoints.save(20, {"model/w": torch.zeros(1)}, {})
    assert newest(checkpoints) == 20


def test_a_folder_of_torn_checkpoints_is_an_error(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    for path in tmp_path.glob("step-*"):
        tear(path)
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be read; move them away"):
        checkpoints.latest()


def test_a_file_newer_than_last_is_ignored_with_a_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    (tmp_path / "last").write_text("step-00000010.safetensors")
    assert newest(checkpoints) == 10
    assert "step-00000020.safetensors: not used, because" in capfd.readouterr().err
    checkpoints.save(15, {"model/w": torch.zeros(1)}, {})
    assert newest(checkpoints) == 15


@pytest.mark.parametrize(
    "last", [None, b"", b"\n", b"garbage", b"\xff\xfe\x00", b"st", b"step-", b"step-00", b"step-00000020.safetens"]
)
def test_without_a_readable_last_the_newest_file_is_loaded(
    tmp_path: Path, last: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    (tmp_path / "last").unlink()
    if last is not None:
        (tmp_path / "last").write_bytes(last)
    assert newest(checkpoints) == 20
    said = "last: damaged; step-00000020.safetensors, the newest file, is used"
    assert (said in capfd.readouterr().err) == (last is not None)  # without `last`, the first save was cut off


def test_checkpoints_that_are_all_newer_than_last_are_refused_and_not_replaced(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10, 20)
    (tmp_path / "last").write_text("step-00000009.safetensors")
    with pytest.raises(CheckpointError, match=r"only newer checkpoints are there, such as step-00000010\.s.*delete .*"):
        checkpoints.latest()


# Writes that fail.


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), module.SafetensorError("I/O error")])
def test_a_failing_write_is_a_run_error_that_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    checkpoints = saved(tmp_path, 10)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(RunError, match=r"step-00000020\.safetensors: cannot save .*earlier checkpoints are intact"):
        checkpoints.save(20, {"model/w": torch.zeros(9)}, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert newest(checkpoints) == 10


@pytest.fixture
def files_up_to_64_kib() -> Iterator[None]:
    """This process cannot write beyond 64 KiB of a file, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("files_up_to_64_kib")
def test_a_full_disk_is_a_run_error_that_leaves_all_as_it_was(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 10)
    for size in (20_000, 1_000_000):
        with pytest.raises(RunError, match=r"step-00000020\.safetensors: cannot save this checkpoint"):
            checkpoints.save(20, {"model/w": torch.zeros(size)}, {})
    assert names(tmp_path) == ["last", "step-00000010.safetensors"]
    checkpoints.save(30, {"model/w": torch.ones(5)}, {})  # small enough
    assert newest(checkpoints) == 30
    assert names(tmp_path) == ["last", "step-00000010.safetensors", "step-00000030.safetensors"]


def test_a_folder_that_cannot_be_made_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot save this checkpoint"):
        Checkpoints(tmp_path / "file" / "checkpoints", "train").save(1, TENSORS, {})


# Models and assigners.


def save_model(run: Path, model: TimeSformer, step: int = 1, **by_prefix: dict[str, Tensor]) -> Path:
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"{prefix}/{name}": t for prefix, values in by_prefix.items() for name, t in values.items()}
    meta = {"model": model.config.model_dump(mode="json"), "classes": list(model.class_names)}
    return train_checkpoints(run).save(step, tensors, meta)


def test_a_model_comes_back_from_its_file_or_run_folder(tmp_path: Path) -> None:
    model = TimeSformer(TINY, ("a", "b", "c")).eval()
    path = save_model(tmp_path, model)
    clips = torch.randn(2, 3, 2, 16, 16)
    for source in (path, tmp_path, str(tmp_path)):
        found = load_model(source)
        assert not found.training
        assert (found.config, found.class_names) == (TINY, ("a", "b", "c"))
        assert all(torch.equal(found(clips, point), model(clips, point)) for point in TINY.points)


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    model, averaged = TimeSformer(TINY), TimeSformer(TINY)
    save_model(tmp_path, model, ema=averaged.state_dict())
    assert same(load_model(tmp_path).state_dict(), averaged.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_without_a_finite_value_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model, assigner = TimeSformer(TINY), Assigner(SMALL, 2)
    with torch.no_grad():
        model.head.weight[1, 2] = value
        assigner.head.bias[0] = value
    paths = save_model(tmp_path, model), save_assigner(tmp_path, assigner, 0.5)
    expected = "1 of 24 values of head.weight are NaN or infinite", "1 of 2 values of head.bias are NaN or infinite"
    loads: tuple[Callable[[Path], object], ...] = load_model, load_assigner
    for load, path, said in zip(loads, paths, expected, strict=True):
        for source in (tmp_path, path):
            with pytest.raises(CheckpointError, match=f"{path}: {said}.*Move the file away to use"):
                load(source)


def test_settings_that_describe_no_model_are_refused(tmp_path: Path) -> None:
    metas: tuple[dict[str, Any], ...] = {}, {"model": 3, "classes": []}, {"model": {"width": "x"}, "classes": []}
    for number, meta in enumerate(metas):
        save_checkpoint(tmp_path / str(number), "train", TENSORS, meta)
        with pytest.raises(CheckpointError, match=f"{tmp_path / str(number)}: its settings describe no model"):
            load_model(tmp_path / str(number))


def test_an_optimizer_state_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
    for name, value, said in (
        ("bias/momentum_buffer", torch.tensor([1.0, float("nan"), 0.0]), "1 of 3 values of bias/momentum_buffer"),
        ("bias/momentum_buffer", torch.zeros(4), "tensor optimizer/bias/momentum_buffer does not fit"),
        ("scale/momentum_buffer", torch.zeros(3), "tensor optimizer/scale/momentum_buffer does not fit"),
    ):
        save_checkpoint(tmp_path / "a", "train", {f"optimizer/{name}": value}, {})
        with pytest.raises(CheckpointError, match=said):
            restore_optimizer(module, optimizer, load_checkpoint(tmp_path / "a", "train"))


def test_another_architecture_is_refused_with_its_fields(tmp_path: Path) -> None:
    path = save_model(tmp_path, TimeSformer(TINY))
    wanted = TINY.model_copy(update={"num_classes": 7, "points": ("4",)})
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path, wanted)
    message = str(error.value)
    assert str(path) in message
    assert "model.num_classes is 3 in the checkpoint, 7 in the config" in message
    assert "model.points is ['4', '2'] in the checkpoint, ['4'] in the config" in message
    assert "model.width" not in message


def test_fields_without_effect_on_a_trained_model_may_differ(tmp_path: Path) -> None:
    save_model(tmp_path, TimeSformer(TINY))
    load_model(tmp_path, TINY.model_copy(update={"drop_path": 0.2, "init_std": 0.1, "time_init_std": 1.0}))


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    module, path = torch.nn.Linear(2, 3), tmp_path / "a"
    whole = {name: torch.ones_like(t) for name, t in module.state_dict().items()}
    before = module.weight.detach().clone()
    for tensors, named in (
        ({"weight": whole["weight"]}, "bias"),
        (whole | {"scale": torch.ones(1)}, "scale"),
        (whole | {"weight": torch.ones(3, 3)}, "weight"),
    ):
        with pytest.raises(CheckpointError, match=f"{path}: tensor {named}"):
            load_tensors(module, tensors, path)
    assert torch.equal(module.weight, before)
    load_tensors(module, whole, path)
    assert module.weight.eq(1).all()


def test_the_error_for_a_run_without_checkpoints_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run `videoadapt train` first"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="run `videoadapt assign` first"):
        load_assigner(tmp_path)


def test_a_named_file_that_is_torn_has_no_substitute(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 10, 20)
    torn = tmp_path / "checkpoints" / "step-00000020.safetensors"
    tear(torn)
    with pytest.raises(CheckpointError, match="torn"):
        find_checkpoint(torn, train_checkpoints)
    assert find_checkpoint(tmp_path, train_checkpoints).meta["step"] == 10


def test_require_same_ignores_only_free_fields(tmp_path: Path) -> None:
    theirs = TINY.model_dump(mode="json") | {"drop_path": 0.5}
    require_same(tmp_path, TINY, theirs, "model", free=("drop_path",))
    with pytest.raises(CheckpointError, match=r"model\.drop_path is 0\.5 in the checkpoint, 0\.0 in the config"):
        require_same(tmp_path, TINY, theirs, "model")
    require_same(tmp_path, TINY, json.loads(json.dumps(TINY.model_dump(mode="json"))), "model")


def test_the_order_of_points_does_not_matter() -> None:
    points = ["14", "12", "14@0.7"]
    late, early = (ModelConfig(points=points, drop_blocks=blocks) for blocks in ([11], [2, 3, 4]))
    assert late.points != early.points
    both = r"settings: model\.drop_blocks is \[11\] in the checkpoint, \[2, 3, 4\] in the config\. Use the"
    with pytest.raises(CheckpointError, match=both):
        require_same(Path("old"), early, late.model_dump(mode="json"), "model")
    with pytest.raises(CheckpointError, match=r"model\.points is \['14', '12', '14@0.7'\] in the checkpoint"):
        require_same(Path("old"), ModelConfig(points=["14", "12"]), {"points": points}, "model")


def save_assigner(run: Path, assigner: Assigner, threshold: float | None) -> Path:
    meta = {"assign": assigner.config.model_dump(mode="json"), "points": ["4", "2"], "threshold": threshold}
    tensors = {f"model/{name}": t for name, t in assigner.state_dict().items()}
    return assigner_checkpoints(run).save(3, tensors, meta)


def test_an_assigner_comes_back_with_its_threshold(tmp_path: Path) -> None:
    assigner = Assigner(SMALL, 2).eval()
    path = save_assigner(tmp_path, assigner, 0.65)
    thumbnails = torch.randint(0, 256, (3, 3, 2, 32, 32), dtype=torch.uint8)
    for source in (path, tmp_path):
        found, _, threshold = load_assigner(source)
        assert threshold == 0.65
        assert not found.training
        assert torch.equal(found.probabilities(thumbnails), assigner.probabilities(thumbnails))


def test_a_partly_fitted_assigner_is_refused(tmp_path: Path) -> None:
    save_assigner(tmp_path, Assigner(SMALL, 2), None)
    with pytest.raises(CheckpointError, match=r"not fitted to the end; run `videoadapt assign` again"):
        load_assigner(tmp_path)


def test_a_field_newer_than_the_checkpoint_counts_as_its_default() -> None:
    made = TrainConfig().model_dump(mode="json")
    del made["draw"]
    require_same(Path("old"), TrainConfig(), made, "train")
    with pytest.raises(CheckpointError, match=r"train\.draw is 'all' in the checkpoint, 'sampled' in the config"):
        require_same(Path("old"), TrainConfig(draw="sampled"), made, "train")


ASSIGNER = {"assign": SMALL.model_dump(mode="json"), "points": ["4", "2"], "threshold": 0.5}


@pytest.mark.parametrize(
    ("key", "value", "cause"),
    [
        ("points", None, "no valid points, but None"),
        ("points", {"4": 2}, "no valid points"),
        ("threshold", "high", "no valid threshold, but 'high'"),
        ("threshold", [[[]]], "no valid threshold"),
        ("assign", 3, "no valid assign, but 3"),
        ("assign", {"frames": -1}, "its settings describe no assigner"),
        ("assign", {"unknown": 1}, "its settings describe no assigner"),
        ("assign", {"channel_multiplier": 1e300}, "its settings describe no assigner"),
    ],
)
def test_a_header_that_was_written_by_hand_is_refused_with_its_cause(
    tmp_path: Path, key: str, value: object, cause: str
) -> None:
    assigner_checkpoints(tmp_path).save(1, {"model/a": torch.zeros(2)}, ASSIGNER | {key: value})
    with pytest.raises(CheckpointError, match=re.escape(cause)) as error:
        load_assigner(tmp_path)
    assert len(str(error.value)) < 1000


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "step-00000001.safetensors")
    with pytest.raises(CheckpointError, match="torn or not a checkpoint"):
        load_model(tmp_path / "step-00000001.safetensors")
