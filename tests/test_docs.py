"""Code blocks of README and docs run at small size; other code on the pages names verbs, keys and files that exist."""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import small_runs as runs
from doc_pages import (
    COMMAND,
    FENCE,
    LANGUAGES,
    PAGES,
    ROOT,
    Block,
    Page,
    blocks_of,
    command_lines,
    executed,
    lines_not_run,
    page_names,
    unused,
)
from doc_server import SMALL, CommandServer
from videoadapt.commands.cli import app
from videoadapt.config.load import Config, dump_config, known_keys, load_config, make_config
from videoadapt.config.sections import ModelConfig
from videoadapt.data.synthetic import generate
from videoadapt.errors import ConfigError, UserError
from videoadapt.routing.policy import parse_policy

NAMES = page_names()
BLOCKS = {name: blocks_of(name) for name in NAMES}
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=.*")
TIMEOUT_S = 300
VIDEOS = {"train": 24, "val": 12}


def settings(name: str) -> Page:
    return PAGES.get(name, Page())


# ---- every block is run, or named in the list


def test_every_block_has_a_language_that_says_what_it_is() -> None:
    for block in (block for blocks in BLOCKS.values() for block in blocks):
        assert block.language in LANGUAGES, f"{block}: the tests do not know the language {block.language!r}"
        if block.language != "bash":
            assert not COMMAND.search(block.text), f"{block}: a command in a block that is not `bash`"


def test_the_list_names_what_the_pages_have() -> None:
    assert set(PAGES) <= set(NAMES)
    for name, page in PAGES.items():
        assert not unused(page, BLOCKS[name]), f"tests/doc_pages.py: {name} has no such text"


# ---- blocks that run


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    with CommandServer(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, server: CommandServer) -> Path:
    """A folder `kept` with data, a finished run on it, its config and a video, and `page`, where it was made.

    Each page runs in a copy named `page`: a manifest has absolute paths, and would be made again elsewhere.
    """
    parent = tmp_path_factory.mktemp("docs")
    folder = parent / "page"
    generate(folder / "data", VIDEOS, seed=3, workers=1)
    for name in ("configs", "tools", "slurm", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    config = runs.config(
        Path("data"),
        Path("runs/mine"),
        train={"epochs": 1, "validate_every": 1},
        assign={"epochs": 1},
        model={"points": ["8", "4"]},
    )
    (folder / "CONFIG").write_text(dump_config(config), encoding="utf-8")
    shutil.copy(next((folder / "data").rglob("*.mp4")), folder / "video.mp4")
    block = Block(
        "tests/test_docs.py", 0, "bash", "for v in train label assign evaluate; do videoadapt $v CONFIG; done"
    )
    run_shell(block, block.text, folder, shell_of(server, Page()))
    shutil.move(folder, parent / "kept")
    return parent


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if any(executed(settings(name), b) for b in BLOCKS[name])])
def test_the_blocks_of_a_page_run(
    name: str, server: CommandServer, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = settings(name)
    folder = prepared / "page"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(prepared / "kept", folder, symlinks=True)
    for target, source in page.copies.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (folder / source).is_dir() else shutil.copy
        copy(folder / source, path)
    monkeypatch.chdir(folder)
    shell = shell_of(server, page)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCKS[name]:
        text = executed(page, block)
        if block.language == "bash" and text.strip():
            shell = run_shell(block, text, folder, shell)
        if block.language == "python":
            exec(compile(text, str(block), "exec"), namespace)  # noqa: S102 - our own page


def shell_of(server: CommandServer, page: Page) -> dict[str, str]:
    """The environment of a page's first block."""
    return os.environ | {"PATH": f"{server.bin}{os.pathsep}{os.environ['PATH']}", SMALL: "\n".join(page.small.split())}


def run_shell(block: Block, text: str, folder: Path, shell: dict[str, str]) -> dict[str, str]:
    """Runs a block, and returns the environment at its end, for the page's next block."""
    state = folder / ".environment"
    # All variables are exported, so that the next block has them; any command that fails ends the block.
    script = f"set -aeuo pipefail\n{text}\nenv -0 > '{state}'\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=shell, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"{block}: exit code {done.returncode}\n{text}\n{done.stderr[-2000:]}"
    return dict(entry.split("=", 1) for entry in state.read_text().split("\0") if entry)


# ---- what a shell expands


@pytest.mark.parametrize("name", [name for name in NAMES if any(block.language == "bash" for block in BLOCKS[name])])
def test_zsh_expands_no_more_of_a_line_than_bash(name: str) -> None:
    """A bracket or star outside quotes is a pattern. If it matches no file, bash keeps it; in zsh it is an error."""
    for block in (block for block in BLOCKS[name] if block.language == "bash"):
        for line in command_lines(block.text):
            bare = re.sub(r"\\.|'[^']*'|\"[^\"]*\"|(^|\s)#.*", "", line)
            assert not re.search(r"\S\[|\?|(?<!\$)\{", bare), f"{block}: quote the word with a pattern: {line}"
            for word in filter(lambda word: "*" in word, bare.split()):
                assert glob.glob(word, root_dir=ROOT), f"{block}: quote {word}, or name files that exist: {line}"


# ---- lines that do not run


def words_not_run() -> list[tuple[str, list[str]]]:
    found = []
    for name in NAMES:
        for block in BLOCKS[name]:
            if block.language == "bash":
                found += [(name, shlex.split(line, comments=True)) for line in lines_not_run(settings(name), block)]
    return [(name, words) for name, words in found if words]


NOT_RUN = words_not_run()


def verbs() -> dict[tuple[str, ...], Any]:
    """The commands by their words: `train`, or `bench data`."""
    command: Any = typer.main.get_command(app)
    found: dict[tuple[str, ...], Any] = {}
    for name, verb in command.commands.items():
        inner = getattr(verb, "commands", {})
        found |= {(name, word): each for word, each in inner.items()} if inner else {(name,): verb}
    return found


@pytest.mark.parametrize(("page", "words"), NOT_RUN, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in NOT_RUN])
def test_a_line_that_is_not_run_names_what_exists(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIGHTS", "PHOTOS", "LISTS", "VIT_S"):  # configs have no default for these
        monkeypatch.setenv(name, name.lower())
    if "-m" in words and "videoadapt" in words:  # torchrun ... -m videoadapt VERB
        words = words[words.index("videoadapt") :]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert rest[0] in targets
    if program == "videoadapt":
        known = verbs()
        assert (rest[0],) in known or tuple(rest[:2]) in known, f"no verb {rest[0]}"
    paths = [word.rstrip(";") for word in rest if re.match("(configs|tools|slurm)/", word) and "*" not in word]
    for path in paths:
        assert (ROOT / path).exists(), f"{page}: no {path}"
    configs = [path for path in paths if path.startswith("configs/")]
    overrides = [word for word in rest if OVERRIDE.fullmatch(word)]
    for config in configs:
        load_config(ROOT / config, overrides)
    if not configs and overrides and program == "videoadapt":  # `CONFIG` stands for any
        for override in overrides:
            assert override.partition("=")[0] in known_keys(), f"{page}: no such key in {override}"


@pytest.mark.parametrize("name", [name for name in NAMES if any(block.language == "yaml" for block in BLOCKS[name])])
def test_the_yaml_of_a_page_is_a_config(name: str) -> None:
    """Each block is a part of a config: alone, or below the page's blocks before it."""
    before: dict[str, object] = {}
    for block in (block for block in BLOCKS[name] if block.language == "yaml"):
        sections = yaml.safe_load(block.text)
        try:
            make_config(sections)
        except ConfigError:
            make_config(before | sections)
        before |= sections


@pytest.mark.parametrize("name", [name for name in NAMES if any(block.language == "python" for block in BLOCKS[name])])
def test_the_python_of_a_page_is_python(name: str) -> None:
    for block in (block for block in BLOCKS[name] if block.language == "python"):
        compile(block.text, str(block), "exec")


# ---- code inside sentences

KEY = re.compile(r"(([a-z_]+)(?:\.[a-z_0-9]+)+)(=.*)?")  # `train.lr`, or `train.lr=0.01`
NO_KEYS = {"section.key", "model.class_names"}  # the form of a key, and an attribute in Python
FILES = (".json", ".safetensors")
POLICY = re.compile(r"(?:assigned|cascade|fixed|leap|mixture):\d\S*")  # not a form, such as `fixed:POINT`
POINTS = ("14", "14@0.7", "10", "10@0.5", "8", "7", "6", "6@0.5", "4")  # of the models on the pages


def spans(name: str) -> list[list[str]]:
    """The words of each piece of code inside the sentences of a page."""
    text = FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    return [code.split() for code in re.findall("`([^`]+)`", text)]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".md")])
def test_code_inside_a_sentence_names_verbs_options_keys_and_policies_that_exist(name: str) -> None:
    known, keys, sections = verbs(), known_keys(), set(Config.model_fields)
    for words in spans(name):
        rest = words[words[0] == "videoadapt" :]
        verb = known.get(tuple(rest[:1])) or known.get(tuple(rest[:2]))
        assert verb or rest == words or not re.match("[a-z]", " ".join(rest)), f"no verb in {words}"
        if verb:
            options = {option for parameter in verb.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, f"no such option in {words}"
        for key, section, value in (match.groups() for match in map(KEY.fullmatch, words) if match):
            if (value or section in sections) and key not in NO_KEYS and not key.endswith(FILES):
                assert any(each == key or each.startswith(f"{key}.") for each in keys), f"no key {key} in {words}"
        for text in POLICY.findall(" ".join(words)):
            require_policy(text)


def require_policy(text: str) -> None:
    """Parses the text of a policy, as far as that needs no run."""
    try:
        parse_policy(text, None, ModelConfig.model_construct(points=POINTS))
    except UserError as error:
        assert re.search("has no assigner|is fitted on a label table", str(error)), error


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".md")])
def test_links_lead_to_files(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}, which is not there"
