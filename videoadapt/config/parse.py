"""Reads YAML, JSON and text within bounds, so that no file can take all memory, all time, or the stack.

YAML here is version 1.2 with the smallest set of types: a plain scalar is text, or null. The type of a config's field
decides what a text means: `010` is ten for a number and the name `010` for a path.
"""

from __future__ import annotations

import errno
import io
import json
import stat
from pathlib import Path
from typing import Any, cast

import yaml

from videoadapt.errors import shown

MAX_CONFIG_BYTES = 256 * 1024  # PyYAML reads about 100 kB a second
MAX_TEXT_BYTES = 256 * 1024**2  # lists and tables of videos: about four million lines
MAX_DEPTH = 40  # levels of nesting. A config has 4, annotations have 5
_PIECE_BYTES = 1024**2  # read at once
_MAX_NODES = 20_000  # values of a config, with each alias counted as often as it is used

NULLS = frozenset({"", "~", "null", "Null", "NULL"})  # of YAML 1.2
_NULL, _MERGE = "null", "<<"
_STRING = "string"  # tags of our own; YAML's have URLs
_REMEDIES = {  # for the problems in PyYAML's words whose cause is mostly this
    "found character '\\t' that cannot start any token": "indent with spaces instead of tabs",
    "mapping values are not allowed here": "a text that contains `: ` needs quotes, and a key ends with a colon",
    "could not find expected ':'": "a key ends with a colon and a space",
    "expected <block end>, but found '<block mapping start>'": "all keys of a section begin in the same column",
}


class YamlError(ValueError):
    """A text is not valid YAML. The message is one line; `excerpt` is the line of the text with a caret below it."""

    def __init__(self, message: str, excerpt: str = "") -> None:
        super().__init__(message)
        self.excerpt = excerpt


class WrittenList(list[Any]):
    """A list, with the characters that wrote it: `slurm.constraint=[a100|h100]` is text for a field of text."""

    text: str = ""


class WrittenDict(dict[str, Any]):
    """A dict, with the characters that wrote it."""

    text: str = ""


def read_text(path: Path, limit: int, encoding: str = "utf-8") -> str:
    r"""Returns the text of a regular file, with `\n` as line ends.

    Args:
        path: The file.
        limit: Largest number of bytes. A larger file is not read.
        encoding: `utf-8`, or `utf-8-sig` for files that may begin with a byte order mark.

    Raises:
        OSError: The file cannot be read, is larger than `limit`, or is a pipe or a device, whose end may never come.
            `strerror` has the cause.
        UnicodeDecodeError: It is not text in this encoding.
    """
    require_regular(path)
    data = bytearray()
    if path.stat().st_size <= limit:
        with path.open("rb") as file:
            # Piece by piece, because files in /proc state a size of 0, and `read(limit)` of a text file reserves up to
            # six times as many bytes.
            while len(data) <= limit and (piece := file.read(_PIECE_BYTES)):
                data += piece
        if len(data) <= limit:
            return io.TextIOWrapper(io.BytesIO(data), encoding).read()
    raise OSError(errno.EFBIG, f"larger than {limit:,} bytes, the limit for such a file", str(path))


def require_regular(path: Path) -> None:
    """Raises OSError for a pipe, a socket or a device: to open or read one may take for ever."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder is refused when it is opened
        raise OSError(errno.EINVAL, "not a regular file but a pipe, a socket or a device", str(path))


def parse_yaml(text: str) -> Any:
    """Returns the content of a YAML document: dicts, lists, text and None. Numbers stay text.

    Raises:
        YamlError: The text is not valid YAML, repeats a key, has tags, is nested too deeply, or has too many values.
    """
    try:
        node = _Loader(text).get_single_node()
        return None if node is None else _value(node, text)
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise _yaml_error(error) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"line {line}: {ascii(text[error.position])} is not allowed in YAML") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # Overflow: "\UFFFFFFFF" is no character
        raise YamlError(" ".join(str(error).split())) from None


def _yaml_error(error: yaml.MarkedYAMLError) -> YamlError:
    """Returns an error of PyYAML in one line, with its place, and the excerpt apart."""
    mark, problem = error.problem_mark, str(error.problem)
    assert mark is not None  # all errors of the parser, and our own, have one
    remedy = f"; {_REMEDIES[problem]}" if problem in _REMEDIES else ""
    begin = f" ({error.context}, from line {error.context_mark.line + 1} on)" if error.context_mark else ""
    at_end = mark.buffer is None or mark.buffer[mark.pointer] == "\0"  # the place of interest is where it began
    snippet = (error.context_mark if at_end and error.context_mark else mark).get_snippet(indent=2) or ""
    excerpt = "\n".join("".join(c if c.isprintable() else " " for c in line) for line in snippet.split("\n"))
    return YamlError(f"line {mark.line + 1}, column {mark.column + 1}: {problem}{begin}{remedy}", excerpt)


def parse_json(text: str) -> Any:
    """Returns the content of a JSON document.

    Raises:
        json.JSONDecodeError: The text is not valid JSON.
        ValueError: An object repeats a key, a number has thousands of digits, or the text is nested too deeply. All
            messages are one line.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(repeated)} is there twice")
    return values


class _Loader(yaml.SafeLoader):
    """Composes nodes, within bounds. It constructs nothing: `_value` does."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # by id of the node: the number of values in it

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        """Returns the tag of a node without one."""
        return _NULL if kind is yaml.ScalarNode and implicit[0] and value in NULLS else _STRING

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise self._error(f"the tag {shown(event.tag)}; a config has no tags", event)
        if self._depth == MAX_DEPTH:
            raise self._error(f"nested more than {MAX_DEPTH} levels deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise self._error("an alias inside of its own value", event)
            return node
        assert node is not None
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        self._sizes[id(node)] = size = 1 + sum(self._sizes[id(part)] for part in inner)
        if size > _MAX_NODES:
            raise self._error(f"more than {_MAX_NODES:,} values, aliases included", event)
        return node

    @staticmethod
    def _error(problem: str, event: yaml.Event) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(None, None, problem, cast(yaml.error.Mark, event.start_mark))


def _value(node: yaml.Node, text: str) -> Any:
    """Returns the value of a node. Collections in brackets know their text."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == _NULL else node.value
    value: Any = _dict(node, text) if isinstance(node, yaml.MappingNode) else WrittenList()
    if isinstance(node, yaml.SequenceNode):
        value.extend(_value(each, text) for each in node.value)
    if isinstance(node, yaml.CollectionNode) and node.flow_style:
        value.text = text[node.start_mark.index : node.end_mark.index]
    return value


def _dict(node: yaml.MappingNode, text: str) -> WrittenDict:
    own, merged = WrittenDict(), WrittenDict()
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(None, None, "a key is not text", key_node.start_mark)
        key = str(key_node.value)
        if key in own:
            raise yaml.MarkedYAMLError(None, None, f"the key {shown(key)} is there twice", key_node.start_mark)
        if key == _MERGE:  # of YAML 1.1, and in common use: `<<: *name` or `<<: [*first, *second]`
            for each in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                if not isinstance(each, yaml.MappingNode):
                    raise yaml.MarkedYAMLError(None, None, "<< expects a mapping", each.start_mark)
                merged = WrittenDict(_dict(each, text) | merged)  # the first one wins
        else:
            own[key] = _value(value_node, text)
    return WrittenDict(merged | own)
