"""The command line: `videoadapt VERB CONFIG.yaml [section.key=value ...]`. A verb calls one function."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from videoadapt.errors import RunError, UserError
from videoadapt.runtime.signals import JOB_SIGNALS, StopRequest
from videoadapt.runtime.slurm import rank_env, slurm_job

# typer carries a click of its own in newer versions: its base class, wherever it lives
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]
INTERRUPTED = 130  # exit code

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One TimeSformer at several token lengths; each clip gets the fewest tokens that suffice. "
    "Keys of the config can be set behind it: section.key=value.",
)

ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML config.", show_default=False, metavar="CONFIG")]
OptionalConfig = Annotated[
    Path | None, typer.Argument(help="The run's YAML config.", show_default=False, metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value ...", show_default=False, metavar="[KEY=VALUE]...")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON alone.")]


def main() -> None:
    """Runs a verb; errors are one line. Exit 2: the input is wrong, 1: the run failed, 130: interrupted."""
    # Threads that spin at barriers make training 6 times slower as soon as another process needs a core (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with StopRequest(JOB_SIGNALS if slurm_job(os.environ) else ()):  # before torch is imported: see there
            code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:  # newer versions of typer turn Ctrl-C into this code
            raise KeyboardInterrupt
        sys.exit(code)
    except USAGE_ERROR as error:
        error.show()
        sys.exit(2)
    except UserError as error:
        _fail(error, 2)
    except RunError as error:
        _fail(error, 1)
    except OSError as error:
        _fail(error, 1)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _fail(error: Exception, code: int) -> None:
    place = rank_env(os.environ)
    rank = f" on rank {place.rank} of {place.world}" if place.world > 1 else ""
    print(f"error{rank}: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


def _required(config: Path | None) -> Path:
    if config is None:
        raise UserError("missing argument CONFIG, the run's YAML file")
    return config


def _run_stage(stage: Any, config: Any) -> dict[str, Any]:
    from videoadapt.commands.stage import run_stage

    return run_stage(stage, config)


def _load(path: Path, overrides: list[str] | None) -> Any:
    from videoadapt.config.load import load_config

    return load_config(path, overrides or [])


def _show(result: dict[str, Any], as_json: bool, printer: Any, *args: Any) -> None:
    if rank_env(os.environ).rank != 0:
        return  # rank 0 speaks for the job
    if as_json or "shard" in result:
        print(json.dumps(result, indent=2))
    else:
        printer(result, *args)


@app.command()
def demo(overrides: Overrides = None, as_json: Json = False) -> None:
    """Generate data, then run every stage on it, in minutes."""
    from videoadapt.commands.demo import demo as run
    from videoadapt.commands.demo import demo_config, print_demo
    from videoadapt.commands.tables import print_evaluate, print_flops

    result = run(overrides or [])
    if as_json:
        print(json.dumps(result, indent=2))
        return
    folder = demo_config(overrides or []).run.dir
    stored = [json.loads((folder / name).read_text()) for name in ("report/flops.json", "evaluate/evaluate.json")]
    print_flops(stored[0])
    print_evaluate(stored[1])
    print_demo(result, folder)


@app.command()
def index(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    check: Annotated[
        Path | None,
        typer.Option(
            metavar="MANIFEST", help="Look again at the files of a manifest (or run folder) instead; needs no config."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make the manifest: probe every listed video."""
    if check is not None:
        _check(check, _load(config, overrides) if config else None, as_json)
        return
    from videoadapt.commands.tables import print_index
    from videoadapt.data.index.manifest import index as run
    from videoadapt.data.index.manifest import index_path, require_readable

    loaded = _load(_required(config), overrides)
    manifest = run(loaded)
    _show(json.loads(index_path(loaded).read_text()), as_json, print_index)
    require_readable(manifest, loaded)


def _check(manifest: Path, config: Any, as_json: bool) -> None:
    from videoadapt.commands.tables import print_check
    from videoadapt.config.load import Config
    from videoadapt.data.index.check import check

    result = check(manifest, config or Config())
    _show(asdict(result), as_json, print_check)
    if result.changes:
        changes = ", ".join(f"{count} {change}" for change, count in result.changes.items())
        raise RunError(f"{manifest}: its files are not as they were: {changes}; `videoadapt index` makes it anew")


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Stage 1: train one model at all points."""
    from videoadapt.commands.tables import print_train

    _show(_run_stage("train", _load(config, overrides)), as_json, print_train)


@app.command()
def label(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Stage 2: find the cheapest right point of every clip."""
    from videoadapt.commands.tables import print_label

    _show(_run_stage("label", _load(config, overrides)), as_json, print_label)


@app.command()
def assign(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Stage 2: fit the assigner to the labels."""
    from videoadapt.commands.tables import print_assign

    _show(_run_stage("assign", _load(config, overrides)), as_json, print_assign)


@app.command()
def evaluate(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    against: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            metavar="RUN_A RUN_B",
            help="Compare two evaluated runs (folders, or FOLDER:POLICY) instead; needs no config.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Accuracy, cost and speed of all policies on the val split."""
    from videoadapt.commands.tables import print_compare, print_evaluate
    from videoadapt.evaluation.compare import compare

    if against is not None:
        _show(compare(*against), as_json, print_compare)
    else:
        _show(_run_stage("evaluate", _load(_required(config), overrides)), as_json, print_evaluate)


@app.command()
def launch(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Submit stages, or the chain of all, to SLURM, or run them here."""
    from videoadapt.commands.launch import launch as run
    from videoadapt.commands.launch import print_launch

    _show(run(_load(config, overrides), [str(config), *(overrides or [])]), as_json, print_launch)


@app.command()
def flops(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """MACs of every point; after an evaluation, of every clip."""
    from videoadapt.commands.tables import print_flops
    from videoadapt.evaluation.costs import flops as run
    from videoadapt.report.plots import draw_costs

    loaded = _load(config, overrides)
    result = run(loaded)
    drawn = draw_costs(loaded.run.dir, result)
    _show(result, as_json, print_flops)
    if drawn and not as_json:
        from videoadapt.runtime.console import say

        say("figures: " + ", ".join(map(str, drawn)))


@app.command()
def plan(
    config: ConfigFile,
    gpus: Annotated[int, typer.Option(help="Ranks of the job, over all its nodes.", show_default=False)],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Predicted step time, GPU-hours and memory of every layout of ranks."""
    from videoadapt.performance.plan import plan as run
    from videoadapt.performance.plan import print_plan

    summary = run(_load(config, overrides), gpus)
    _show(asdict(summary), as_json, lambda _: print_plan(summary))


VideosAndOverrides = Annotated[
    list[str], typer.Argument(help="Video files, and section.key=value.", metavar="VIDEO...")
]
PolicyName = Annotated[
    str | None,
    typer.Option(help="assigned, fixed:POINT or cascade:POINTS:THRESHOLDS [default: assigned if there is an assigner]"),
]
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=.*")


@app.command()
def predict(config: ConfigFile, videos: VideosAndOverrides, policy: PolicyName = None, as_json: Json = False) -> None:
    """Classes, chosen point and cost of video files."""
    from videoadapt.commands.tables import print_predictions
    from videoadapt.evaluation.predict import predict_files

    overrides = [word for word in videos if _OVERRIDE.fullmatch(word) and not Path(word).exists()]
    paths = [word for word in videos if word not in overrides]
    result = predict_files(_load(config, overrides), paths, policy)
    _show(result, as_json, print_predictions)
    if result["failed"]:
        raise UserError("; ".join(row["cause"] for row in result["failed"]))


bench = typer.Typer(no_args_is_help=True, help="Our parts beside what people would use instead, on this machine.")
app.add_typer(bench, name="bench")
SettingsAndVideos = Annotated[
    list[str] | None,
    typer.Argument(
        help="rounds=5, clips=6 (in a round) ...; video files instead of the generated ones.",
        show_default=False,
        metavar="[KEY=VALUE]... [VIDEO]...",
    ),
]
_SETTING = re.compile(r"[a-z_]+=.*")


@bench.command("data")
def bench_data(words: SettingsAndVideos = None, as_json: Json = False) -> None:
    """Clips per CPU-second and memory of our loaders, pytorchvideo's, torchcodec and ffmpeg."""
    from videoadapt.performance.bench.data import bench_data as run
    from videoadapt.performance.bench.data import print_bench_data

    settings = [word for word in words or [] if _SETTING.fullmatch(word) and not Path(word).exists()]
    videos = [word for word in words or [] if word not in settings]
    _show(run(settings, videos), as_json, print_bench_data)


@bench.command("points")
def bench_points(
    config: ConfigFile,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="rounds=15, batches=[1,8] ...; section.key=value of the config.",
            show_default=False,
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measured speed of every point beside what its MACs promise."""
    from videoadapt.performance.bench.points import bench_points as run
    from videoadapt.performance.bench.points import print_bench_points

    settings, overrides = _settings_and_overrides(words)
    _show(run(_load(config, overrides), settings), as_json, print_bench_points)


def _settings_and_overrides(words: list[str] | None) -> tuple[list[str], list[str]]:
    settings = [word for word in words or [] if _SETTING.fullmatch(word)]
    return settings, [word for word in words or [] if word not in settings]
