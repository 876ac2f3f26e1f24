"""Plug-ins: code that is not part of fedlora, named ``module:object`` in a configuration.

A plug-in is imported only in the process that runs it, from the packages installed there or from
the working directory. Its name travels in a configuration; its code never does. No key by which a
server could name a plug-in for an institution is read there (`client.config_policy`).
"""

import difflib
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from fedlora.errors import InputError

ARGUMENTS = {
    "federation.aggregate": ("this_round", "updates"),
    "federation.metrics": ("predictions",),
    "tracking.callbacks": ("record",),
    "data.source": (),
    "data.test-source": (),
    "data.partition": ("texts", "labels", "seed"),
}
"""Key -> the arguments with which its plug-in is called."""

_given: dict[str, Any] = {}
"""Name -> object that this process was given, which need not be importable."""


def give(key: str, thing: Any) -> str:
    """Name an object, so that `load` finds it in this process.

    Args:
        key: The key that will name it, for errors.
        thing: The object, or the name of one.

    Raises:
        InputError: If it cannot be called and is no name, or another object has its name.
    """
    if isinstance(thing, str):
        return thing
    if not callable(thing) and not hasattr(thing, "aggregate"):
        raise InputError(
            f"{key} is a {type(thing).__name__}; give a function, or its name as module:object"
        )
    of = _defined(thing)
    name = f"{getattr(of, '__module__', None) or 'builtins'}:{of.__qualname__}"
    if _given.setdefault(name, thing) is not thing:
        raise InputError(f"{key} is {name}, as another plug-in of this run is; rename one of them")
    return name


def forget() -> None:
    """Drop the objects that this process was given."""
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
    for_calls = getattr(found, "aggregate", found)
    if not callable(for_calls):
        raise InputError(
            f"{key} is {name!r}, which is a {type(found).__name__} and cannot be called; name a "
            "function"
        )
    _check_arguments(key, name, for_calls)
    return found


def check(named: Iterable[tuple[str, str]]) -> None:
    """Load every plug-in of a run, before any work starts.

    Args:
        named: `fedlora.config.RunConfig.plug_ins`.

    Raises:
        InputError: As `load`.
    """
    for key, name in named:
        load(key, name)


def describe(named: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Each plug-in for a run's papers: ``key``, ``object``, ``file`` and ``sha256`` of its code.

    The hash is that of the file, or of the object's source where there is no file (in a notebook);
    it does not cover other files that the plug-in imports. What cannot be found is left out.
    """
    found: list[dict[str, str]] = []
    for key, name in named:
        file, code = _code(load(key, name))
        one = {"key": key, "object": name}
        if file:
            one["file"] = file
        if code:
            one["sha256"] = hashlib.sha256(code).hexdigest()
        found.append(one)
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
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]}?" if near else "; correct the name"
            raise InputError(f"{key} is {name!r}, but {module_name} has no {path}{hint}")
        found = getattr(found, part)
    return found


def _check_arguments(key: str, name: str, called: Callable[..., Any]) -> None:
    arguments = ARGUMENTS[key]
    try:
        inspect.signature(called).bind(*arguments)
    except TypeError:
        wanted = ", ".join(arguments) or "nothing"
        raise InputError(
            f"{key} is {name!r}, which cannot be called with its {len(arguments)} arguments "
            f"({wanted}); see docs/python.md"
        ) from None
    except ValueError:  # a function of C without a signature
        return


def _defined(thing: Any) -> Any:
    """What a definition in source code made: the function or class itself, or an object's class."""
    return thing if hasattr(thing, "__qualname__") else cast(Any, type(thing))


def _code(thing: Any) -> tuple[str, bytes]:
    """The name of an object's file, and the file's content; both may be empty."""
    of = _defined(getattr(thing, "aggregate", thing))
    try:
        file = Path(inspect.getfile(of))
        return file.name, file.read_bytes()
    except (OSError, TypeError):
        pass
    try:
        return "", inspect.getsource(of).encode()
    except (OSError, TypeError):
        return "", b""
