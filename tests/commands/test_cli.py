"""The command line: verbs, their output, and one line for each error of the user."""

from __future__ import annotations

import importlib
import io
import json
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.text import Text
from safetensors.torch import save_file

import small_runs as runs
import videoadapt as va
from processes import finished
from videoadapt.commands.cli import _OVERRIDE, _split, app, main
from videoadapt.config.load import Config, dump_config
from videoadapt.errors import RunError, UserError
from videoadapt.training.state import State
from videoadapt.training.train import train

training = importlib.import_module("videoadapt.training.train")
flops = importlib.import_module("videoadapt.evaluation.costs")

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A trained run without an assigner, with its config in a file. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("cli")
    config = runs.config(runs.make_data(folder / "data"), folder / "run", train={"epochs": 1})
    train(config)
    (folder / "config.yaml").write_text(dump_config(config))
    return config


def file_of(config: Config) -> Path:
    return config.run.dir.parent / "config.yaml"


def refused(*words: object) -> str:
    """Runs a command that must fail with exit code 2 and one line on stderr; returns the line."""
    done = runs.command(*words)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


ERRORS = [
    (UserError("a.yaml: no\nsuch thing"), 2),
    (RunError("a.yaml: no\nsuch thing"), 1),
    (OSError("a.yaml: no\nsuch thing"), 1),
]

OUT_OF_MEMORY = [MemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_is_one_line_and_an_error_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(flops, "flops", raising(error))
    done = runs.command("flops", CONFIGS / "demo.yaml")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: not enough memory; take smaller batches")
    assert len(done.stderr.splitlines()) == 1


def test_a_long_message_is_cut_and_shows_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "flops", raising(UserError("a.yaml: \x1b[31m" + "x" * 10**6 + ": do this")))
    done = runs.command("flops", CONFIGS / "demo.yaml")
    assert len(done.stderr) < 1000
    assert done.stderr.startswith("error: a.yaml: \\x1b[31mxxx")
    assert done.stderr.endswith("xxx: do this\n")


@pytest.mark.parametrize(("error", "code"), ERRORS)
@pytest.mark.parametrize("wanted", ["", "0", "1"])
def test_an_error_is_one_line_and_its_traceback_is_shown_on_demand(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, wanted: str
) -> None:
    monkeypatch.setenv("VIDEOADAPT_TRACEBACK", wanted)
    monkeypatch.setattr(flops, "flops", raising(error))
    done = runs.command("flops", CONFIGS / "demo.yaml")
    assert (done.returncode, done.stdout) == (code, "")
    *above, line = done.stderr.splitlines()
    assert line == "error: a.yaml: no such thing"
    assert above[:1] == (["Traceback (most recent call last):"] if wanted == "1" else [])


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError("x"), RuntimeError("x")])
def test_a_programming_error_is_not_caught(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Python then prints its traceback and exits with code 1."""
    monkeypatch.setattr(flops, "flops", raising(error))
    with pytest.raises(type(error)) as raised:
        runs.command("flops", CONFIGS / "demo.yaml")
    assert raised.value is error


def raising(error: Exception) -> Callable[..., None]:
    def function(*_: object) -> None:
        raise error

    return function


def test_an_interrupted_verb_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "flops", raising(KeyboardInterrupt()))  # type: ignore[arg-type]
    done = runs.command("flops", CONFIGS / "demo.yaml")
    assert done.returncode == 130
    assert done.stderr == "interrupted; run the same command again to continue from the saved state\n"


def test_a_name_that_is_not_utf8_does_not_lose_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", errors="strict"))
    with pytest.raises(SystemExit):
        main(["--version"])
    print("caf\udce9.mp4", flush=True)
    assert written.getvalue().endswith(rb"caf\udce9.mp4" + b"\n")


def test_help_and_flops_do_not_import_submitit_and_help_does_not_import_torch() -> None:
    program = """
import sys
from videoadapt.commands.cli import main
for words in (["--help"], ["launch", "--help"]):
    try:
        main(words)
    except SystemExit:
        pass
import videoadapt.commands.tables
assert not {"torch", "submitit", "av", "pandas"} & set(sys.modules), "imported by --help, or to print tables"
try:
    main(["flops", sys.argv[1], "--json", f"run.dir={sys.argv[2]}"])
except SystemExit as ended:
    assert ended.code == 0, ended.code
assert "submitit" not in sys.modules, "imported by flops"
"""
    with tempfile.TemporaryDirectory() as folder:
        done = finished([sys.executable, "-c", program, str(CONFIGS / "demo.yaml"), folder])
    assert done.returncode == 0, done.stderr


def test_rich_takes_no_part_of_a_help_for_markup() -> None:
    command: Any = typer.main.get_command(app)
    verbs = [verb for each in command.commands.values() for verb in getattr(each, "commands", {"": each}).values()]
    for text in (text for verb in verbs for text in (verb.help, *(each.help for each in verb.params)) if text):
        assert Text.from_markup(text).plain == text  # `[views:]` would vanish


def test_the_help_fits_on_a_screen() -> None:
    done = runs.command("--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 32
    for verb in "demo index train label assign evaluate launch flops report plan predict bench".split():
        assert f" {verb} " in done.stdout
    assert "VIDEOADAPT_TRACEBACK=1" in done.stdout


def test_versions_and_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"videoadapt \S+, torch \S+, Python 3\.\S+\n", runs.command("--version").stdout)
    for shell in ("bash", "zsh", "fish"):
        assert "_VIDEOADAPT_COMPLETE" in runs.command("--show-completion", shell).stdout
    monkeypatch.setenv("_VIDEOADAPT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "videoadapt train a.yaml train.lr")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert runs.command().stdout.split() == ["train.lr="]


def test_json_is_alone_on_stdout(run: Config) -> None:
    done = runs.command("flops", CONFIGS / "timesformer_b_k400.yaml", "--json", f"run.dir={run.run.dir.parent / 'f'}")
    summary = json.loads(done.stdout)
    assert [point["point"] for point in summary["points"]] == ["14", "10", "7"]
    assert summary["views_per_video"] == 3


def test_tables_for_people(run: Config) -> None:
    done = runs.command("evaluate", file_of(run), "--policy", "cascade:4,8:1.0")
    assert done.returncode == 0, done.stderr
    rows = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("│")]
    policies = ["fixed:8", "fixed:6", "fixed:4", "cascade:4,8:1.0", "oracle"]
    assert rows == policies * 2  # accuracy and MACs, then measured cost
    assert "no assigner yet" in done.stderr
    assert "cascade:4,8:1.0 costs more than the costliest point" in done.stderr  # no clip is certain


@pytest.mark.parametrize("words", [("juggle",), ("flops", CONFIGS / "demo.yaml", "--bad"), ()])
def test_usage_errors(words: tuple[object, ...]) -> None:
    done = runs.command(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Usage" in done.stderr + done.stdout


def test_a_missing_config(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused("train", tmp_path / "nowhere.yaml")


def test_an_unknown_key_names_the_nearest_known_key(run: Config) -> None:
    assert "unknown key train.epoch; did you mean train.epochs?" in refused("train", file_of(run), "train.epoch=3")


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("--epochs", "3"), "write train.epochs=3 or assign.epochs=3"),
        (("--train.epochs=3",), "write train.epochs=3"),
        (("--model-points", "[8,6]"), "write 'model.points=[8,6]'"),
        (("--precision",), "write run.precision=..."),
        (("--jso",), "--json"),
    ],
)
def test_an_unknown_option_names_the_override_that_it_was_meant_to_be(words: tuple[str, ...], meant: str) -> None:
    done = runs.command("train", CONFIGS / "demo.yaml", *words)
    assert done.returncode == 2
    assert meant in " ".join(done.stderr.replace("│", " ").split())


def test_an_override_without_its_section_is_refused_with_the_section() -> None:
    assert "did you mean train.epochs=3 or assign.epochs=3?" in refused("train", CONFIGS / "demo.yaml", "epochs=3")


def test_invalid_yaml_is_shown_with_a_caret_below_the_error(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("run:\n  dir: a: b\n")
    assert "line 2, column 9" in refused("train", config)
    assert runs.command("train", config).stderr.endswith("\n    dir: a: b\n          ^\n")


def test_the_verb_config_explains_keys() -> None:
    text = runs.command("config", "train.epochs").stdout
    assert "  train.epochs = 15\n" in text
    assert "integer from 1 to 1,000,000" in text
    assert "Passes over the train split." in text
    assert "assign.epochs" in runs.command("config", "epochs").stdout
    assert "data.train" not in runs.command("config", "train").stdout
    assert json.loads(runs.command("config", "train.epochs", "--json").stdout)["default"] == 15
    found = runs.command("config", "distillation").stdout  # no name of a key: a word of descriptions
    assert "  loss.tau = 1\n" in found and "train.epochs" not in found
    assert "did you mean train.epochs?" in refused("config", "trian.epochs")
    assert "unknown key zebra" in refused("config", "zebra")
    assert "`videoadapt config model` lists the keys" in refused("config", "model.lenght")


def test_contradictions_are_refused_before_any_work(run: Config, tmp_path: Path) -> None:
    folder = tmp_path / "fresh"
    line = ("train", file_of(run), f"run.dir={folder}")
    assert "length 16 with 8-pixel patches needs 128 pixels" in refused(*line, "model.points=[16,8]")
    assert "model.drop_blocks" in refused(*line, "model.points=[8,8@0.5]")
    assert "train.batch" in refused(*line, "train.accumulate=3")
    assert not folder.exists()


def test_a_label_out_of_range(run: Config, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    text = (run.data.root / "train.csv").read_text()  # type: ignore[operator]
    bad.write_text(text + "train/00000x.mp4 12\n")
    message = refused("index", file_of(run), f"run.dir={tmp_path / 'r'}", f"data.train.annotations={bad}")
    for part in ("12", "0 to 11", "bad.csv"):
        assert part in message


def test_an_override_may_be_longer_than_the_name_of_a_file(tmp_path: Path) -> None:
    override, file = f"slurm.comment={300 * 'a'}", tmp_path / "a.b=1"
    file.touch()
    assert _split([override, str(file)], _OVERRIDE) == ([override], [str(file)])


def test_a_split_without_a_readable_video(run: Config, tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("a.mp4 0\nb.mp4 1\n")
    message = refused("train", file_of(run), f"run.dir={tmp_path / 'r'}", f"data.val.annotations={empty}")
    assert "data.val: none of the 2 videos" in message


def test_a_checkpoint_of_another_architecture(run: Config) -> None:
    assert "model.depth is 2 in the checkpoint, 3 in the config" in refused("evaluate", file_of(run), "model.depth=3")


def test_a_named_checkpoint_that_is_torn_foreign_or_missing(run: Config, tmp_path: Path) -> None:
    good = max((run.run.dir / "checkpoints").glob("step-*"))
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(good.read_bytes()[:-100])
    assert "torn" in refused("evaluate", file_of(run), f"run.checkpoint={torn}")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    assert "not a checkpoint" in refused("label", file_of(run), f"run.checkpoint={foreign}")
    assert "no such" in refused("predict", file_of(run), "a.mp4", f"run.checkpoint={tmp_path / 'no.safetensors'}")


def test_a_stage_names_the_stage_that_must_run_first(run: Config, tmp_path: Path) -> None:
    fresh = f"run.dir={tmp_path / 'fresh'}"
    assert "`videoadapt train`" in refused("label", file_of(run), fresh)
    assert "`videoadapt label`" in refused("assign", file_of(run), fresh)


def test_predict_takes_videos_of_any_length_and_names_unreadable_ones(run: Config, tmp_path: Path) -> None:
    good = next(run.data.root.glob("val/*.mp4"))  # type: ignore[union-attr]
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(good.read_bytes()[:300])
    done = runs.command("predict", file_of(run), good, "evaluate.temporal_views=3", "--json")
    assert done.returncode == 0, done.stderr
    [prediction] = json.loads(done.stdout)["predictions"]
    evaluate = run.evaluate.model_copy(update={"temporal_views": 3})
    [expected] = va.predict(va.load_model(run.run.dir), [good], evaluate=evaluate, data=run.data, top=12)
    assert sum(expected.probabilities) == pytest.approx(1)
    assert sorted(expected.probabilities, reverse=True) == list(expected.probabilities)
    assert prediction["probabilities"] == pytest.approx(expected.probabilities[:5])
    assert prediction["classes"] == list(expected.classes[:5])
    assert prediction["points"] == ["8"] * 3
    done = runs.command("predict", file_of(run), torn, good)
    assert done.returncode == 2
    assert str(torn) in done.stderr.splitlines()[-1]
    assert good.name in done.stdout  # the result of the readable file is printed all the same
    assert "policy 'fixed:9'" in refused("predict", file_of(run), good, "--policy", "fixed:9")
    assert "assign" in refused("predict", file_of(run), good, "--policy", "assigned")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_earlier_checkpoint(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has a checkpoint of step 2. It continues under a file size limit that the next checkpoint exceeds."""
    assert run.data.root is not None
    config = runs.config(run.data.root, tmp_path / "run", train={"epochs": 1, "save_steps": 2})
    step = training.train_step

    def stop_in_step_4(state: State, *rest: Any) -> dict[str, float]:
        if state.step == 3:
            raise InterruptedError
        return step(state, *rest)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(training, "train_step", stop_in_step_4)
        train(config)
    [earlier] = (config.run.dir / "checkpoints").glob("step-*")
    content, size = earlier.read_bytes(), earlier.stat().st_size
    (tmp_path / "config.yaml").write_text(dump_config(config))

    with file_size_limit(size // 2):
        done = runs.command("train", tmp_path / "config.yaml")
    assert done.returncode == 1, done.stderr
    assert "cannot save this checkpoint" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert [p.name for p in (config.run.dir / "checkpoints").iterdir() if p.name != "last"] == [earlier.name]
    assert earlier.read_bytes() == content
    done = runs.command("train", tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert "at step 2" in done.stderr
