"""`report`: one HTML file that shows what a run, or several, saved at what loss. It opens without a network.

The page is a Jinja2 template with its data as JSON. ECharts draws the charts, Tabulator the tables. Both are inside the
page (`template/vendor/`, with their licences; `tools/update_page_libraries.py` fetches them).
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from videoadapt.config.load import Config, ConfigSource, as_config, dump_config
from videoadapt.data.index.manifest import Manifest, manifest_path
from videoadapt.errors import UserError, plural
from videoadapt.evaluation.evaluated import as_evaluated
from videoadapt.reporting.examples import examples
from videoadapt.reporting.run_data import MOST_FAILED, Part, run_data
from videoadapt.reporting.sentence import points, share
from videoadapt.runtime.console import duration, macs
from videoadapt.runtime.files import Summary, replacing, write_csv, write_parquet
from videoadapt.runtime.machine import versions
from videoadapt.runtime.results import Result, Table

PAGE = "report.html"
SEVERAL = "compare.html"
MOST_RUNS = 8  # more cannot be told from one another in a chart
_FOLDER = files("videoadapt.reporting") / "template"


@dataclass(frozen=True, repr=False)
class ReportSummary(Result):
    """What `report` has written. The names are keys of its JSON."""

    page: Path
    runs: list[Path]
    sentences: list[str]  # what was saved at what loss, by run
    tables: list[Path]  # the data behind the page
    bytes: int
    seconds: float

    def content(self) -> Summary:
        """Returns the fields, with paths as text."""
        paths = {"page": str(self.page), "runs": list(map(str, self.runs)), "tables": list(map(str, self.tables))}
        return vars(self) | paths

    def table(self) -> Table:
        """Returns the sentence of each run."""
        rows = list(zip((run.name for run in self.runs), self.sentences, strict=True))
        return Table(f"{self.page} ({self.bytes / 1e6:.1f} MB)", ("run", "result"), rows)


def report(*runs: ConfigSource) -> ReportSummary:
    """Writes the page of one run, or of several side by side, and the tables behind it.

    The page of one run is `report/report.html` of its folder. That of several is `report/compare.html` of the first.
    Each run's tables are written into its own `report/`.

    Args:
        runs: Run folders, configs or their files.

    Raises:
        UserError: No run is given, a run is given twice, or a file of a run is damaged.
    """
    start = time.monotonic()
    configs = [as_config(run) for run in runs]
    _require_different(configs)
    data = [_read(config) for config in configs]
    _tell_apart(data)
    tables = [path for config, part in zip(configs, data, strict=True) for path in _write_tables(config, part)]
    path = configs[0].run.dir / "report" / (PAGE if len(configs) == 1 else SEVERAL)
    text = render(data, command(configs))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return ReportSummary(
        page=path,
        runs=[config.run.dir for config in configs],
        sentences=[_sentence(part) for part in data],
        tables=tables,
        bytes=path.stat().st_size,
        seconds=round(time.monotonic() - start, 1),
    )


def _require_different(configs: Sequence[Config]) -> None:
    if not 0 < len(configs) <= MOST_RUNS:
        raise UserError(f"report: takes 1 to {MOST_RUNS} runs, and got {len(configs)}")
    folders = [config.run.dir.resolve() for config in configs]
    twice = next((folder for number, folder in enumerate(folders) if folder in folders[:number]), None)
    if twice is not None:
        raise UserError(f"report: {twice} is given twice")


def _tell_apart(data: Sequence[Part]) -> None:
    """Adds folders before the names of runs that are equal, until they differ."""
    folders = [Path(part["folder"]) for part in data]
    for parents in range(1, max(len(folder.parts) for folder in folders)):
        names = [part["name"] for part in data]
        for part, folder in zip(data, folders, strict=True):
            if names.count(part["name"]) > 1:
                part["name"] = "/".join(folder.parts[-1 - parents :])


def command(configs: Sequence[Config]) -> str:
    """Returns the command that writes this page again."""
    return shlex.join(["videoadapt", "report", *(str(config.run.dir) for config in configs)])


def _read(config: Config) -> Part:
    """Reads a run: its figures, and pictures of its clips where the videos are the evaluated ones."""
    data = run_data(config) | {"config": dump_config(config)}
    evaluation, path = data["evaluation"], manifest_path(config.run.dir)
    if evaluation is not None and path.exists():
        evaluation["examples"] = examples(as_evaluated(config), Manifest.load(path), evaluation["clips"])
    return data


def _sentence(data: Part) -> str:
    if data["evaluation"] is not None:
        return str(data["evaluation"]["headline"]["sentence"])
    dear, cheap = data["points"][0], data["points"][-1]
    return (
        f"Not evaluated: a view costs {macs(dear['macs_per_view'])} multiply-adds at point {dear['point']} and "
        f"{macs(cheap['macs_per_view'])} at point {cheap['point']}."
    )


def _write_tables(config: Config, data: Part) -> list[Path]:
    """Writes the tables behind the page of an evaluated run."""
    if data["evaluation"] is None:
        return []
    folder, evaluation = config.run.dir / "report", data["evaluation"]
    flat = [{key: value for key, value in row.items() if not isinstance(value, (dict, list))} for row in _rows(data)]
    write_parquet(folder / "page_clips.parquet", evaluation["clips"])
    write_csv(folder / "page_classes.csv", evaluation["classes"])
    write_csv(folder / "page_policies.csv", pd.DataFrame(flat))
    return [folder / name for name in ("page_clips.parquet", "page_classes.csv", "page_policies.csv")]


def _rows(data: Part) -> list[Part]:
    rows = []
    for row in data["evaluation"]["policies"]:
        change, low, high = row["difference"]
        rows.append(row | {"top1_change": change, "top1_change_low": low, "top1_change_high": high})
    return rows


def render(data: Sequence[Part], command: str) -> str:
    """Returns the page as HTML.

    Args:
        data: The parts of each run; see `run_data`.
        command: The command that makes the page.
    """
    # Jinja2 escapes every value, `tojson` also for scripts: names of files and classes are other people's texts.
    pages = Environment(
        loader=PackageLoader("videoadapt.reporting", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    pages.filters |= {"macs": macs, "points": points, "share": share, "duration": duration}
    pages.globals["plural"] = plural
    shown = [_shown(part) for part in data]
    return pages.get_template("page.html").render(
        runs=shown,
        sentences=[_sentence(part) for part in data],
        data=plain({"runs": [_scripted(part) for part in shown]}),
        command=command,
        made=datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        versions=versions(("videoadapt", "torch")),
        libraries=_libraries(),
        most_failed=MOST_FAILED,
        style=_inline("page.css"),
        script=_inline("page.js"),
        charts=_inline("vendor/echarts.min.js"),
        tables=_inline("vendor/tabulator.min.js"),
        table_style=_inline("vendor/tabulator.min.css"),
        font=base64.b64encode((_FOLDER / "vendor" / "inter.woff2").read_bytes()).decode(),
    )


def _shown(data: Part) -> Part:
    """Returns the parts of a run with its tables as columns: rows of dicts would repeat every name 20,000 times."""
    evaluation = data["evaluation"]
    if evaluation is None:
        return data
    tables = {name: columns(evaluation[name]) for name in ("clips", "classes")}
    return data | {"evaluation": evaluation | tables}


def _scripted(data: Part) -> Part:
    """Returns what the script needs: not the pictures and texts, which stand in the page already."""
    without = {"config", "population", "stages", "commands", "folder"}
    kept = {key: value for key, value in data.items() if key not in without}
    if kept["evaluation"] is not None:
        without = {"examples", "failed", "headline", "facts", "inputs"}
        kept["evaluation"] = {key: value for key, value in kept["evaluation"].items() if key not in without}
    return kept


def columns(table: pd.DataFrame) -> Part:
    """Returns a table as lists by column. Texts that repeat are numbers of a list of different texts.

    Args:
        table: The table.

    Returns:
        `rows`, their number, and `columns`: either `{"values": [...]}` or `{"texts": [...], "codes": [...]}`.
    """
    found = {}
    for name in table.columns:
        values = table[name]
        if values.dtype == bool:
            found[str(name)] = {"values": values.astype(int).tolist()}
        elif pd.api.types.is_numeric_dtype(values):
            found[str(name)] = {"values": [round(value, 5) for value in values.tolist()]}
        else:
            codes, texts = pd.factorize(values.fillna("").astype(str))
            found[str(name)] = {"texts": texts.tolist(), "codes": codes.tolist()}
    return {"rows": len(table), "columns": found}


def plain(value: Any) -> Any:
    """Returns a value as JSON takes it: NaN and infinities, which JSON does not have, are None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _inline(name: str) -> Markup:
    """Returns a file of the package that goes into the page as it is."""
    text = (_FOLDER / name).read_text(encoding="utf-8")
    assert "</script" not in text.lower() and "</style" not in text.lower(), f"{name} would end its own element"
    # A browser's developer tools would ask for the map beside the page, where it is not.
    return Markup("\n".join(line for line in text.split("\n") if not line.startswith("//# sourceMappingURL")))


def _libraries() -> list[Part]:
    """Returns name, version and licence text of each library in the page."""
    listed = json.loads((_FOLDER / "vendor.json").read_text(encoding="utf-8"))
    found = []
    for library in listed:
        texts = [
            Path(file["to"]).name for file in library["files"] if Path(file["to"]).suffix in (".LICENSE", ".NOTICE")
        ]
        if library["files"][0]["to"].startswith("videoadapt/"):  # the others are for tests
            text = "\n\n".join((_FOLDER / "vendor" / name).read_text(encoding="utf-8") for name in texts)
            found.append({key: library[key] for key in ("name", "version", "license")} | {"text": text})
    return found
