"""Plug-ins: code that is not part of fedlora, named ``module:object`` in a configuration.

A plug-in is imported only in the process that runs it, from the packages installed there or from
the working directory. Its name travels in a configuration; its code never does. No key by which a
server could name a plug-in for an institution is read there (`client.config_policy`).
"""

import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from fedlora.errors import InputError

ARGUMENTS = {
    "federation.strategy": ("this_round", "updates"),
    "tracking.callbacks": ("record",),
    "data.source": (),
    "data.test-source": (),
    "data.partition": ("texts", "labels", "seed"),
}
"""Key -> the arguments with which its plug-in is called."""

_given: dict[str, Any] = {}
"""Name -> object that this process was given, which need not be importable."""
_codes: dict[str, tuple[Any, bytes]] = {}
"""Name -> an object, and its code when this process first loaded it: files may change."""


def give(key: str, thing: Any) -> str:
    """Name an object, so that `load` finds it in this process.

    A function or class has a name of its own; any other object takes that of its function or class.

    Args:
        key: The key that will name it, for errors.
        thing: The object, or the name of one.

    Raises:
        InputError: If it cannot be called and is no name, or another object has its name.
    """
    if isinstance(thing, str):
        return thing
    if not callable(thing) and not hasattr(thing, "aggregate"):
        what = thing if isinstance(thing, int | float) else f"a {type(thing).__name__}"
        raise InputError(f"{key} is {what}; give a function, or its name as module:object")
    function = _function(thing)
    name = f"{function.__module__}:{function.__qualname__}"
    if _given.setdefault(name, thing) is not thing:
        raise InputError(f"{key} is {name}, as another plug-in of this run is; rename one of them")
    return name


def forget() -> None:
    """Drop the objects that this process was given."""
    for name in _given:
        _codes.pop(name, None)
    _given.clear()


def load(key: str, name: str) -> Any:
    """The object of a plug-in.

    Args:
        key: The key that names it.
        name: ``module:object``.

    Raises:
        InputError: If there is no such module or object, or it does not take the key's arguments.
    """
    found = _given[name] if name in _given else _imported(key, name)
    called, arguments = getattr(found, "aggregate", found), ARGUMENTS[key]
    if not callable(called):
        raise InputError(
            f"{key} is {name!r}, which is a {type(found).__name__} and cannot be called; name a "
            "function"
        )
    try:
        inspect.signature(called).bind(*arguments)
    except TypeError:
        wanted = ", ".join(arguments) or "nothing"
        raise InputError(
            f"{key} is {name!r}, which cannot be called with its {len(arguments)} arguments "
            f"({wanted}); see docs/python.md"
        ) from None
    except ValueError:  # a function of C without a signature
        pass
    if name not in _codes or _codes[name][0] is not found:
        _codes[name] = found, _code(_function(found))
    return found


def describe(named: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Each plug-in for a run's papers: ``key``, ``object`` and ``sha256`` of its code.

    The hash is that of the file of its function as it was when this process first loaded the
    object, or of the function's source where there is no file (in a notebook); it does not cover
    other files that the plug-in imports.
    """
    found: list[dict[str, str]] = []
    for key, name in named:
        load(key, name)
        digest = hashlib.sha256(_codes[name][1]).hexdigest()
        found.append({"key": key, "object": name, "sha256": digest})
    return found


def _imported(key: str, name: str) -> Any:
    module_name, _, path = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that no file here hides an installed package
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the module's own code raises
        raise InputError(
            f"{key} is {name!r}, but the module {module_name} cannot be imported "
            f"({type(error).__name__}: {error}); install it, or start where its file is"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise InputError(f"{key} is {name!r}, but {module_name} has no {path}; correct it")
        found = getattr(found, part)
    return found


def _function(thing: Any) -> Any:
    """The function or class whose code a call runs: that of a strategy, a partial, an object."""
    if isinstance(thing, functools.partial):
        return _function(cast(Any, thing).func)
    if hasattr(thing, "__qualname__"):
        return thing
    return _function(thing.aggregate) if hasattr(thing, "aggregate") else cast(Any, type(thing))


def _code(function: Any) -> bytes:
    """The content of the file of a function or class, else its source; empty without either."""
    try:
        return Path(inspect.getfile(function)).read_bytes()
    except (OSError, TypeError):
        pass
    try:
        return inspect.getsource(function).encode()
    except (OSError, TypeError):
        return b""
