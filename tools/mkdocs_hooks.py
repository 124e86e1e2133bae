"""Makes one site of README, CONTRIBUTING, CHANGELOG, docs/, and the files of the repository to which they link.

Pages link to files as the repository's web view needs it: `../configs/demo.yaml`. The site shows each linked file on a
page of its own, so that the links work without a repository on the web, too.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SOURCES = "source"  # the folder of the site with the pages of linked files
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sbatch": "bash", ".json": "json"}
LINK = re.compile(r"""(\]\(|\ssrc(?:set)?=")([^)\s#"]+)(#[^)\s"]*)?(\)|")""")  # of Markdown, and of a <picture>
# Room for code of 120 characters and for wide tables, which scroll on their own where the screen is narrow.
STYLE = """
.md-grid { max-width: 78rem; }
.md-typeset table:not([class]) { font-size: .68rem; }
.md-typeset table:not([class]) th, .md-typeset table:not([class]) td { padding: .5em .9em; min-width: 0; }
.md-typeset table:not([class]) code { word-break: normal; }
.md-typeset pre > code { font-size: .75em; }
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside docs/, the pages of linked files, and the style sheet."""
    linked: set[Path] = set()
    for origin in [*map(Path, PAGES), *sorted(Path("docs", file.src_uri) for file in files.documentation_pages())]:
        linked |= _linked(origin)
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    for path in sorted(linked):
        files.append(File.generated(config, _uri(path), content=_shown(path), inclusion=InclusionLevel.NOT_IN_NAV))
    files.append(File.generated(config, "stylesheet.css", content=STYLE))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page, which are relative to its file in the repository."""
    uri = page.file.src_uri
    if uri.startswith(f"{SOURCES}/"):
        origin = Path(uri).relative_to(SOURCES).with_suffix("")
        if origin.suffix != ".ipynb":  # code
            return markdown
    else:
        origin = next((Path(name) for name, page_uri in PAGES.items() if page_uri == uri), Path("docs", uri))

    def rewritten(link: re.Match[str]) -> str:
        path = _target(origin, link[2])
        return link[0] if path is None else f"{link[1]}{_relative(path, uri)}{link[3] or ''}{link[4]}"

    return LINK.sub(rewritten, markdown)


def _linked(origin: Path) -> set[Path]:
    """The paths that a page links to, and that are not part of the site by themselves."""
    links = LINK.finditer((ROOT / origin).read_text(encoding="utf-8"))
    targets = {_target(origin, link[2]) for link in links}
    return {path for path in targets if path and _uri(path).startswith(f"{SOURCES}/") and (ROOT / path).exists()}


def _target(origin: Path, link: str) -> Path | None:
    """The path, relative to the repository, to which a page links. None: another site, or a path outside."""
    if ":" in link or link.startswith("/"):
        return None
    path = Path(os.path.normpath(origin.parent / link))
    return None if path.parts[:1] == ("..",) else path


def _uri(path: Path) -> str:
    """The source name that a path of the repository has on the site."""
    if path.as_posix() in PAGES:
        return PAGES[path.as_posix()]
    if path.parts[0] == "docs" and (ROOT / path).is_file() and path.suffix != ".ipynb":
        return path.relative_to("docs").as_posix()
    return f"{SOURCES}/{path.as_posix()}.md"


def _relative(path: Path, uri: str) -> str:
    return Path(os.path.relpath(_uri(path), Path(uri).parent)).as_posix()


def _shown(path: Path) -> str:
    """The page of a file, or of a folder."""
    title = f"---\ntitle: {path.as_posix()}\nsearch: {{exclude: true}}\n---\n\n# `{path.as_posix()}`\n\n"
    if (ROOT / path).is_dir():
        return title + "".join(f"- `{each.name}`\n" for each in sorted((ROOT / path).iterdir()) if each.is_file())
    content = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join(map(_cell, json.loads(content)["cells"]))
    return f"{title}``````{LANGUAGES.get(path.suffix, 'text')}\n{content}\n``````\n"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
