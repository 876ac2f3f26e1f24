"""Sections of settings: frozen dataclasses that check each field against its declaration.

`config.config` and an institution's settings are made of them. Each bad value is one `InputError`
that names the key, the value, the bound and the remedy.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from fedlora.data.text import is_unicode
from fedlora.errors import InputError

Scalar = str | int | float | bool


def key(
    default: Any,
    help: str,  # noqa: A002  (the usual name, as in argparse)
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> Any:
    """A field of a `Section`: its default, one line of help, and the allowed values."""
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "choices": choices, "bounds": given, "infinite": infinite}
    return dataclasses.field(default=default, metadata=metadata)


def kebab(name: str) -> str:
    """A field's name as a key: hyphens for underscores."""
    return name.replace("_", "-")


def _holds(value: float, word: str, bound: float) -> bool:
    if word == "at least":
        return value >= bound
    if word == "above":
        return value > bound
    if word == "at most":
        return value <= bound
    return value < bound


class Section:
    """A dataclass that checks each field against the type, choices and bounds of its declaration.

    A value of another form becomes one of its type where that is no guess: a path or a number in
    text, a list, one number for a list of them.
    """

    prefix: typing.ClassVar[str] = ""
    where: typing.ClassVar[str] = "in the config or with --set {}=VALUE"
    """Where the user sets a key, for errors; the key takes the place of ``{}``."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(typing.cast(Any, self)):
            name, kind = self.prefix + kebab(field.name), hints_of(type(self))[field.name]
            value = getattr(self, field.name)
            if not field.metadata:
                _check_section(name, value, kind)
                continue
            value = coerce(name, value, kind, field.metadata["bounds"])
            object.__setattr__(self, field.name, value)
            choices: tuple[str, ...] = field.metadata.get("choices", ())
            if choices and value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(
                    f"{name} is {value!r}; it must be one of {', '.join(choices)}{hint}"
                )
            for each in typing.cast(Any, value) if isinstance(value, tuple) else (value,):
                _check_bounds(name, each, field.metadata, self.where.format(name))


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The type of each field of a section; every message of a run reads a configuration."""
    return typing.get_type_hints(cls)


def _check_section(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise InputError(
            f"{name} is {_shown(value)}; it must be a {kind.__name__}: make one of its keys"
        )


def _check_bounds(name: str, value: Any, metadata: Mapping[str, Any], where: str) -> None:
    """Refuse a value, or an entry of a list, that is out of the bounds of its field."""
    if isinstance(value, float) and math.isinf(value) and not metadata["infinite"]:
        raise InputError(f"{name} is {value:g}; it must be finite: give a number")
    for word, bound in metadata.get("bounds", {}).items():
        if math.isnan(value) or not _holds(value, word, bound):
            raise InputError(
                f"{name} is {value:g}; it must be {word} {bound:g}: "
                f"set {name} to such a value {where}"
            )


def check_zero_or(name: str, value: float, minimum: float) -> None:
    """Refuse a value above 0 that is below a minimum.

    Raises:
        InputError: Naming the key.
    """
    if 0 < value < minimum:
        raise InputError(
            f"{name} is {value:g}; it must be 0 or at least {minimum:g}: set {name} to such a value"
        )


_S = typing.TypeVar("_S", bound=Section)


def coerce(name: str, value: Any, kind: Any, bounds: Mapping[str, float]) -> Any:
    """A value from TOML, Flower, Python or the command line as the type of its field.

    Args:
        name: Name of the key, for errors.
        value: The value, or its text.
        kind: Type of the field: str, int, float, bool, or a tuple of text or of numbers.
        bounds: Bounds of the field, for errors; not checked here.

    Raises:
        InputError: If the value is not of that type, or a conversion would be a guess.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(typing.cast("os.PathLike[str]", value))
    if isinstance(value, str) and not is_unicode(value):
        raise _surrogate_error(name, value)
    if isinstance(kind, types.GenericAlias):
        return _coerce_list(name, value, typing.get_args(kind)[0], bounds)
    return _coerce_scalar(name, value, kind, bounds)


def _coerce_list(name: str, value: Any, kind: type, bounds: Mapping[str, float]) -> tuple[Any, ...]:
    """A list from TOML, or its text: JSON, or entries joined by commas; one number is a list."""
    given = value
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text) if text.startswith("[") else [t for t in text.split(",") if t]
        except (ValueError, RecursionError):  # no JSON, endless digits, endless brackets
            value = None
    if kind is float and isinstance(value, int | float):
        value = [value]
    if not isinstance(value, list | tuple):
        example = '["a", "b"]' if kind is str else "[0.1, 0.2]"
        words = "text" if kind is str else "numbers"
        raise InputError(
            f"{name} is {_shown(given)}; it must be a list of {words}, such as {example}"
        )
    items = typing.cast(list[Any], value)
    if kind is float:
        return tuple(_coerce_scalar(name, item, float, bounds) for item in items)
    if not all(isinstance(item, str) for item in items):
        wrong = next(item for item in items if not isinstance(item, str))
        raise InputError(
            f"{name} has {_shown(wrong)}, which is no text; it must be a list of text, such as "
            '["a", "b"]'
        )
    for item in items:
        if not is_unicode(item):
            raise _surrogate_error(name, item)
    return tuple(item.strip() for item in items)


def _coerce_scalar(name: str, value: Any, kind: Any, bounds: Mapping[str, float]) -> Any:
    if kind is str and isinstance(value, str) and "\0" not in value:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    try:
        if kind is bool and value in ("true", "false"):
            return value == "true"
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and not isinstance(value, bool):
            whole = int(value)
            if abs(whole) < 2**63 and (isinstance(value, str) or whole == value):
                return whole
    except (TypeError, ValueError, OverflowError):
        pass
    wanted = {
        int: "a whole number below 2^63",
        float: "a number",
        bool: "true or false",
        str: "Unicode text without NUL",
    }[kind]
    if bounds:
        wanted += ", " + " and ".join(f"{word} {bound:g}" for word, bound in bounds.items())
    raise InputError(f"{name} is {_shown(value)}; it must be {wanted}")


def _shown(value: Any) -> str:
    """A value in one short line; of what may hold records only the type."""
    if value is None or isinstance(value, str | int | float | list | tuple | dict):
        text = " ".join(repr(typing.cast(object, value)).split())
        return text if len(text) <= 100 else f"{text[:100]}..."
    return f"a {type(value).__qualname__}"


def _surrogate_error(name: str, value: str) -> InputError:
    return InputError(
        f"{name} has {value!r}, which holds half of a surrogate pair and so is no text; write it "
        "in UTF-8"
    )


def section(cls: type[_S], values: Mapping[str, Any]) -> _S:
    """A section from kebab-case keys.

    Raises:
        InputError: For an unknown key, a wrong type or a value out of bounds.
    """
    known = {kebab(field.name): field for field in dataclasses.fields(typing.cast(Any, cls))}
    made: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise InputError(
                f"{name} is no key here; "
                + (f"did you mean {near[0]}?" if near else f"keys are {', '.join(known)}")
            )
        made[known[name].name] = value
    return cls(**made)
