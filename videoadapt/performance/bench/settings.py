"""The settings of a benchmark: `key=value` words behind its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from videoadapt.config.sections import Section
from videoadapt.errors import ConfigError

S = TypeVar("S", bound=Section)


def parse_settings(kind: type[S], bench: str, words: Sequence[str]) -> S:
    """Settings from `key=value` words, in YAML syntax. Raises `ConfigError`, naming benchmark and key."""
    values = {}
    for word in words:
        key, _, text = word.partition("=")
        if key not in kind.model_fields:
            raise ConfigError(f"{bench}: unknown key {key}; expected one of {', '.join(kind.model_fields)}")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            values[key] = text
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{bench}: {_explain(e)}" for e in error.errors())) from None


def _explain(error: Any) -> str:
    said = error["msg"].removeprefix("Value error, ")
    field = error["loc"][0] if error["loc"] else None
    return f"{field}: {said}, got {error['input']!r}" if field else said
