"""Code blocks of README and docs run at small size; lines that do not run name configs, keys and files that exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

import small_runs as runs
from doc_pages import (
    COMMAND,
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
from videoadapt.config.load import dump_config, known_keys, load_config, make_config
from videoadapt.data.synthetic import generate
from videoadapt.errors import ConfigError

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
    epochs = {"train": {"epochs": 1, "validate_every": 1}, "assign": {"epochs": 1}}
    config = runs.config(Path("data"), Path("runs/mine"), **epochs)
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
    """A bracket outside quotes is a pattern. bash keeps a pattern that matches no file; in zsh it is an error."""
    for block in (block for block in BLOCKS[name] if block.language == "bash"):
        for line in command_lines(block.text):
            bare = re.sub(r"\\.|'[^']*'|\"[^\"]*\"|(^|\s)#.*", "", line)
            assert not re.search(r"\S\[|\?|(?<!\$)\{", bare), f"{block}: quote the word with a pattern: {line}"


# ---- lines that do not run


def words_not_run() -> list[tuple[str, list[str]]]:
    found = []
    for name in NAMES:
        for block in BLOCKS[name]:
            if block.language == "bash":
                found += [(name, shlex.split(line, comments=True)) for line in lines_not_run(settings(name), block)]
    return [(name, words) for name, words in found if words]


NOT_RUN = words_not_run()


def verbs() -> set[tuple[str, ...]]:
    command = typer.main.get_command(app)
    found: set[tuple[str, ...]] = set()
    for name, verb in command.commands.items():  # type: ignore[attr-defined]
        inner = getattr(verb, "commands", {})
        found |= {(name, each) for each in inner} if inner else {(name,)}
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


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".md")])
def test_links_lead_to_files(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}, which is not there"
