"""Plug-ins: code that is not part of fedlora, named ``module:object`` in a configuration.

A plug-in is imported only in the process that runs it, from the packages installed there or from
the working directory. Its name travels in a configuration; its code never does. No key by which a
server could name a plug-in for an institution is read there (`client.config_policy`).
"""

import difflib
import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from fedlora.errors import InputError

ARGUMENTS = {
    "federation.strategy": ("this_round", "updates"),
    "federation.metrics": ("predictions",),
    "tracking.callbacks": ("record",),
    "data.source": (),
    "data.test-source": (),
    "data.partition": ("texts", "labels", "seed"),
}
"""Key -> the arguments with which its plug-in is called."""

_given: dict[str, Any] = {}
"""Name -> object that this process was given, which need not be importable."""
_codes_of: dict[tuple[str, int], tuple[Any, list[tuple[str, bytes]]]] = {}
"""(Name, id) -> an object, and its code when this process first loaded it: files may change."""


def give(key: str, thing: Any) -> str:
    """Name an object, so that `load` finds it in this process.

    A function or class has a name of its own. Any other object, such as a ``Strategy`` or a
    ``functools.partial``, takes the name to which its function's module or the script assigns it,
    so that another process loads the same object by that name or none. A callback without such a
    name takes that of its class.

    Args:
        key: The key that will name it, for errors.
        thing: The object, or the name of one.

    Raises:
        InputError: If it cannot be called and is no name, has no name, or another object has its
            name.
    """
    if isinstance(thing, str):
        return thing
    kind = type(thing).__name__
    if not callable(thing) and not hasattr(thing, "aggregate"):
        what = thing if thing is None or isinstance(thing, int | float) else f"a {kind}"
        raise InputError(f"{key} is {what}; give a function, or its name as module:object")
    name = _name(thing)
    if not name and key == "tracking.callbacks":  # it changes no result
        name = f"{type(thing).__module__}:{type(thing).__qualname__}"
    if not name:
        raise InputError(
            f"{key} is a {kind} without a name; assign it to a public name at the top level of its "
            "module, and give that or its name as module:object"
        )
    if _given.setdefault(name, thing) is not thing:
        raise InputError(f"{key} is {name}, as another plug-in of this run is; rename one of them")
    return name


def forget() -> None:
    """Drop the objects that this process was given, and what no module holds any longer."""
    _given.clear()
    for key, (thing, _) in list(_codes_of.items()):
        module, _, path = key[0].partition(":")
        held: Any = sys.modules.get(module)
        for part in path.split("."):
            held = getattr(held, part, None)
        if held is not thing:
            del _codes_of[key]


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
    _codes(name, found)
    return found


def describe(named: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Each plug-in for a run's papers: ``key``, ``object``, ``file`` and ``sha256`` of its code.

    The hash is that of the file as it was when this process first loaded the object, or of the
    function's source where there is no file (in a notebook); it does not cover other files that the
    plug-in imports. An object whose function is defined in another file than the object has an
    entry for each of the two. What cannot be found is left out.
    """
    found: list[dict[str, str]] = []
    for key, name in named:
        for file, code in _codes(name, load(key, name)) or [("", b"")]:
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


def _function(thing: Any) -> Any:
    """The function or class whose code a call runs: that of a strategy, a partial, an object."""
    if isinstance(thing, functools.partial):
        return _function(cast(Any, thing).func)
    if hasattr(thing, "__qualname__"):
        return thing
    return _function(thing.aggregate) if hasattr(thing, "aggregate") else cast(Any, type(thing))


def _name(thing: Any) -> str:
    """The ``module:object`` of an object; empty where neither it nor a module names it."""
    function = _function(thing)
    module = getattr(function, "__module__", None) or "builtins"
    if function is thing:
        return f"{module}:{thing.__qualname__}"
    for place in (module, "__main__"):
        names: dict[str, Any] = getattr(sys.modules.get(place), "__dict__", {})
        for name, value in names.items():
            if value is thing and not name.startswith("_"):  # a notebook assigns outputs to _
                return f"{place}:{name}"
    return ""


def _codes(name: str, thing: Any) -> list[tuple[str, bytes]]:
    """The code of an object's function, and of the module that names the object."""
    if (name, id(thing)) not in _codes_of:
        function = _function(thing)
        parts = [function]
        if function is not thing:
            parts.append(sys.modules.get(name.partition(":")[0]))
        codes = [code for code in dict.fromkeys(map(_code, parts)) if any(code)]
        _codes_of[name, id(thing)] = thing, codes
    return _codes_of[name, id(thing)][1]


def _code(thing: Any) -> tuple[str, bytes]:
    """The name of the file of a function, class or module, and its content; both may be empty."""
    try:
        file = Path(inspect.getfile(thing))
        return file.name, file.read_bytes()
    except (OSError, TypeError):
        pass
    try:
        return "", inspect.getsource(thing).encode()
    except (OSError, TypeError):
        return "", b""
