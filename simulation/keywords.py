"""The keyword arguments of `fedlora.run`: every configuration key under a name of Python.

A keyword is the key's last part with underscores: ``sample_rate`` for ``training.sample-rate``.
``model`` stands for ``model.name``, and keys of ``[home]`` begin with ``home_``.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fedlora.config import plugins, schemes
from fedlora.config.config import describe
from fedlora.errors import InputError

OWN = {
    "data.source": "data",
    "data.test-source": "test_data",
    "run-dir": "out",
    "tracking.callbacks": "on_round",
}
"""Keys that `fedlora.run` takes as arguments of other names."""


def overrides(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords as ``section.key`` -> value. Plug-ins are named, and found in this process.

    Raises:
        InputError: For a keyword that is none, with the nearest one.
    """
    known = keys()
    same = {key.rpartition(".")[2].replace("-", "_"): own for key, own in OWN.items()}
    found: dict[str, Any] = {}
    for name, value in keywords.items():
        if name not in known:
            if name in same:
                raise InputError(f"{name} is no keyword of fedlora.run; did you mean {same[name]}?")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else "`fedlora config` lists the keys; a keyword is the last part, with _"
            )
            raise InputError(f"{name} is no keyword of fedlora.run; {hint}")
        found[known[name]] = _plain(known[name], value)
    return found


def keys() -> dict[str, str]:
    """Keyword -> ``section.key``."""
    found: dict[str, str] = {}
    for key, *_ in describe():
        section, _, last = key.rpartition(".")
        name = last.replace("-", "_")
        if section == "home":
            name = f"home_{name}"
        if key not in OWN:
            found["model" if key == "model.name" else name] = key
    return found


def _plain(key: str, value: Any) -> Any:
    """A value as the configuration has it: names for objects, lists for sequences."""
    if key == "federation.strategy":
        return plugins.give(key, value)
    if key == "federation.metrics" and not isinstance(value, str):
        several = cast(Sequence[Any], value) if isinstance(value, Sequence) else [value]
        return [plugins.give(key, one) for one in several]
    if key == "data.partition" and not isinstance(value, str):
        return schemes.PYTHON + plugins.give(key, value)
    return value
