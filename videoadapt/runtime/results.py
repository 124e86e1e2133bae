"""Results of the verbs: dataclasses that know their JSON, a repr of one line, and a table for notebooks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, NamedTuple

from videoadapt.runtime.files import Summary


class Table(NamedTuple):
    """A small table: its title, the headers, and one cell for each header in every row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, repr=False)
class Result:
    """Base class of the dataclasses that verbs return. A subclass defines `table`, and `content` if its JSON differs.

    Write `@dataclass(frozen=True, repr=False)` at the subclass: dataclasses have a repr of their own, of all fields.
    """

    def content(self) -> Summary:
        """Returns keys and values of the JSON file. Default: the fields."""
        return asdict(self)

    def table(self) -> Table:
        """Returns the figures that a notebook shows."""
        raise NotImplementedError

    def to_json(self) -> Summary:
        """Returns what the verb writes as JSON, with lists in place of tuples."""
        written: Summary = json.loads(json.dumps(self.content()))
        return written

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.table().title}>"

    def _repr_html_(self) -> str:
        return html_table(self.table())


@dataclass(frozen=True, repr=False)
class ShardResult(Result):
    """One job of an array has scored its shard. The job without `parallel.shard` reads all shards."""

    shard: str  # such as `1/4`

    def table(self) -> Table:
        """Returns the number of the shard."""
        return Table(f"shard {self.shard} is scored", ("shard",), [(self.shard,)])


def html_table(table: Table) -> str:
    """Returns a table as HTML, for notebooks."""
    head = "".join(f"<th>{escape(str(column))}</th>" for column in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in table.rows)
    caption = f'<caption style="caption-side: top; text-align: left">{escape(table.title)}</caption>'
    return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
