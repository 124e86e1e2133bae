"""Writes docs/config.md and the JSON schema of configs from the fields in videoadapt/config/sections.py and jobs.py.

    python tools/write_config_reference.py

A test fails while one of the files is not what this program would write.
"""

from __future__ import annotations

import json
from pathlib import Path

from videoadapt.config.reference import SCHEMA_FILE, SectionKeys, describe, editor_schema

PAGE = Path(__file__).parents[1] / "docs" / "config.md"

HEAD = """\
# Config keys

<!-- Written by tools/write_config_reference.py. Edit the docstrings in videoadapt/config instead. -->

All keys of a config, by section, with their defaults. [reference.md](reference.md#configs) says how configs are
written: `base`, overrides, variables of the environment. On the command line:

```bash
videoadapt config train.epochs   # one key
videoadapt config slurm          # a section
videoadapt config frames         # a name in any section
videoadapt config distillation   # no name of a key: a word of the descriptions
videoadapt config                # everything
videoadapt config --json         # the JSON schema
```

Editors that know YAML schemas (VS Code with the YAML extension, PyCharm, Neovim and Emacs with yaml-language-server)
complete keys, show these descriptions and mark errors, if this is the first line of a config:

```text
# yaml-language-server: $schema=PATH/schema.json
```

PATH is the folder `configs`, as an absolute path or from the folder of the config. All `configs/*.yaml` have the line.
"""


def page(sections: list[SectionKeys]) -> str:
    """Returns docs/config.md."""
    return "\n".join([HEAD, *map(_section, sections)])


def schema() -> str:
    """Returns the JSON schema as text."""
    return json.dumps(editor_schema(), indent=1) + "\n"


def _section(section: SectionKeys) -> str:
    rows = [
        f"| `{key.name}` | {_cell(key.values)} | `{_cell(key.default)}` | {_cell(key.description)} |"
        for key in section.keys
    ]
    columns = "| key | values | default | meaning |\n| --- | --- | --- | --- |\n"
    return f"## {section.name}\n\n{section.description}\n\n{columns}" + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(describe()), encoding="utf-8")
    SCHEMA_FILE.write_text(schema(), encoding="utf-8")
    print(f"{PAGE}\n{SCHEMA_FILE}")
