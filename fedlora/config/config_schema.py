"""A JSON schema of configuration files, with which editors complete keys and mark mistakes."""

import dataclasses
import math
import typing
from typing import Any

from fedlora.config.config import SECTIONS, RunConfig
from fedlora.config.settings_schema import Section, kebab

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
_BOUNDS = {
    "at least": "minimum",
    "above": "exclusiveMinimum",
    "at most": "maximum",
    "below": "exclusiveMaximum",
}


def json_schema() -> dict[str, Any]:
    """The schema, draft 07: each key with its type, choices, bounds, default and meaning."""
    schema = _section(RunConfig)
    for name, section in SECTIONS.items():
        schema["properties"][name] = _section(section)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "fedlora configuration",
        **schema,
    }


def _section(section: type[Section]) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    properties: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, section)):
        if field.name not in SECTIONS:
            properties[kebab(field.name)] = _key(field, hints[field.name])
    return {
        "description": (section.__doc__ or "").partition("\n")[0],
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _key(field: dataclasses.Field[Any], kind: Any) -> dict[str, Any]:
    (item,) = typing.get_args(kind)[:1] or (kind,)
    value: dict[str, Any] = {"type": _TYPES[item]}
    if field.metadata["choices"]:
        value["enum"] = list(field.metadata["choices"])
    for word, bound in field.metadata["bounds"].items():
        value[_BOUNDS[word]] = bound
    described: dict[str, Any] = {"description": field.metadata["help"]}
    if item is kind:
        described |= value
    else:
        one = ["number"] if item is float else []  # a number is a list of one
        described |= {**value, "type": ["array", *one], "items": value}
    default = typing.cast(Any, field.default)
    if not isinstance(default, float) or math.isfinite(default):  # JSON has no infinity
        described["default"] = default
    return described
