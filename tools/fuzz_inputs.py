"""Damages configs, lists, JSON, checkpoint headers and state files at random, and reports what gives no clear line.

    python tools/fuzz_inputs.py cases=2000 commands=100 seed=1
    python tools/fuzz_inputs.py "kinds=[lists, state files]"

Each case is a small valid file with one to six random edits. In this process, the functions of the package read
`cases` files of each kind: they must return, or raise UserError or RunError. `commands` files of each kind go through
the whole command line, each in a forked process: it must end with exit code 0, or with 1 or 2 and one error line below
1,000 characters. A case may take 10 s of CPU time, and 1 GiB of memory beyond what the imports take. Hypothesis, which
the `test` extra installs, draws the edits; the same seed draws the same cases. Exit code 1: at least one case failed.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from videoadapt.commands.cli import main
from videoadapt.commands.failure import INPUT_WRONG, RUN_FAILED
from videoadapt.config.load import Config, dump_config, load_config, make_config, parse_settings
from videoadapt.config.sections import Count, Section, Seed
from videoadapt.data.index import probe_pool
from videoadapt.data.index.annotations import list_videos
from videoadapt.data.index.manifest import Manifest
from videoadapt.data.synthetic import generate
from videoadapt.data.video.limits import DEFAULT_LIMITS
from videoadapt.errors import RunError, UserError
from videoadapt.evaluation.compare import compare
from videoadapt.evaluation.costs import flops
from videoadapt.evaluation.evaluate import evaluate
from videoadapt.model.checkpoint import KEY, load_model, save_checkpoint, train_checkpoints
from videoadapt.model.timesformer import TimeSformer
from videoadapt.model.weights.load import load_weights
from videoadapt.routing.assigner import load_assigner
from videoadapt.routing.fit_assigner import assign
from videoadapt.routing.label import label
from videoadapt.training.metrics import Metrics, TrainSummary
from videoadapt.training.train import train

SECONDS = 10  # CPU time of a case
CLOCK_SECONDS = 60  # time on the clock: waiting takes no CPU time
COMMAND_CLOCK_SECONDS = 600  # `index` starts processes, which takes a minute on a busy machine
GROWTH_BYTES = 1 << 30
MAX_LINE = 1000
HALF = 0.5
SIZES = {"train": 12, "val": 4}

# What hostile files have: numbers beyond any type, brackets, quotes, escapes, tags, aliases, names with a meaning.
WORDS = (
    [b"0", b"-1", b"1e999", b"1e-320", b"NaN", b"Infinity", b"9" * 30, b"9" * 5000, b"18446744073709551616", b"0x1F"]
    + [b"true", b"null", b"~", b"''", b'""', b"[]", b"{}", b"[" * 200, b'{"a":' * 200, b"]", b"}", b'"', b"'", b"\\"]
    + [b"&a ", b"*a", b"<<: *a", b"!!python/object:os.system ", b"!!int ", b"%YAML 9.9\n", b"---\n", b"...\n", b"# "]
    + [b"\0", b"\\u0000", b"\\ud800", b'"\\UFFFFFFFF"', b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\x1b[31m"]
    + [
        b"\n",
        b"\r\n",
        b"\t",
        b" " * 500,
        b",",
        b";",
        b": ",
        b"- ",
        b"../" * 40,
        b"/dev/zero",
        b"/dev/stdin",
        b"~root/x",
    ]
    + [b"$HOME", b"${NONE}", b"${A:-" * 9, b"base: a.yaml\n", b"model:\n", b"x" * 300, b"a " * 9000, b"\xc2\xb2"]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(("word", "word", "flip", "cut", "repeat", "swap", "end", "node", "node", "key")),
        st.floats(0, 1, exclude_max=True),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(WORDS),
        JSON_VALUES,
    ),
    min_size=1,
    max_size=6,
)
Edit = tuple[str, float, float, bytes, object]


KindName = Literal["configs", "lists", "JSON", "checkpoint headers", "state files"]  # keys of `kinds`


class Settings(Section):
    """The settings of this script."""

    cases: Count = 2000  # of each kind, in this process
    commands: Count = 100  # of each kind, through the command line
    kinds: list[KindName] = []  # all by default
    seed: Seed = 1


@dataclass
class Kind:
    """A kind of file: valid examples, and what reads them."""

    files: dict[str, bytes]  # by name in the run's folder
    read: Callable[[str], object]  # in this process
    words: Callable[[str], list[str]]  # of the command line
    as_json: bool = False  # edits of nodes are possible
    changes_run: bool = False  # reading may write into the run's folder, which is then restored


@dataclass
class Tally:
    """The results of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)  # by cause: the first case of each
    longest_s: float = 0.0
    most_bytes: int = 0


class TooLong(BaseException):
    """A case took too long. No `except Exception` catches it."""


def mutate(data: bytes, edits: Sequence[Edit], *, as_json: bool) -> bytes:
    """Applies edits to a file. Edits of nodes and keys change JSON values, the others bytes."""
    for kind, first, second, word, value in edits:
        if kind in ("node", "key"):
            data = _edit_json(data, kind, first, value) if as_json else data
            continue
        start = int(first * (len(data) + 1))
        stop = min(len(data), start + 1 + int(second**4 * len(data)))
        if kind == "word":
            data = data[:start] + word + data[start if second < HALF else stop :]
        elif kind == "flip":
            flipped = bytes([data[start] ^ (1 << int(second * 8))]) if start < len(data) else b""
            data = data[:start] + flipped + data[start + 1 :]
        elif kind == "cut":
            data = data[:start] + data[stop:]
        elif kind == "repeat":
            data = data[:start] + data[start:stop] * (2 + int(second * 50)) + data[stop:]
        elif kind == "swap":
            data = data[start:stop] + data[:start] + data[stop:]
        else:
            data = data[:start]
    return data[: 1 << 20]


def _edit_json(data: bytes, kind: str, where: float, value: object) -> bytes:
    """Replaces one node of a JSON document, or one key of an object, at a place drawn by `where`."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places = list(_places(content))
    if not places:
        return json.dumps(value).encode()
    parent, key = places[int(where * len(places))]
    if kind == "node":
        parent[key] = value
    elif isinstance(parent, dict):
        moved = parent.pop(key)
        if where < HALF:
            parent[str(value)[:20]] = moved
    else:
        parent.insert(key, value)
    return json.dumps(content).encode()


def _places(node: object) -> Iterator[tuple[Any, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield node, key
        yield from _places(inner)


# The kinds.


def config_of(folder: Path) -> Config:
    """Returns the config of a tiny run, whose data and results are below `folder`."""
    data = folder / "data"
    return make_config(
        {
            "run": {"dir": str(folder / "run"), "seed": 1, "device": "cpu"},
            "data": {
                "root": str(data),
                "train": {"annotations": str(data / "train.csv")},
                "val": {"annotations": str(data / "val.csv")},
                "classes": str(data / "classes.txt"),
                "workers": 0,
                "flip": 0.0,
            },
            "model": {
                "width": 16,
                "depth": 1,
                "heads": 1,
                "patch": 16,
                "size": 32,
                "num_frames": 2,
                "stride_frames": 2,
                "fps": None,
                "num_classes": 12,
                "points": ["2", "1"],
            },
            "train": {"epochs": 1, "batch": 4, "optimizer": "adamw", "lr": 0.001, "schedule": "cosine", "ema": 0.5},
            "assign": {"frames": 1, "size": 32, "channel_multiplier": 0.25, "stages": 1, "epochs": 1, "batch": 4},
            "evaluate": {"spatial_crops": 1, "batch": 4, "speed_clips": 0},
        }
    )


def make_run(folder: Path) -> Config:
    """Generates videos and runs every stage on them, in a process of its own.

    Its helper processes (multiprocessing's forkserver) end with it: a process forked later could not use them.
    """
    process = os.fork()
    if process == 0:
        try:
            _make_run(folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise RunError("the run to damage could not be made; its error is above")
    return config_of(folder)


def _make_run(folder: Path) -> None:
    generate(folder / "data", SIZES, seed=3, workers=1)
    config = config_of(folder)
    for stage in (train, label, assign, evaluate):
        stage(config)
    flops(config)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")


def kinds(folder: Path, config: Config) -> dict[str, Kind]:
    """Returns all kinds of files of a finished run."""
    file, videos = str(folder / "config.yaml"), sorted(map(str, (folder / "data").rglob("*.mp4")))
    return written_by_people(folder, config) | {
        "checkpoint headers": header_kind(folder, config, ["predict", file, videos[0]]),
        "state files": state_kind(config, file, videos[0]),
    }


def written_by_people(folder: Path, config: Config) -> dict[str, Kind]:
    """Returns configs, lists and JSON about the videos in the folder `data`."""
    file = str(folder / "config.yaml")
    fixed = [f"run.dir={config.run.dir}", "run.device=cpu"]  # a damaged config must write nowhere else
    data, val = folder / "data", f"data.val.annotations={folder / 'data' / 'val.csv'}"

    def listed(name: str) -> list[str]:
        key = "data.classes" if name.startswith("classes") else "data.train.annotations"
        return [f"{key}={folder / name}", "run.dir=" + str(folder / "indexed"), val]

    def list_files(name: str) -> object:
        return list_videos(load_config(file, listed(name)))

    table = (data / "train.csv").read_bytes()
    names = (data / "classes.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(",") for line in table.decode().splitlines()[1:6]]
    videos = sorted(str(path.relative_to(data)) for path in data.rglob("*.mp4"))[:5]
    texts = {
        "a.csv": b"\n".join(table.splitlines()[:6]),
        "a.txt": "".join(f"{video} {number}\n" for number, video in enumerate(videos)).encode(),
        "b.txt": "".join(f'"{video}",{names[0]}\n' for video in videos).encode(),
        "c.txt": b"# a comment\npath label\n" + "".join(f"{video}\t2\n" for video in videos).encode(),
        "classes.txt": "\n".join(names).encode(),
        "classes_numbered.txt": "\n".join(f"{number} {name}" for number, name in enumerate(names, 1)).encode(),
    }
    documents = {
        "kinetics.json": {
            f"abcdefghij{n}": {"annotations": {"label": names[n], "segment": [n, n + 10]}, "subset": "train"}
            for n in range(len(rows))
        },
        "ssv2.json": [{"id": str(n), "template": names[n], "label": "a"} for n in range(5)],
        "classes.json": {name: number for number, name in enumerate(names)},
        "classes_listed.json": [{"id": number, "name": name} for number, name in enumerate(names)],
    }
    return {
        "configs": Kind(
            {
                "config.yaml": dump_config(config).encode(),
                "json.yaml": json.dumps(config.model_dump(mode="json")).encode(),
            },
            lambda name: load_config(folder / name, fixed),
            lambda name: random_words(name, folder, fixed),
            as_json=True,
        ),
        "lists": Kind(texts, list_files, lambda name: ["index", file, *listed(name)]),
        "JSON": Kind(
            {name: json.dumps(content).encode() for name, content in documents.items()},
            list_files,
            lambda name: ["index", file, *listed(name)],
            as_json=True,
        ),
    }


def random_words(name: str, folder: Path, fixed: list[str]) -> list[str]:
    """Returns a command that reads a config and soon ends."""
    verb = random.choice(("flops", "plan", "index"))
    more = ["--gpus", "2", "plan.macs_per_s=1e12"] if verb == "plan" else []
    return [verb, str(folder / name), *fixed, *more]


def header_kind(folder: Path, config: Config, command: list[str]) -> Kind:
    """Headers are JSON twice: safetensors' own, and ours in its metadata. Ours gets its checksum again, if it can."""
    newest = max((config.run.dir / "checkpoints").glob("step-*.safetensors"))
    header, ours, _ = split_header(newest.read_bytes())
    path = folder / "damaged.safetensors"

    def read(name: str) -> object:
        write_header(path, name, folder, newest)
        if random.random() < HALF:
            return load_weights(TimeSformer(config.model), str(path))
        return load_model(path, config.model)

    def words(name: str) -> list[str]:
        write_header(path, name, folder, newest)
        return [*command, f"run.checkpoint={path}"]

    return Kind({"safetensors.json": header, "videoadapt.json": ours}, read, words, as_json=True)


def split_header(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Returns safetensors' header, our JSON in it, and the tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    return header, json.loads(header)["__metadata__"][KEY].encode(), data[8 + length :]


def write_header(path: Path, name: str, folder: Path, newest: Path) -> None:
    """Writes a checkpoint with the damaged header of the file `name`."""
    damaged, whole = (folder / name).read_bytes(), newest.read_bytes()
    header, _, tensors = split_header(whole)
    if name == "videoadapt.json":
        try:
            values = json.loads(damaged)
            kind = values.pop("kind")
            values.pop("version")
            values.pop("checksum")
            save_checkpoint(path, kind, train_checkpoints(newest.parents[1]).latest().tensors, values)  # type: ignore[union-attr]
            return
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):  # it cannot get a checksum
            content = json.loads(header)
            content["__metadata__"][KEY] = damaged.decode(errors="replace")
            damaged = json.dumps(content).encode()
    path.write_bytes(struct.pack("<Q", len(damaged)) + damaged + tensors)


def state_kind(config: Config, file: str, video: str) -> Kind:
    """Every file of a run's folder but the checkpoints, with the verbs that read it."""
    run = config.run.dir

    def read_probed() -> object:
        return probe_pool._read_cache(run / "probed.jsonl", "", DEFAULT_LIMITS, full=False)

    readers: dict[str, tuple[Callable[[], object], list[str]]] = {
        "manifest.parquet": (lambda: Manifest.load(run / "manifest.parquet"), ["label", file]),
        "train.json": (lambda: TrainSummary.read(run / "train.json"), ["train", file]),
        "metrics.jsonl": (lambda: Metrics(run, 2).close(), ["train", file]),
        "probed.jsonl": (
            lambda: probe_pool._read_cache(run / "probed.jsonl", "", DEFAULT_LIMITS, full=False),
            ["index", file],
        ),
        "checkpoints/last": (lambda: train_checkpoints(run).latest(), ["evaluate", file]),
        "assigner/last": (lambda: load_assigner(run), ["predict", file, video]),
        "labels/label.json": (lambda: label(config), ["assign", file]),
        "labels/outcomes.parquet": (lambda: assign(config), ["assign", file]),
        "evaluate/evaluate.json": (lambda: evaluate(config), ["evaluate", file]),
        "evaluate/clips.parquet": (lambda: flops(config), ["flops", file]),
        "evaluate/videos.parquet": (lambda: compare(str(run), str(run)), ["evaluate", "--compare", str(run), str(run)]),
    }
    for path in (run / "assigner").glob("thumbnails-*"):
        readers[f"assigner/{path.name}"] = (lambda: assign(config), ["assign", file])
    files = {name: (run / name).read_bytes() for name in readers if (run / name).is_file()}
    prefix = f"{run.name}/"
    return Kind(
        {prefix + name: data for name, data in files.items()},
        lambda name: readers[name.removeprefix(prefix)][0](),
        lambda name: readers[name.removeprefix(prefix)][1],
        changes_run=True,
    )


# Running them.


@contextmanager
def limits(clock_s: float = CLOCK_SECONDS) -> Iterator[None]:
    """Raises TooLong after `SECONDS` of CPU time or `clock_s`, and MemoryError beyond `GROWTH_BYTES`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {SECONDS} s of CPU time, or {clock_s:g} s")

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GROWTH_BYTES, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    alarm = signal.setitimer(signal.ITIMER_REAL, clock_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.setitimer(signal.ITIMER_REAL, *alarm)  # of a test runner


def in_process(kind: Kind, name: str) -> tuple[str, str]:
    """Reads one damaged file. Returns the outcome, and the cause if it is a failure."""
    try:
        with limits(), quiet():
            kind.read(name)
    except (UserError, RunError) as error:
        return ("refused", "") if str(error) else ("failed", "a message without text")
    except SystemExit as error:
        return "failed", f"SystemExit {error.code}"
    except (Exception, TooLong) as error:  # everything else is a fault
        at = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in at if "/videoadapt/" in frame.filename] or at
        return (
            "failed",
            f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {str(error)[:150]}",
        )
    return "accepted", ""


def by_command(words: list[str], out: Path) -> tuple[str, str, float, int]:
    """Runs the command in a forked process. Returns outcome, cause of a failure, CPU seconds, and peak memory."""
    process = os.fork()
    if process == 0:
        os.setsid()  # its workers belong to its process group
        with out.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        try:
            with limits(COMMAND_CLOCK_SECONDS):
                main(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 99
        except BaseException:  # as Python itself prints it
            traceback.print_exc()
            code = 98
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status, used = os.wait4(process, 0)
    with suppress(ProcessLookupError):  # usually, nothing of the session is left
        os.killpg(process, signal.SIGKILL)
    text = out.read_text(encoding="utf-8", errors="replace")
    return *judge(os.waitstatus_to_exitcode(status), text), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def judge(code: int, text: str) -> tuple[str, str]:
    """Returns the outcome of a command, and the cause if it failed."""
    lines = [line for line in text.splitlines() if line.startswith("error")]
    if code == 0:
        return "accepted", ""
    if code not in (RUN_FAILED, INPUT_WRONG) or "Traceback" in text:
        return "failed", f"exit {code}: {' '.join(text.split())[-250:]}"
    if len(lines) != 1 or len(lines[0]) >= MAX_LINE:
        return "failed", f"exit {code} with {len(lines)} error lines, {max(map(len, lines), default=0)} characters"
    return ("refused" if code == INPUT_WRONG else "exit 1"), ""


@contextmanager
def quiet() -> Iterator[None]:
    """Sends what is printed to nowhere."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def run_kind(kind: Kind, folder: Path, count: int, first_seed: int, *, commands: bool) -> Tally:
    """Tries `count` damaged files of a kind. The run's folder is as before after each."""
    tally, names = Tally(), sorted(kind.files)
    pristine = folder.with_name(f"{folder.name}-pristine")

    @seed(first_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(names), EDITS)
    def case(name: str, edits: list[Edit]) -> None:
        if sum(tally.outcomes.values()) >= count:
            return
        random.seed(repr((name, edits)))
        damaged = mutate(kind.files[name], edits, as_json=kind.as_json)
        (folder / name).write_bytes(damaged)
        began = time.process_time()
        if commands:
            outcome, cause, seconds, used = by_command(kind.words(name), folder / "out.txt")
        else:
            outcome, cause = in_process(kind, name)
            seconds, used = time.process_time() - began, 0
        tally.outcomes[outcome] += 1
        tally.longest_s, tally.most_bytes = max(tally.longest_s, seconds), max(tally.most_bytes, used)
        if outcome == "failed" and cause not in tally.failures:
            kept = folder.with_name(f"{folder.name}-failures") / f"{len(tally.failures)}-{Path(name).name}"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(damaged)
            tally.failures[cause] = f"{name}, kept as {kept}"
        if commands or kind.changes_run:
            restore(pristine, folder)

    case()
    return tally


def restore(pristine: Path, folder: Path) -> None:
    """Brings the run's folder back to its state before the case. The videos are never written to."""
    shutil.rmtree(folder / "run")
    shutil.copytree(pristine / "run", folder / "run")
    shutil.copy(pristine / "config.yaml", folder / "config.yaml")


def fuzz(options: Settings) -> bool:
    """Tries all kinds, prints a table, and returns whether nothing failed. Then nothing is left of its files."""
    here, folder = Path.cwd(), Path(tempfile.mkdtemp(prefix="videoadapt-fuzz-")) / "a"
    folder.mkdir()
    config = make_run(folder)
    shutil.copytree(folder, folder.with_name("a-pristine"))
    os.chdir(folder)
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("| kind | through | accepted | refused | exit 1 | failed | longest, CPU s | peak beyond the imports, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    failures: dict[str, str] = {}
    for name, kind in kinds(folder, config).items():
        if options.kinds and name not in options.kinds:
            continue
        for commands in (False, True):
            count = options.commands if commands else options.cases
            tally = run_kind(kind, folder, count, options.seed + commands, commands=commands)
            peak = tally.most_bytes if commands else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            counts = " | ".join(str(tally.outcomes[key]) for key in ("accepted", "refused", "exit 1", "failed"))
            through = "the command" if commands else "functions"
            mib = max(0, peak - imported) >> 20
            print(f"| {name} | {through} | {counts} | {tally.longest_s:.1f} | {mib} |", flush=True)
            failures |= {f"{name}: {cause}": where for cause, where in tally.failures.items()}
    for cause, where in failures.items():
        print(f"{cause}\n    {where}")
    os.chdir(here)
    if not failures:
        shutil.rmtree(folder.parent)
    return not failures


if __name__ == "__main__":
    try:
        sys.exit(0 if fuzz(parse_settings(Settings, "fuzz_inputs", sys.argv[1:])) else 1)
    except UserError as error:
        sys.exit(f"error: {error}")
