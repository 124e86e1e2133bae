"""The reference of all keys, in words, and the JSON schema with which editors check configs and complete their keys.

Both come from the fields of the sections: their types, limits, defaults and docstrings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from videoadapt.config.load import Config, config_folder, remedy_for_key
from videoadapt.errors import ConfigError

Schema: TypeAlias = dict[str, Any]

# Made by tools/write_config_reference.py. In a config: `# yaml-language-server: $schema=PATH_OF_THIS_FILE`.
SCHEMA_FILE = config_folder() / "schema.json"

_WORDS = {"integer": "integer", "number": "number", "string": "text", "path": "path", "object": "mapping"}
_OTHER_WORDS = {"null": "null", "boolean": "true or false", None: "any value"}  # without a plural and limits
_LARGE = 10**9  # from here on, powers are easier to read than digits
_VARIABLE = {"type": "string", "pattern": r"\$\{\w+"}  # ${NAME} or ${NAME:-default}


@dataclass(frozen=True)
class Key:
    """A key of a config.

    Attributes:
        name: Such as `train.epochs`.
        values: Type and limits in words.
        default: As YAML writes it.
        description: What the key does.
    """

    name: str
    values: str
    default: str
    description: str


@dataclass(frozen=True)
class SectionKeys:
    """A section of a config, such as `train`, with its description and its keys. `data.train` belongs to `data`."""

    name: str
    description: str
    keys: tuple[Key, ...]


def describe() -> list[SectionKeys]:
    """Returns all sections with their keys, in the order of the config."""
    defaults = Config().model_dump(mode="json")
    return [
        SectionKeys(name, section["description"], tuple(_keys(section, f"{name}.", defaults[name])))
        for name, section in _schema()["properties"].items()
    ]


def find_keys(word: str) -> list[SectionKeys]:
    """Returns a key, all keys of a section, or the keys of this name in all sections, under their sections.

    If none is named so, the keys are returned that have the word in a part of their name, or in their description.

    Args:
        word: `train.epochs`, `train`, `data.val`, `epochs`, or a word such as `overfit`.

    Raises:
        ConfigError: There is no such key and no such section, and no key has the word.
    """
    in_text = re.compile(rf"\b{re.escape(word)}", re.IGNORECASE)
    for is_meant in (
        lambda key: f"{key.name}.".startswith(f"{word}."),
        lambda key: f"{word}.".startswith(f"{key.name}."),  # slurm.stages.train.nodes is described with slurm.stages
        lambda key: f".{word}." in f".{key.name}.",  # only if no section has this name: `train` is not `data.train`
        lambda key: word in key.name or in_text.search(key.description),
    ):
        found = [
            SectionKeys(each.name, each.description, keys)
            for each in describe()
            if (keys := tuple(key for key in each.keys if is_meant(key)))
        ]
        if found:
            return found
    raise ConfigError(f"unknown key {word}; {remedy_for_key(word)}")


def schema_of(word: str) -> Schema:
    """Returns the part of `editor_schema` that belongs to a key or a section.

    Raises:
        ConfigError: There is no such key and no such section.
    """
    schema = editor_schema()
    for name in word.split("."):
        if name not in schema.get("properties", {}):
            raise ConfigError(f"unknown key {word}; {remedy_for_key(word)}")
        schema = schema["properties"][name]
    return schema


def editor_schema() -> Schema:
    """Returns the JSON schema (draft 7, which all editors know) of a config file.

    It accepts what the loader makes of what people write: one point without brackets, a number where a text is
    expected, an empty section, a variable of the environment in place of any value.
    """
    root = _editable(_schema())
    base = {"type": "string", "description": "Another config file, which this one starts from, relative to this file."}
    draft = {"$schema": "http://json-schema.org/draft-07/schema#"}
    return draft | root | {"properties": {"base": base} | root["properties"]}


@cache
def _schema() -> Schema:
    """Returns pydantic's schema of a config as one tree: without references, titles, and forms of one pydantic version.

    A section has `properties`, a key has not.
    """
    schema = Config.model_json_schema()
    return _inlined(schema, schema["$defs"])


def _inlined(node: Schema, definitions: Schema) -> Schema:
    if len(node.get("allOf", ())) == 1:  # how pydantic before 2.9 writes a reference with a description of its own
        node = node["allOf"][0] | {key: value for key, value in node.items() if key != "allOf"}
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]] | {
            key: value for key, value in node.items() if key not in {"$ref", "default"}
        }
    plain = {key: value for key, value in node.items() if key not in {"title", "$defs", "const", "prefixItems"}}
    if "description" in node:
        plain["description"] = " ".join(node["description"].split())
    if "const" in node:
        plain |= {"type": "string", "enum": [node["const"]]}
    if "prefixItems" in node:  # a tuple, whose items have the same type
        plain["items"] = node["prefixItems"][0]
    for key in ("items", "additionalProperties"):
        if isinstance(plain.get(key), dict):
            plain[key] = _inlined(plain[key], definitions)
    if "anyOf" in plain:
        plain["anyOf"] = [_inlined(each, definitions) for each in plain["anyOf"]]
    if "properties" in plain:
        plain["properties"] = {name: _inlined(each, definitions) for name, each in plain["properties"].items()}
    return plain


def _keys(section: Schema, prefix: str, defaults: dict[str, Any]) -> Iterator[Key]:
    for name, schema in section["properties"].items():
        if "properties" in schema and defaults[name]:
            yield from _keys(schema, f"{prefix}{name}.", defaults[name])
        elif "properties" in schema:  # nothing by default: `slurm.stages` repeats the keys of `slurm`
            yield Key(f"{prefix}{name}", f"sections {', '.join(schema['properties'])}", "{}", schema["description"])
        else:
            yield Key(f"{prefix}{name}", _in_words(schema), _as_yaml(defaults[name]), schema["description"])


def _in_words(schema: Schema, s: str = "") -> str:
    """Returns the values that a schema allows, in words. `s` is the ending of the plural."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_in_words(each, s) for each in schema["anyOf"]))
    if "enum" in schema:
        *others, last = (f"`{value}`" for value in schema["enum"])
        return f"{', '.join(others)} or {last}" if others else last
    kind = schema.get("format", schema.get("type"))
    if kind == "array":
        count, items = schema.get("minItems"), _in_words(schema["items"], "s")
        return f"[{count} {items}]" if count and count == schema.get("maxItems") else f"list of {items}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping of names to {_in_words(schema['additionalProperties'], 's')}"
    return f"{_WORDS.get(kind, kind)}{s}{_limits(schema)}" if kind in _WORDS else _OTHER_WORDS[kind]


def _limits(schema: Schema) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {_number(schema[key])}" for key, word in words.items() if key in schema)


def _number(value: float) -> str:
    """Formats a number in short: 1,024, 1e6, 2^63."""
    if isinstance(value, int) and abs(value) < _LARGE:
        return f"{value:,}"
    if isinstance(value, int) and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return re.sub(r"e[+]?(-?)0*", r"e\1", f"{value:g}")


def _as_yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_yaml(each)}" for key, each in value.items()) + "}"
    return _number(value) if isinstance(value, float) else str(value)


def _editable(schema: Schema) -> Schema:
    """Returns a schema that accepts what the loader accepts, with the description and default of the given one."""
    about = {key: schema[key] for key in ("description", "default") if key in schema}
    forms = list(_forms({key: value for key, value in schema.items() if key not in about}))
    unique = [form for number, form in enumerate(forms) if form not in forms[:number]]
    return about | (unique[0] if len(unique) == 1 else {"anyOf": unique})


def _forms(schema: Schema) -> Iterator[Schema]:
    """Yields the forms in which a value may be written."""
    kind = schema.get("type")
    if "anyOf" in schema:
        for each in schema["anyOf"]:
            yield from _forms(each)
    elif "properties" in schema:
        properties = {name: _editable(each) for name, each in schema["properties"].items()}
        yield schema | {"type": ["object", "null"], "properties": properties}  # null: all its keys are comments
    elif kind == "array":
        yield schema | {"items": _editable(schema["items"])}
        if schema["items"].get("type") == "string":
            yield from _forms(schema["items"])  # one text needs no brackets
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        yield schema | {"additionalProperties": _editable(schema["additionalProperties"])}
    elif kind == "string" and not {"enum", "pattern"} & schema.keys():
        # A text may look like a number (`account: 1234`), or like a list (`exclude: [n01, n02]`).
        yield {"type": ["string", "number"] if "format" in schema else ["string", "number", "array"]}
    else:
        yield schema
        if kind in {"integer", "number", "boolean", "string"}:
            yield _VARIABLE
