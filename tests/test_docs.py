"""The code blocks of README and docs: commands, configs and keys exist, and README's Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import small_runs as runs
from videoadapt.commands.cli import app
from videoadapt.config.load import known_keys, load_config, make_config
from videoadapt.routing.fit_assigner import assign
from videoadapt.routing.label import label
from videoadapt.training.train import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HISTORY = {"log.md"}  # a dated log keeps the commands of its day
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+=.*")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def command_lines() -> list[tuple[str, list[str]]]:
    """The page and the words of every line of a shell block, without comments."""
    found = []
    for page in PAGES:
        if page.name in HISTORY:
            continue
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found.append((page.relative_to(ROOT).as_posix(), words))
    return found


LINES = command_lines()


def verbs() -> set[tuple[str, ...]]:
    command = typer.main.get_command(app)
    found: set[tuple[str, ...]] = set()
    for name, verb in command.commands.items():  # type: ignore[attr-defined]
        inner = getattr(verb, "commands", {})
        found |= {(name, each) for each in inner} if inner else {(name,)}
    return found


def test_pages_have_command_lines() -> None:
    assert len(LINES) > 40
    assert len({page for page, _ in LINES}) > 8


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{page}: {' '.join(words)[:60]}" for page, words in LINES])
def test_a_command_line_names_what_exists(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIGHTS", "VIT_S"):  # configs/fights.yaml has no default for these
        monkeypatch.setenv(name, name.lower())
    if "-m" in words and "videoadapt" in words:  # torchrun ... -m videoadapt VERB
        words = words[words.index("videoadapt") :]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert rest[0] in targets
    if program in {"python", "bash"} and rest[0].endswith((".py", ".sbatch", ".sh")):
        assert (ROOT / rest[0]).is_file()
    if program == "videoadapt":
        known = verbs()
        assert (rest[0],) in known or tuple(rest[:2]) in known, f"no verb {rest[0]}"
    configs = [word.rstrip(";") for word in rest if word.startswith("configs/") and "*" not in word]
    overrides = [word for word in rest if OVERRIDE.fullmatch(word)]
    for config in configs:
        assert (ROOT / config).is_file()
        load_config(ROOT / config, overrides)
    if not configs and overrides and program == "videoadapt":  # `CONFIG` stands for any
        for override in overrides:
            assert override.partition("=")[0] in known_keys(), f"{page}: no such key in {override}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_yaml_of_a_page_is_a_config(page: Path) -> None:
    sections: dict[str, object] = {}
    for block in blocks(page, "yaml"):  # the blocks of a page are one config
        sections |= yaml.safe_load(block)
    make_config(sections)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = runs.make_data(tmp_path / "data")
    config = runs.config(data, tmp_path / "runs" / "demo")
    for stage in (train, label, assign):
        stage(config)
    video = next(iter((data).rglob("*.mp4")))
    (tmp_path / "clip.mp4").symlink_to(video)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    (program,) = blocks(ROOT / "README.md", "python")
    namespace: dict[str, object] = {}
    exec(compile(program, "README.md", "exec"), namespace)  # noqa: S102 - our own page
    assert namespace["logits"].shape == (1, 400)  # type: ignore[attr-defined]
    assert namespace["prediction"].points[0] in config.model.points  # type: ignore[attr-defined]
