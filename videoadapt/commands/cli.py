"""The command line: `videoadapt VERB CONFIG.yaml [section.key=value ...]`. Each verb calls one function.

A verb imports what it needs when it runs, so that `videoadapt --help` does not wait for torch.
Errors of the user (`UserError`, `RunError`, `OSError`) are printed as one line. All other exceptions are programming
errors and show their traceback. The environment variable VIDEOADAPT_TRACEBACK=1 adds the traceback to every error.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.completion import completion_init

from videoadapt.commands.failure import FAILURES, INPUT_WRONG, fail, is_failure
from videoadapt.errors import RunError, UserError, few
from videoadapt.runtime.signals import JOB_SIGNALS, StopRequest
from videoadapt.runtime.slurm import rank_env, slurm_job

if TYPE_CHECKING:  # importing `config` takes pydantic, which `--help` does not need
    from videoadapt.config.jobs import Stage
    from videoadapt.config.load import Config
    from videoadapt.runtime.files import Summary

T = TypeVar("T")

# The base class of all usage errors (click.UsageError). Newer versions of typer ship their own copy of click, so it is
# found through a class that typer exports.
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]

PROGRAM = "videoadapt"
COMPLETE_VARIABLE = "_VIDEOADAPT_COMPLETE"  # click's name for it
_NO_SPACE_IN_BASH = "[[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null"
INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells do

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=.*")  # section.key=value
_SETTING = re.compile(r"[a-z_]+=.*")  # key=value, of a benchmark

app = typer.Typer(
    add_completion=False,  # it would offer to edit the user's shell files
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # programming errors show Python's own traceback
    help="Train one TimeSformer at several token lengths; give each clip the fewest tokens that suffice. "
    "section.key=value after CONFIG overrides a key. "
    "VIDEOADAPT_TRACEBACK=1 in the environment shows the traceback of every error.",
)


def _print_version(asked: bool) -> None:
    if asked:
        # The versions of the installed packages: importing torch takes seconds.
        installed = ", ".join(f"{name} {version(name)}" for name in (PROGRAM, "torch"))
        print(f"{installed}, Python {platform.python_version()}")
        raise typer.Exit


def _print_completion(shell: str | None) -> None:
    if shell is not None:
        from typer.completion import get_completion_script

        completion_init()
        script = get_completion_script(prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE, shell=shell)
        # bash puts a space behind a word that it has completed, also behind `train.lr=`.
        print(script.replace("    return 0\n", f"    {_NO_SPACE_IN_BASH}\n    return 0\n"))
        raise typer.Exit


def _complete_key(start: str) -> list[str]:
    """Returns the keys of a config that begin with what is typed."""
    from videoadapt.config.load import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(start)]


@app.callback()
def options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the versions, and exit."),
    ] = False,
    _completion: Annotated[
        str | None,
        typer.Option(
            "--show-completion",
            metavar="SHELL",
            callback=_print_completion,
            is_eager=True,
            help="Print completion for bash, zsh or fish.",
        ),
    ] = None,
) -> None:
    """Declares the options that need no verb. The help of the app stands at `app`."""


bench = typer.Typer(no_args_is_help=True, help="Benchmark reading, points, the model and attention here.")
app.add_typer(bench, name="bench")

_CONFIG_HELP = "YAML config of the run, or its folder."
ConfigFile = Annotated[Path, typer.Argument(help=_CONFIG_HELP, show_default=False, metavar="CONFIG")]
OptionalConfig = Annotated[Path | None, typer.Argument(help=_CONFIG_HELP, show_default=False, metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value ...", show_default=False, metavar="KEY=VALUE", autocompletion=_complete_key),
]
VideosAndOverrides = Annotated[
    list[str], typer.Argument(help="Videos, folders of videos, and section.key=value.", metavar="VIDEO")
]


def _settings(names: str) -> Any:
    """Returns the argument for the settings of a benchmark, and the overrides of its config."""
    text = f"Settings of the benchmark ({names}), and section.key=value of the config."
    return typer.Argument(help=text, show_default=False, metavar="KEY=VALUE")


SettingsOfPoints = Annotated[list[str] | None, _settings("rounds=15, batches=[1,8], dir=FOLDER")]
SettingsOfModel = Annotated[list[str] | None, _settings("rounds=7, batches=[8], precisions, modes, passes, dir=FOLDER")]
SettingsOfAttention = Annotated[list[str] | None, _settings("rounds=15, batch=8, precisions, dir=FOLDER")]
SettingsAndVideos = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings of the benchmark (rounds=5, clips=6 per round ...), and video files to read instead of "
        "generated ones.",
        show_default=False,
        metavar="KEY=VALUE|VIDEO",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one verb, then exits.

    Args:
        arguments: The words after `videoadapt`. Default: the arguments of this process (`sys.argv`).

    Raises:
        SystemExit: Always. Code 0: success. 1: the run failed. 2: the input is wrong. 130: interrupted.
            143: the job was requeued or preempted.
        Exception: Any programming error, unchanged.
    """
    # By default, OpenMP threads spin while they wait at a barrier. That makes training 6 times slower as soon as
    # another process needs a core (docs/log.md). OpenMP reads the variable once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8; all results would be lost
    try:
        if COMPLETE_VARIABLE in os.environ:  # the shell asks for the words that may follow
            completion_init()
        # The handlers come first: a signal of the job would kill the process while it imports torch, for seconds.
        with StopRequest(JOB_SIGNALS if slurm_job(os.environ) else ()):
            code = app(args=arguments, prog_name=PROGRAM, standalone_mode=False) or 0  # errors are raised
        if code == INTERRUPTED:  # newer versions of typer turn Ctrl-C into this code
            raise KeyboardInterrupt
        sys.exit(code)
    except USAGE_ERROR as error:  # prints the usage of the verb with the error
        _suggest_override(error, sys.argv[1:] if arguments is None else arguments)
        error.show()
        sys.exit(INPUT_WRONG)
    except FAILURES as error:
        if not is_failure(error):
            raise
        fail(error)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; run the same command again to continue from the saved state", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _suggest_override(error: Any, words: Sequence[str]) -> None:
    """Names in the error of an unknown option the override that it was meant to be: train.epochs=3 for `--epochs 3`."""
    option = getattr(error, "option_name", "")
    if not hasattr(error, "possibilities"):  # another usage error; typer does not export the class of this one
        return
    from videoadapt.config.load import known_keys
    from videoadapt.config.suggest import suggest_keys

    keys = suggest_keys(option.lstrip("-").replace("-", "_"), known_keys())
    values = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    values += [value for word, value in pairwise(words) if word == option and not value.startswith("-")]
    if overrides := [shlex.quote(f"{key}={values[0] if values else '...'}") for key in keys if "." in key]:
        error.possibilities = []  # options that are spelt alike
        error.message = f"{error.message}. A key of the config has no dashes: write {' or '.join(overrides)}"


@app.command()
def demo(overrides: Overrides = None, as_json: Json = False) -> None:
    """Generate videos and run every stage on them, in minutes."""
    from videoadapt.commands.demo import demo as run
    from videoadapt.commands.tables import print_demo

    result = run(overrides or [])
    if as_json:
        _print_json(result.summary)
    else:
        print_demo(result)


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="Receives config.yaml.", metavar="DIR", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help="A folder per class, or a folder with train and val: lists (train.csv), or folders.",
            metavar="FOLDER",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Pretrained weights: a file, a folder, or the name of a timm model.", show_default=False),
    ] = None,
    *,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="Time for training on this machine if nothing else runs. It decides pixels, frozen blocks and epochs.",
            show_default="10, or 60 on a GPU",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at your data, and write a config for fine-tuning on them."""
    from videoadapt.commands.new import new as run
    from videoadapt.commands.new import print_new

    _show(run(folder, data, weights, overrides or [], minutes=minutes), as_json, print_new)


@app.command()
def index(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="MANIFEST", help="Check the files of this manifest (or run folder) instead. Needs no config."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Probe every listed video and write the manifest."""
    if check is not None:
        _check(check, _load(config, overrides) if config else None, as_json)
        return
    from videoadapt.commands.tables import print_index
    from videoadapt.data.index.manifest import index as run
    from videoadapt.data.index.manifest import index_path, require_readable
    from videoadapt.runtime.files import read_json

    loaded = _load(_required(config), overrides)
    manifest = run(loaded)
    # `index` returns the manifest, and writes its summary.
    _show(read_json(index_path(loaded), "run `videoadapt index` again"), as_json, print_index)
    require_readable(manifest, loaded)  # after the table, which names the unreadable files


def _check(manifest: Path, config: Config | None, as_json: bool) -> None:
    from videoadapt.commands.tables import print_check
    from videoadapt.config.load import Config
    from videoadapt.data.index.check import check

    result = check(manifest, config or Config())
    _show(result, as_json, print_check)
    if result.changes:  # exit code 1, so that a script can check a data set before a long run
        changes = ", ".join(f"{count} {change}" for change, count in result.changes.items())
        raise RunError(f"{manifest}: its files have changed: {changes}; run `videoadapt index` to make it anew")


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Stage 1: train one model at all points."""
    from videoadapt.commands.tables import print_train

    _show_stage("train", _load(config, overrides), as_json, print_train)


@app.command()
def label(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Stage 2: find the cheapest correct point of each clip."""
    from videoadapt.commands.tables import print_label

    _show_stage("label", _load(config, overrides), as_json, print_label)


@app.command()
def assign(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Stage 2: fit the assigner to the labels."""
    from videoadapt.commands.tables import print_assign

    _show_stage("assign", _load(config, overrides), as_json, print_assign)


@app.command()
def calibrate(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Choose the cheapest policy that keeps a promise on loss or cost."""
    from videoadapt.commands.tables import print_calibrate

    _show_stage("calibrate", _load(config, overrides), as_json, print_calibrate)


@app.command()
def evaluate(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="A further policy: its text, or the file of `calibrate`. May be given again.", show_default=False
        ),
    ] = None,
    against: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            metavar="RUN_A RUN_B",
            help="Compare two evaluated runs (FOLDER, or FOLDER:POLICY) instead of evaluating one.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy, cost and speed of all policies on split val."""
    from videoadapt.commands.tables import print_compare, print_evaluate

    if against is not None:  # no config, no model: only the tables of two evaluations
        from videoadapt.evaluation.compare import compare

        _show(compare(*against), as_json, print_compare)
    else:
        _show_stage("evaluate", _load(_required(config), overrides), as_json, print_evaluate, policy or ())


@app.command()
def launch(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print scripts, resources and dependencies of the jobs, and submit none.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Submit one stage or all stages to SLURM, or run them here."""
    from videoadapt.commands.launch import launch as run
    from videoadapt.commands.launch import plan_launch
    from videoadapt.commands.tables import print_launch, print_launch_plan

    loaded, words = _load(config, overrides), [str(config), *(overrides or [])]
    if dry_run:
        _show(plan_launch(loaded, words), as_json, print_launch_plan)
    else:
        _show(run(loaded, words), as_json, print_launch)


@app.command()
def flops(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Count the MACs of every point and, once evaluated, of every clip."""
    from videoadapt.commands.tables import print_flops
    from videoadapt.evaluation.costs import flops as run

    _show(run(_load(config, overrides)), as_json, print_flops)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders, side by side on one page.", metavar="RUN", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Write a page that shows what a run saved at what loss."""
    from videoadapt.commands.tables import print_report
    from videoadapt.reporting.page import report as run

    _show(run(*runs), as_json, print_report)


@app.command()
def plan(
    config: ConfigFile,
    gpus: Annotated[int, typer.Option(help="Number of ranks of the job, over all its nodes.", show_default=False)],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Predict step time, GPU-hours and memory of each layout."""
    from videoadapt.performance.plan import plan as run
    from videoadapt.performance.plan import print_plan

    _show(run(_load(config, overrides), gpus), as_json, print_plan)


@app.command()
def predict(
    config: ConfigFile,
    videos: VideosAndOverrides,
    policy: Annotated[
        str | None,
        typer.Option(
            help="assigned, fixed:POINT, cascade:POINTS:THRESHOLDS, cascade:POINTS:views:THRESHOLDS, "
            "leap:POINT:cost=0.4, or the file of `calibrate`. Default: assigned if the run has an assigner, otherwise "
            "fixed at the costliest point."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print classes, chosen points and cost of video files.

    Exit code 2, after the table: a file could not be read.
    """
    from videoadapt.commands.tables import print_predictions
    from videoadapt.evaluation.predict import predict_files

    # Both follow CONFIG in any order, which the command line cannot express otherwise.
    overrides, paths = _split(videos, _OVERRIDE)
    result = predict_files(_load(config, overrides), paths, policy).to_json()
    _show(result, as_json, print_predictions)
    if result["failed"]:  # after the table: one bad file does not hide the results of the others
        raise UserError(few((row["cause"] for row in result["failed"]), separator="; "))


@app.command()
def serve(
    config: ConfigFile,
    overrides: Overrides = None,
    policy: Annotated[str | None, typer.Option(help="As in `videoadapt predict`.")] = None,
) -> None:
    """Open a local page that explains the answer to a video."""
    from videoadapt.runtime.console import say

    # Before the imports, which are a part of the wait.
    say(f"serve: reads {config} and starts its model; on a busy machine this takes up to a minute")
    from videoadapt.commands.serve.server import serve as run

    run(_load(config, overrides), policy)


@app.command()
def export(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write the model for ONNX, torch.export, the hub, or Hugging Face."""
    from videoadapt.commands.tables import print_export
    from videoadapt.exporting.export import export as run

    _show(run(_load(config, overrides)), as_json, print_export)


@app.command("config")
def config_keys(
    key: Annotated[
        str | None,
        typer.Argument(
            help="A key, a section, a name in any section, or a word of the descriptions. Default: all keys.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON schema for editors instead.")] = False,
) -> None:
    """Print what a key of a config means, its values and its default."""
    from videoadapt.commands.tables import print_keys
    from videoadapt.config.reference import describe, editor_schema, find_keys, schema_of

    if as_json:
        _print_json(schema_of(key) if key else editor_schema())
    else:
        print_keys(find_keys(key) if key else describe())


@bench.command("data")
def bench_data(words: SettingsAndVideos = None, as_json: Json = False) -> None:
    """Measure clips per CPU-second and memory of our loaders, pytorchvideo's, torchcodec and ffmpeg."""
    from videoadapt.performance.bench.data import bench_data as run
    from videoadapt.performance.bench.data import print_bench_data

    settings, videos = _split(words or [], _SETTING)
    _show(run(settings, videos), as_json, print_bench_data)


@bench.command("points")
def bench_points(config: ConfigFile, words: SettingsOfPoints = None, as_json: Json = False) -> None:
    """Measure the speed of every point beside the speed that its MACs predict."""
    from videoadapt.performance.bench.points import bench_points as run
    from videoadapt.performance.bench.points import print_bench_points

    settings, overrides = _split(words or [], _SETTING)  # an override has a dot in its key, a setting has none
    _show(run(_load(config, overrides), settings), as_json, print_bench_points)


@bench.command("model")
def bench_model(config: ConfigFile, words: SettingsOfModel = None, as_json: Json = False) -> None:
    """Measure forward passes and training steps beside another implementation with the same weights."""
    from videoadapt.performance.bench.model import bench_model as run
    from videoadapt.performance.bench.model import print_bench_model

    settings, overrides = _split(words or [], _SETTING)
    _show(run(_load(config, overrides), settings), as_json, print_bench_model)


@bench.command("attention")
def bench_attention(config: ConfigFile, words: SettingsOfAttention = None, as_json: Json = False) -> None:
    """Measure the kernels of attention at the model's shapes, and write which is the fastest on this machine."""
    from videoadapt.performance.bench.attention import bench_attention as run
    from videoadapt.performance.bench.attention import print_bench_attention

    settings, overrides = _split(words or [], _SETTING)
    _show(run(_load(config, overrides), settings), as_json, print_bench_attention)


def _required(config: Path | None) -> Path:
    if config is None:
        raise UserError("missing argument CONFIG: the YAML config of the run, or its folder")
    return config


def _load(path: Path, overrides: Sequence[str] | None) -> Config:
    from videoadapt.config.load import load_config

    return load_config(path, overrides or [])


def _show_stage(
    stage: Stage, config: Config, as_json: bool, print_result: Callable[[Summary], None], policies: Sequence[str] = ()
) -> None:
    from videoadapt.runtime.console import say

    say(f"{stage}: {config.run.dir}")  # first: importing torch takes seconds, or a minute on a busy machine
    from videoadapt.commands.stage import run_stage
    from videoadapt.runtime.results import ShardResult

    result = run_stage(stage, config, policies)
    # One shard of an array job has no table: its result only names the shard.
    as_json = as_json or isinstance(result, ShardResult)
    summary = result.to_json()
    _show(summary, as_json, print_result)
    if not as_json:
        verb, *options = _following(stage, config, summary)
        say(f"next: {shlex.join(['videoadapt', verb, str(config.run.dir), *options])}")


def _following(stage: Stage, config: Config, summary: Summary) -> list[str]:
    """Returns the verb after this stage, and its options: `label` if an assigner has enough clips for a threshold."""
    if stage == "train":
        from videoadapt.commands.stage import has_assigner

        return ["label" if has_assigner(config) and _clips_suffice(config) else "evaluate"]
    if stage == "assign":
        from videoadapt.commands.tables import advised_leap

        leap = advised_leap(summary)
        return ["calibrate"] if config.data.calibrate else ["evaluate", *(["--policy", leap] if leap else [])]
    return [{"label": "assign", "calibrate": "evaluate", "evaluate": "report"}[stage]]


def _clips_suffice(config: Config) -> bool:
    from videoadapt.data.index.manifest import Manifest, manifest_path
    from videoadapt.routing.threshold import FEWEST, choosing_clips

    labelled = Manifest.load(manifest_path(config.run.dir)).split(
        "holdout" if config.label.source == "holdout" else "train"
    )
    return choosing_clips(len(labelled), config.assign.select) >= FEWEST


def _split(words: Sequence[str], pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Returns the words that match a pattern, and the others. A word that is the name of a file never matches."""
    # Not `Path.exists`: in most versions of Python, it raises an error for a word too long for the name of a file.
    matching = [word for word in words if pattern.fullmatch(word) and not os.path.exists(word)]
    return matching, [word for word in words if word not in matching]


def _show(result: T, as_json: bool, print_result: Callable[[T], None]) -> None:
    """Prints a result, as JSON or as tables. Of several ranks, rank 0 prints for the job."""
    if rank_env(os.environ).rank != 0:
        return
    if as_json:
        _print_json(result)
    else:
        print_result(result)


def _print_json(result: object) -> None:
    content = asdict(result) if is_dataclass(result) and not isinstance(result, type) else result
    print(json.dumps(content, indent=2, default=str))  # paths as text
